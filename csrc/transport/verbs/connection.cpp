#include "connection.hpp"

#include <algorithm>
#include <random>
#include <utility>

namespace spark::verbs {
namespace {

constexpr uint32_t kPacketNumbers = 1u << 24;
constexpr int kCompletionsAtOnce = 16;

}  // namespace

Connection::Connection(std::shared_ptr<const Device> device, const RailAddress& address, std::byte* received,
                       size_t bytes)
    : device_(std::move(device)),
      address_(address),
      receiving_(*device_, received, bytes, true),
      completions_(*device_, static_cast<int>(QueuePair::kSendRequests)),
      pair_(*device_, completions_, address.port),
      // Another number for each connection: packets of an earlier one are not taken for this one's.
      packet_number_(static_cast<uint32_t>(std::random_device{}()) % kPacketNumbers) {}

ConnectionInfo Connection::info() const {
  return {pair_.number(), packet_number_, receiving_.remote_key(), address_.mtu, receiving_.remote_address(),
          address_.gid};
}

void Connection::connect(const ConnectionInfo& peer, const PathOptions& path_options) {
  uint32_t source_index = device_->gid_index(address_.port, address_.gid);
  pair_.connect({peer.queue_pair, peer.packet_number, std::min(address_.mtu, peer.mtu), peer.gid},
                source_index, packet_number_, path_options);
}

std::optional<std::string> Connection::poll() {
  abi::ibv_wc completions[kCompletionsAtOnce];
  int count = completions_.poll(completions, kCompletionsAtOnce);
  if (count < 0) return "its completion queue is broken";
  for (int at = 0; at < count; ++at) {
    if (completions[at].status != abi::IBV_WC_SUCCESS) return pair_.failure_text(completions[at]);
    // All before it have arrived too.
    completed_ = std::max(completed_, completions[at].wr_id);
  }
  return std::nullopt;
}

}  // namespace spark::verbs
