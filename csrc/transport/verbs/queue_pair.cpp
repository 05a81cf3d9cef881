#include "queue_pair.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "../../support/errors.hpp"
#include "pin_remedy.hpp"

namespace spark::verbs {
namespace {

// How often a packet without an acknowledgement is retransmitted. With six a loss of 5 % of the packets is
// tolerated. Not seven, which soft-RoCE treats as unlimited.
constexpr uint8_t kRetries = 6;
constexpr int kMaxTimeout = 31;          // five bits
constexpr uint8_t kReceiverRetries = 7;  // unlimited; RDMA writes need no posted receive anyway
constexpr uint8_t kReceiverTimer = 12;
constexpr uint8_t kHopLimit = 64;

// The longest time between two transmissions of a packet, 4.096 us * 2^code, with which all of them end
// within `rail_timeout`.
uint8_t timeout_code(std::chrono::nanoseconds rail_timeout) {
  int code = 1;  // 0 is unlimited
  while (code < kMaxTimeout && (kRetries + 1) * (int64_t{4096} << (code + 1)) <= rail_timeout.count()) ++code;
  return static_cast<uint8_t>(code);
}

[[noreturn]] void fail(const std::string& device, const std::string& what, int error) {
  throw CollectiveError("the RDMA device " + device + " cannot " + what + " (" + std::strerror(error) +
                        "); vllm-spark doctor says what is wrong with it");
}

}  // namespace

MemoryRegion::MemoryRegion(const Device& device, std::byte* memory, size_t bytes, bool remote)
    : library_(device.library()) {
  // The NIC may write only what the peer shall; of the rest it reads.
  int access = remote ? abi::IBV_ACCESS_LOCAL_WRITE | abi::IBV_ACCESS_REMOTE_WRITE : 0;
  region_ = library_.reg_mr(device.domain(), memory, bytes, access);
  if (region_ != nullptr) return;
  int error = errno;
  if (error == ENOMEM || error == EPERM) {
    throw CollectiveError("the RDMA device " + device.name() + " cannot pin " + std::to_string(bytes) +
                          " bytes of memory (" + std::strerror(error) + "); " + pin_remedy());
  }
  fail(device.name(), "register " + std::to_string(bytes) + " bytes of memory", error);
}

MemoryRegion::~MemoryRegion() {
  library_.dereg_mr(region_);
}

CompletionQueue::CompletionQueue(const Device& device, int entries)
    : library_(device.library()),
      queue_(library_.create_cq(device.context(), entries, nullptr, nullptr, 0)),
      poll_(reinterpret_cast<abi::PollCq>(device.context()->ops[abi::kPollCq])) {
  if (queue_ == nullptr) fail(device.name(), "make a completion queue", errno);
}

CompletionQueue::~CompletionQueue() {
  library_.destroy_cq(queue_);
}

QueuePair::QueuePair(const Device& device, const CompletionQueue& completions, uint8_t port)
    : device_(device.name()),
      library_(device.library()),
      port_(port),
      post_(reinterpret_cast<abi::PostSend>(device.context()->ops[abi::kPostSend])) {
  abi::ibv_qp_init_attr setup{};
  setup.send_cq = setup.recv_cq = completions.get();
  setup.cap = {kSendRequests, 1, 1, 1, kInlineBytes};
  setup.qp_type = abi::IBV_QPT_RC;
  pair_ = library_.create_qp(device.domain(), &setup);
  if (pair_ == nullptr) fail(device_, "make a queue pair", errno);
  abi::ibv_qp_attr attributes{};
  attributes.qp_state = abi::IBV_QPS_INIT;
  attributes.port_num = port;
  attributes.qp_access_flags = abi::IBV_ACCESS_REMOTE_WRITE;
  try {
    modify(attributes,
           abi::IBV_QP_STATE | abi::IBV_QP_PKEY_INDEX | abi::IBV_QP_PORT | abi::IBV_QP_ACCESS_FLAGS,
           "initialise a queue pair");
  } catch (...) {
    library_.destroy_qp(pair_);
    throw;
  }
}

QueuePair::~QueuePair() {
  library_.destroy_qp(pair_);
}

void QueuePair::connect(const Destination& peer, uint32_t source_index, uint32_t packet_number,
                        const PathOptions& path_options) {
  abi::ibv_qp_attr receive{};
  receive.qp_state = abi::IBV_QPS_RTR;
  receive.path_mtu = mtu_code(peer.mtu);
  receive.dest_qp_num = peer.queue_pair;
  receive.rq_psn = peer.packet_number;
  receive.max_dest_rd_atomic = 1;
  receive.min_rnr_timer = kReceiverTimer;
  receive.ah_attr.is_global = 1;
  receive.ah_attr.port_num = port_;
  receive.ah_attr.sl = path_options.service_level;
  receive.ah_attr.grh.dgid = peer.gid;
  receive.ah_attr.grh.sgid_index = static_cast<uint8_t>(source_index);
  receive.ah_attr.grh.hop_limit = kHopLimit;
  receive.ah_attr.grh.traffic_class = path_options.traffic_class;
  modify(receive,
         abi::IBV_QP_STATE | abi::IBV_QP_AV | abi::IBV_QP_PATH_MTU | abi::IBV_QP_DEST_QPN |
             abi::IBV_QP_RQ_PSN | abi::IBV_QP_MAX_DEST_RD_ATOMIC | abi::IBV_QP_MIN_RNR_TIMER,
         "reach the peer");
  abi::ibv_qp_attr send{};
  send.qp_state = abi::IBV_QPS_RTS;
  send.timeout = timeout_code(path_options.rail_timeout);
  send.retry_cnt = kRetries;
  send.rnr_retry = kReceiverRetries;
  send.sq_psn = packet_number;
  send.max_rd_atomic = 1;
  modify(send,
         abi::IBV_QP_STATE | abi::IBV_QP_TIMEOUT | abi::IBV_QP_RETRY_CNT | abi::IBV_QP_RNR_RETRY |
             abi::IBV_QP_SQ_PSN | abi::IBV_QP_MAX_QP_RD_ATOMIC,
         "send to the peer");
  peer_number_ = peer.queue_pair;
  source_index_ = source_index;
}

// Of a failed completion nothing but its request, status, vendor's error and queue pair is valid.
std::string QueuePair::failure_text(const abi::ibv_wc& completion) const {
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, " (status %u, vendor error 0x%x, queue pair %u to %u, GID index %u)",
                completion.status, completion.vendor_err, pair_->qp_num, peer_number_, source_index_);
  return library_.status_text(completion.status) + std::string(numbers);
}

void QueuePair::end() noexcept {
  abi::ibv_qp_attr attributes{};
  attributes.qp_state = abi::IBV_QPS_ERR;
  // It fails only where the device is gone, and the traffic with it.
  library_.modify_qp(pair_, &attributes, abi::IBV_QP_STATE);
}

void QueuePair::modify(abi::ibv_qp_attr& attributes, int mask, const char* what) {
  int error = library_.modify_qp(pair_, &attributes, mask);
  if (error != 0) fail(device_, what, error);
}

}  // namespace spark::verbs
