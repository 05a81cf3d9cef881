#include "rail.hpp"

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

namespace spark::verbs {
namespace {

constexpr uint32_t kPacketNumbers = 1u << 24;
constexpr int kCompletionsAtOnce = 8;
static_assert(kProofBytes >= mtu_bytes(5), "an announcement fills the largest packet of the largest MTU");

}  // namespace

Rail::Rail(uint32_t index, const RailAddress& address, std::byte* memory, const RegionSizes& sizes,
           const WireClass& marks, Reaper& reaper)
    : index_(index),
      address_(address),
      name_("rail " + std::to_string(index) + " (" + address.device + ")"),
      memory_(memory),
      layout_(sizes),
      packet_area_(layout_.packet_area()),
      payload_area_(layout_.payload_area()),
      send_packets_(layout_.send_packets()),
      recv_packets_(layout_.recv_packets()),
      send_payload_(layout_.send_payload()),
      recv_payload_(layout_.recv_payload()),
      recv_flags_(layout_.recv_flags()),
      marks_(marks),
      reaper_(reaper),
      device_(std::make_shared<Device>(address.device)),
      sending_(*device_, memory + layout_.outbox(), layout_.total() - layout_.outbox(), false),
      ring_(kWrites) {}

Rail::~Rail() {
  end_connection();
}

void Rail::end_connection() {
  if (!connection_) return;
  connection_->pair.end();  // from here on nothing of it reaches this rank's memory
  reaper_.release(std::move(connection_));
}

RailState Rail::state() const {
  RailState state{};
  state.epoch = epoch_;
  state.phase = phase_;
  if (connection_) {
    state.queue_pair = connection_->pair.number();
    state.remote_key = connection_->receiving.remote_key();
  }
  state.packet_number = packet_number_;
  state.mtu = address_.mtu;
  state.address = reinterpret_cast<uintptr_t>(memory_ + layout_.inbox());
  state.gid = address_.gid;
  return state;
}

void Rail::offer() {
  connection_ = std::make_shared<Connection>(device_, address_.port, memory_ + layout_.inbox(),
                                             layout_.outbox() - layout_.inbox());
  // Another number for each connection: packets of an earlier one are not taken for this one's.
  packet_number_ = static_cast<uint32_t>(std::random_device{}()) % kPacketNumbers;
  phase_ = Phase::kOffered;
}

void Rail::connect(const RailState& peer) {
  uint32_t index = device_->gid_index(address_.port, address_.gid);
  connection_->pair.connect({peer.queue_pair, peer.packet_number, std::min(address_.mtu, peer.mtu), peer.gid},
                            index, packet_number_, marks_);
  remote_base_ = peer.address - layout_.inbox();
  data_.wr.rdma.rkey = flag_.wr.rdma.rkey = peer.remote_key;
  prepare_requests();
  phase_ = Phase::kReady;
}

void Rail::prepare_requests() {
  data_sge_.lkey = sending_.local_key();
  data_.sg_list = &data_sge_;
  flag_sge_ = {reinterpret_cast<uintptr_t>(&flag_value_), sizeof flag_value_,
               0};  // inline: copied when posted
  flag_.sg_list = &flag_sge_;
  data_.num_sge = flag_.num_sge = 1;
  data_.opcode = flag_.opcode = abi::IBV_WR_RDMA_WRITE;
}

std::vector<Write> Rail::fail(uint32_t epoch) {
  std::vector<Write> lost;
  for (uint64_t number = completed_ + 1; number <= posted_; ++number) {
    const Posted& posted = ring_[number % kWrites];
    if (!posted.announcement) lost.push_back(posted.write);
  }
  completed_ = posted_;
  end_connection();
  epoch_ = epoch;
  phase_ = Phase::kDown;
  open_ = false;
  return lost;
}

void Rail::aim(size_t from, size_t to, size_t bytes) {
  data_sge_.addr = reinterpret_cast<uintptr_t>(memory_ + from);
  data_sge_.length = static_cast<uint32_t>(bytes);
  data_.wr.rdma.remote_addr = remote_base_ + to;
}

int Rail::post(const Write& write, bool signal) {
  const SendDescriptor& descriptor = write.descriptor;
  size_t slot = layout_.slot(write.sequence);
  if (descriptor.protocol == Protocol::kPackets) {
    size_t offset = slot * packet_area_;
    aim(send_packets_ + offset, recv_packets_ + offset, packet_count(descriptor.bytes) * sizeof(Packet));
    return submit({write, false}, &data_, data_, 0, signal);
  }
  // On one reliable connection writes take effect in their order: the flag comes after the payload.
  flag_value_ = payload_flag(write.sequence, descriptor.tag);
  flag_.wr.rdma.remote_addr =
      remote_base_ + recv_flags_ + slot * RegionLayout::flag_area() + descriptor.piece * sizeof(Flag);
  if (descriptor.bytes == 0) return submit({write, false}, &flag_, flag_, abi::IBV_SEND_INLINE, signal);
  size_t offset = slot * payload_area_ + descriptor.offset;
  aim(send_payload_ + offset, recv_payload_ + offset, descriptor.bytes);
  data_.send_flags = 0;
  data_.next = &flag_;
  return submit({write, false}, &data_, flag_, abi::IBV_SEND_INLINE, signal);
}

int Rail::post_announcement(uint32_t outbox) {
  aim(layout_.outbox() + outbox * kPage, layout_.inbox(), kProofBytes);
  return submit({{}, true}, &data_, data_, 0, true);
}

int Rail::submit(const Posted& posted, abi::ibv_send_wr* first, abi::ibv_send_wr& last, uint32_t flags,
                 bool signal) {
  uint64_t number = posted_ + 1;
  last.wr_id = number;
  last.next = nullptr;
  last.send_flags = signal || number % kSignalEvery == 0 ? flags | abi::IBV_SEND_SIGNALED : flags;
  // Noted even if posting fails: then the connection has failed, and this is sent again over another.
  ring_[number % kWrites] = posted;
  posted_ = number;
  return connection_->pair.post(first);
}

std::optional<std::string> Rail::poll() {
  abi::ibv_wc completions[kCompletionsAtOnce];
  int count = connection_->completions.poll(completions, kCompletionsAtOnce);
  if (count < 0) return "its completion queue is broken";
  for (int at = 0; at < count; ++at) {
    if (completions[at].status != abi::IBV_WC_SUCCESS) return connection_->pair.failure_text(completions[at]);
    // All before it have arrived too.
    completed_ = std::max(completed_, completions[at].wr_id);
  }
  if (phase_ == Phase::kUp && completed_ > risen_at_) phase_ = Phase::kProven;
  return std::nullopt;
}

}  // namespace spark::verbs
