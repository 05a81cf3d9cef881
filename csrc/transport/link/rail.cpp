#include "rail.hpp"

#include <utility>

namespace spark::verbs {

static_assert(kProofBytes >= mtu_bytes(5), "an announcement fills the largest packet of the largest MTU");

Rail::Rail(uint32_t index, const RailAddress& address, std::shared_ptr<const Device> device,
           std::byte* memory, const RegionSizes& sizes, const WireClass& wire_class,
           BackgroundRelease& release)
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
      wire_class_(wire_class),
      release_(release),
      device_(std::move(device)),
      sending_(*device_, memory + layout_.outbox(), layout_.total() - layout_.outbox(), false),
      ring_(Connection::kMessages) {}

Rail::~Rail() {
  end_connection();
}

void Rail::end_connection() {
  if (!connection_) return;
  connection_->end();
  release_.release(std::move(connection_));
}

RailState Rail::state() const {
  RailState state{epoch_, phase_, {}};
  if (connection_) state.connection = connection_->info();
  return state;
}

void Rail::offer() {
  connection_ = std::make_shared<Connection>(device_, address_, memory_ + layout_.inbox(),
                                             layout_.outbox() - layout_.inbox());
  phase_ = Phase::kOffered;
}

void Rail::connect(const RailState& peer) {
  connection_->connect(peer.connection, wire_class_);
  remote_base_ = peer.connection.address - layout_.inbox();
  data_.prepare(sending_.local_key(), peer.connection.remote_key);
  flag_.prepare(0, peer.connection.remote_key);  // posted inline: without a key
  phase_ = Phase::kReady;
}

std::vector<Write> Rail::fail(uint32_t epoch) {
  std::vector<Write> lost;
  if (connection_) {
    for (uint64_t number = completed() + 1; number <= posted(); ++number) {
      const Posted& posted = ring_[number % ring_.size()];
      if (!posted.announcement) lost.push_back(posted.write);
    }
  }
  end_connection();
  epoch_ = epoch;
  phase_ = Phase::kDown;
  open_ = false;
  return lost;
}

void Rail::set_data(size_t from, size_t to, size_t bytes) {
  data_.set(memory_ + from, bytes, remote_base_ + to);
}

int Rail::post(const Write& write, bool signal) {
  const SendDescriptor& descriptor = write.descriptor;
  size_t slot = layout_.slot(write.sequence);
  if (descriptor.protocol == Protocol::kPackets) {
    size_t offset = slot * packet_area_;
    set_data(send_packets_ + offset, recv_packets_ + offset, packet_count(descriptor.bytes) * sizeof(Packet));
    return submit({write, false}, data_, data_, 0, signal);
  }
  // On one reliable connection writes take effect in their order: the flag comes after the payload.
  flag_value_ = payload_flag(write.sequence, descriptor.tag);
  flag_.set(&flag_value_, sizeof flag_value_,
            remote_base_ + recv_flags_ + slot * RegionLayout::flag_area() + descriptor.piece * sizeof(Flag));
  if (descriptor.bytes == 0) return submit({write, false}, flag_, flag_, abi::IBV_SEND_INLINE, signal);
  size_t offset = slot * payload_area_ + descriptor.offset;
  set_data(send_payload_ + offset, recv_payload_ + offset, descriptor.bytes);
  data_.request.send_flags = 0;
  data_.request.next = &flag_.request;
  return submit({write, false}, data_, flag_, abi::IBV_SEND_INLINE, signal);
}

int Rail::post_announcement(uint32_t outbox) {
  set_data(layout_.outbox() + outbox * kPage, layout_.inbox(), kProofBytes);
  return submit({{}, true}, data_, data_, 0, true);
}

int Rail::submit(const Posted& posted, WriteRequest& first, WriteRequest& last, uint32_t flags, bool signal) {
  // Kept even if posting fails: then the connection has failed, and this message is sent again over another.
  ring_[(connection_->posted() + 1) % Connection::kMessages] = posted;
  return connection_->post(first.request, last.request, flags, signal);
}

std::optional<std::string> Rail::poll() {
  std::optional<std::string> problem = connection_->poll();
  if (!problem && phase_ == Phase::kUp && completed() > 0) phase_ = Phase::kProven;
  return problem;
}

}  // namespace spark::verbs
