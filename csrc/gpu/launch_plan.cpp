#include "launch_plan.hpp"

#include <algorithm>

#include "../kernels/parameters.hpp"

namespace spark::device {
namespace {

// Messages of a large operation, as long as they fit into slots, and a few more where pieces are rounded:
// enough that both directions are busy nearly all the time.
constexpr uint64_t kMessages = 16;
// Messages of an operation that fits into few: the first is on its way while the second is staged, and the
// last is short. Not below this size: each takes the GPU a release, and the proxy a doorbell for each rail.
constexpr uint64_t kFewMessages = 4;
constexpr uint64_t kSmallestMessage = 64 << 10;

uint64_t divide_up(uint64_t value, uint64_t by) {
  return (value + by - 1) / by;
}

LaunchPlan plan_packets(uint64_t bytes, const LaunchShape& shape) {
  uint64_t packets = wide_packet_count(bytes);
  uint64_t blocks = std::min<uint64_t>(divide_up(packets, shape.packet_threads), kMaxPieces);
  // Threads of very many packets have several each.
  uint64_t movers = round_up(std::min<uint64_t>(divide_up(packets, blocks), shape.packet_threads), kWarp);
  return {Protocol::kPackets, static_cast<uint32_t>(blocks),
          static_cast<uint32_t>(movers + kPacketsSideThreads), 0};
}

// Messages of equal size, each cut into as many pieces as there are blocks. Pieces begin on a cache line: two
// blocks that want the same one from host memory would be answered one after the other.
LaunchPlan plan_payload(uint64_t bytes, const LaunchShape& shape, const RegionSizes& sizes) {
  uint64_t largest = std::min<uint64_t>(shape.payload_message_bytes,
                                        std::max(kSmallestMessage, divide_up(bytes, kFewMessages)));
  largest = std::min<uint64_t>(sizes.slot_bytes, std::max<uint64_t>(largest, bytes / kMessages));
  uint64_t unit = largest < kLine ? kVector : kLine;
  uint64_t most = std::min<uint64_t>(shape.payload_blocks, largest / unit);
  uint64_t blocks = std::clamp<uint64_t>(bytes / shape.payload_bytes_per_block, 1, most);
  uint64_t messages = divide_up(bytes, largest);
  uint64_t piece = round_up(divide_up(bytes, messages * blocks), unit);
  piece = std::min(piece, largest / blocks / unit * unit);
  uint64_t each = std::min<uint64_t>(shape.payload_threads, round_up(piece / kVector, kWarp));
  return {Protocol::kPayload, static_cast<uint32_t>(blocks),
          static_cast<uint32_t>(2 * each + kPayloadSideThreads), static_cast<uint32_t>(piece * blocks)};
}

}  // namespace

LaunchPlan plan(uint64_t bytes, const LaunchShape& shape, const RegionSizes& sizes) {
  return bytes <= sizes.packet_bytes ? plan_packets(bytes, shape) : plan_payload(bytes, shape, sizes);
}

}  // namespace spark::device
