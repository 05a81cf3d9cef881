#include "queue_pair.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "../../errors.hpp"
#include "pin_remedy.hpp"

namespace spark::verbs {
namespace {

// After 4.096 us * 2^14 = 67 ms without an answer a packet is sent again, six times at most: a lost cable is
// noticed after half a second to a few (NICs stretch it), and losing one packet in twenty is not taken for
// one. Not seven times, which soft-RoCE takes for "without end".
constexpr uint8_t kTimeout = 14;
constexpr uint8_t kRetries = 6;
constexpr uint8_t kReceiverRetries = 7;  // without end; but writes need no receiver that is ready
constexpr uint8_t kReceiverTimer = 12;
constexpr uint8_t kHopLimit = 64;

[[noreturn]] void fail(const std::string& device, const std::string& what, int error) {
  throw CollectiveError("the RDMA device " + device + " cannot " + what + " (" + std::strerror(error) +
                        "); vllm-spark doctor says what is wrong with it");
}

}  // namespace

MemoryRegion::MemoryRegion(const Device& device, std::byte* memory, size_t bytes, bool remote) {
  // The NIC may write only what the peer shall; of the rest it reads.
  int access = remote ? abi::kLocalWrite | abi::kRemoteWrite : 0;
  region_ = Library::get().reg_mr(device.domain(), memory, bytes, access);
  if (region_ != nullptr) return;
  int error = errno;
  if (error == ENOMEM || error == EPERM) {
    throw CollectiveError("the RDMA device " + device.name() + " cannot pin " + std::to_string(bytes) +
                          " bytes of memory (" + std::strerror(error) + "); " + pin_remedy());
  }
  fail(device.name(), "register " + std::to_string(bytes) + " bytes of memory", error);
}

MemoryRegion::~MemoryRegion() {
  Library::get().dereg_mr(region_);
}

CompletionQueue::CompletionQueue(const Device& device, int entries)
    : queue_(Library::get().create_cq(device.context(), entries, nullptr, nullptr, 0)),
      poll_(reinterpret_cast<abi::PollCompletions>(device.context()->operations[abi::kPollCompletions])) {
  if (queue_ == nullptr) fail(device.name(), "make a completion queue", errno);
}

CompletionQueue::~CompletionQueue() {
  Library::get().destroy_cq(queue_);
}

QueuePair::QueuePair(const Device& device, const CompletionQueue& completions, uint8_t port)
    : device_(device.name()),
      port_(port),
      post_(reinterpret_cast<abi::PostSend>(device.context()->operations[abi::kPostSend])) {
  abi::QueuePairSetup setup{};
  setup.send_completions = setup.receive_completions = completions.get();
  setup.capacities = {kSendRequests, 1, 1, 1, kInlineBytes};
  setup.type = abi::kReliableConnection;
  pair_ = Library::get().create_qp(device.domain(), &setup);
  if (pair_ == nullptr) fail(device_, "make a queue pair", errno);
  abi::QueuePairAttributes attributes{};
  attributes.state = abi::kInit;
  attributes.port = port;
  attributes.access_flags = abi::kRemoteWrite;
  try {
    modify(attributes, abi::kState | abi::kPartitionIndex | abi::kPort | abi::kAccessFlags,
           "initialise a queue pair");
  } catch (...) {
    Library::get().destroy_qp(pair_);
    throw;
  }
}

QueuePair::~QueuePair() {
  Library::get().destroy_qp(pair_);
}

void QueuePair::connect(const Destination& peer, uint32_t source_index, uint32_t packet_number,
                        const WireClass& marks) {
  abi::QueuePairAttributes receive{};
  receive.state = abi::kReadyToReceive;
  receive.path_mtu = mtu_code(peer.mtu);
  receive.destination_queue_pair = peer.queue_pair;
  receive.receive_packet_number = peer.packet_number;
  receive.max_destination_reads = 1;
  receive.receiver_timer = kReceiverTimer;
  receive.address.is_global = 1;
  receive.address.port = port_;
  receive.address.service_level = marks.service_level;
  receive.address.route.destination = peer.gid;
  receive.address.route.source_index = static_cast<uint8_t>(source_index);
  receive.address.route.hop_limit = kHopLimit;
  receive.address.route.traffic_class = marks.traffic_class;
  modify(receive,
         abi::kState | abi::kAddress | abi::kPathMtu | abi::kDestinationQueuePair |
             abi::kReceivePacketNumber | abi::kMaxDestinationReads | abi::kReceiverTimer,
         "reach the peer");
  abi::QueuePairAttributes send{};
  send.state = abi::kReadyToSend;
  send.timeout = kTimeout;
  send.retry_count = kRetries;
  send.receiver_retry = kReceiverRetries;
  send.send_packet_number = packet_number;
  send.max_reads = 1;
  modify(send,
         abi::kState | abi::kTimeout | abi::kRetryCount | abi::kReceiverRetry | abi::kSendPacketNumber |
             abi::kMaxReads,
         "send to the peer");
  peer_number_ = peer.queue_pair;
  source_index_ = source_index;
}

// Of a failed completion nothing but its request, status, vendor's error and queue pair is valid.
std::string QueuePair::failure_text(const abi::Completion& completion) const {
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, " (status %u, vendor error 0x%x, queue pair %u to %u, GID index %u)",
                completion.status, completion.vendor_error, pair_->number, peer_number_, source_index_);
  return Library::get().status_text(completion.status) + std::string(numbers);
}

void QueuePair::end() noexcept {
  abi::QueuePairAttributes attributes{};
  attributes.state = abi::kError;
  // It fails only where the device is gone, and the traffic with it.
  Library::get().modify_qp(pair_, &attributes, abi::kState);
}

void QueuePair::modify(abi::QueuePairAttributes& attributes, int mask, const char* what) {
  int error = Library::get().modify_qp(pair_, &attributes, mask);
  if (error != 0) fail(device_, what, error);
}

}  // namespace spark::verbs
