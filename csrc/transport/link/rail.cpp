#include "rail.hpp"

#include <utility>

namespace spark::verbs {

static_assert(kProofBytes >= mtu_bytes(5), "an announcement fills the largest packet of the largest MTU");

Rail::Rail(uint32_t index, const RailAddress& address, std::shared_ptr<const Device> device,
           std::byte* memory, const RegionSizes& sizes, const PathOptions& path_options,
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
      path_options_(path_options),
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
  announced_ = 0;
  phase_ = Phase::kOffered;
}

void Rail::connect(const RailState& peer) {
  connection_->connect(peer.connection, path_options_);
  remote_base_ = peer.connection.address - layout_.inbox();
  for (WriteRequest& write : chain_) write.prepare(sending_.local_key(), peer.connection.remote_key);
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
  chained_ = 0;
  epoch_ = epoch;
  phase_ = Phase::kDown;
  open_ = false;
  return lost;
}

WriteRequest& Rail::chain(size_t from, size_t to, size_t bytes) {
  WriteRequest& write = chain_[chained_];
  if (chained_ > 0) chain_[chained_ - 1].request.next = &write.request;
  ++chained_;
  write.set(memory_ + from, bytes, remote_base_ + to);
  write.request.send_flags = 0;
  return write;
}

void Rail::post(const Write& write, bool signal) {
  const SendDescriptor& descriptor = write.descriptor;
  size_t slot = layout_.slot(write.sequence);
  if (descriptor.protocol == Protocol::kPackets) {
    size_t offset = slot * packet_area_ + descriptor.offset;
    number({write, false}, chain(send_packets_ + offset, recv_packets_ + offset, descriptor.bytes), 0,
           signal);
    return;
  }
  if (descriptor.bytes != 0) {
    size_t offset = slot * payload_area_ + descriptor.offset;
    chain(send_payload_ + offset, recv_payload_ + offset, descriptor.bytes);
  }
  // On one reliable connection writes take effect in their order: the flag comes after the payload.
  uint64_t& value = flag_values_[chained_];
  value = payload_flag(write.sequence, descriptor.tag);
  size_t flag = recv_flags_ + slot * RegionLayout::flag_area() + descriptor.piece * sizeof(Flag);
  WriteRequest& last = chain(0, flag, sizeof value);
  last.entry.addr = reinterpret_cast<uintptr_t>(&value);  // posted inline: the key does not matter
  number({write, false}, last, abi::IBV_SEND_INLINE, signal);
}

void Rail::post_announcement(uint32_t outbox) {
  number({{}, true}, chain(layout_.outbox() + outbox * kPage, layout_.inbox(), kProofBytes), 0, true);
  announced_ = posted();
}

void Rail::number(const Posted& posted, WriteRequest& last, uint32_t flags, bool signal) {
  // Kept even if posting fails: then the connection has failed, and this message is sent again over another.
  ring_[(connection_->posted() + 1) % Connection::kMessages] = posted;
  connection_->number(last.request, flags, signal);
}

std::optional<std::string> Rail::poll() {
  std::optional<std::string> problem = connection_->poll();
  if (!problem && phase_ == Phase::kUp && completed() > 0) phase_ = Phase::kProven;
  return problem;
}

}  // namespace spark::verbs
