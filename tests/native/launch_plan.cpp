// Checks what csrc/gpu/launch_plan.cpp makes of many sizes, launch shapes and regions, as kernels use it
// (csrc/kernels/payload.cuh, packets.cuh). Prints the first case that is wrong and returns 1, or prints how
// many plans of each protocol it has checked.
#include "../../csrc/gpu/launch_plan.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/kernels/parameters.hpp"

namespace {

using spark::Protocol;
using spark::RegionSizes;
using spark::device::kVector;
using spark::device::kWarp;
using spark::device::LaunchPlan;
using spark::device::LaunchShape;

struct Case {
  uint64_t bytes;
  LaunchShape shape;
  RegionSizes sizes;
};

void expect(bool holds, const char* property, const Case& tried, const LaunchPlan& plan) {
  if (holds) return;
  const LaunchShape& shape = tried.shape;
  std::printf(
      "%s is wrong: %llu bytes, slots of %llu, packets up to %llu, shape %u %u %u %u %u -> %u blocks "
      "of %u threads, messages of %u bytes\n",
      property, static_cast<unsigned long long>(tried.bytes),
      static_cast<unsigned long long>(tried.sizes.slot_bytes),
      static_cast<unsigned long long>(tried.sizes.packet_bytes), shape.packet_threads, shape.payload_threads,
      shape.payload_blocks, shape.payload_bytes_per_block, shape.payload_message_bytes, plan.blocks,
      plan.threads, plan.message_bytes);
  std::exit(1);
}

// Every byte of the input is in one piece of one message, and within its slot.
void check_payload(const Case& tried, const LaunchPlan& plan) {
  const LaunchShape& shape = tried.shape;
  expect(plan.blocks >= 1 && plan.blocks <= shape.payload_blocks, "number of blocks", tried, plan);
  const uint32_t sides = spark::device::kPayloadSideThreads;
  expect(plan.threads > sides && (plan.threads - sides) % (2 * kWarp) == 0 &&
             (plan.threads - sides) / 2 <= shape.payload_threads,
         "number of threads", tried, plan);
  expect(plan.message_bytes > 0 && plan.message_bytes <= tried.sizes.slot_bytes, "size of messages", tried,
         plan);
  // Kernels divide as well: a remainder would be bytes of no block.
  expect(plan.message_bytes % plan.blocks == 0, "division into pieces", tried, plan);
  const uint64_t piece = plan.piece_bytes();
  const uint64_t largest = std::min<uint64_t>(
      tried.sizes.slot_bytes, std::max<uint64_t>(shape.payload_message_bytes, tried.bytes / 16));
  expect(plan.message_bytes <= largest, "size of messages against the shape's", tried, plan);
  expect(piece % (largest < spark::kLine ? kVector : spark::kLine) == 0, "alignment of pieces", tried, plan);
  const uint64_t messages = (tried.bytes + plan.message_bytes - 1) / plan.message_bytes;
  uint64_t next = 0;
  for (uint64_t message = 0; message < messages; ++message) {
    for (uint64_t block = 0; block < plan.blocks; ++block) {
      const uint64_t from = message * plan.message_bytes + block * piece;
      if (from >= tried.bytes) continue;  // an empty piece of the last message
      const uint64_t length = std::min(piece, tried.bytes - from);
      expect(from == next, "start of a piece", tried, plan);
      expect(block * piece + spark::round_up(length, kVector) <= tried.sizes.slot_bytes, "end of a piece",
             tried, plan);
      next = from + length;
    }
  }
  expect(next == tried.bytes, "end of the last piece", tried, plan);
}

// Threads take packets by turns, so they all are taken: none of the grid is without any, beyond a warp's
// rest.
void check_packets(const Case& tried, const LaunchPlan& plan) {
  const uint64_t packets = spark::wide_packet_count(tried.bytes);
  expect(plan.blocks >= 1 && plan.blocks <= spark::kMaxPieces, "number of blocks", tried, plan);
  const uint32_t sides = spark::device::kPacketsSideThreads;
  expect(plan.threads > sides, "number of threads", tried, plan);
  const uint64_t movers = plan.threads - sides;
  expect(movers % kWarp == 0 && movers <= tried.shape.packet_threads, "number of threads", tried, plan);
  expect((plan.blocks - 1) * movers < packets, "a block without packets", tried, plan);
  expect(plan.blocks * movers >= packets || plan.blocks == spark::kMaxPieces, "threads with several packets",
         tried, plan);
  expect(plan.message_bytes == 0, "size of messages", tried, plan);
}

// A GPU of another kind: fewer threads, another start of kernels. Its rank must cut alike.
void check_peer(const Case& tried, const LaunchPlan& mine) {
  Case peer = tried;
  peer.shape.packet_threads = peer.shape.packet_threads == 32 ? 544 : 32;
  peer.shape.payload_threads = peer.shape.payload_threads == 32 ? 256 : 32;
  peer.shape.dependent_launch = !peer.shape.dependent_launch;
  const LaunchPlan theirs = spark::device::plan(peer.bytes, peer.shape, peer.sizes);
  expect(theirs.protocol == mine.protocol, "the peer's protocol", peer, theirs);
  if (mine.protocol == Protocol::kPackets) return;  // any thread may send any packet
  expect(theirs.blocks == mine.blocks && theirs.message_bytes == mine.message_bytes, "the peer's cut", peer,
         theirs);
}

}  // namespace

int main() {
  // Equal on every run, so that a failure can be repeated.
  std::mt19937_64 random(17);
  auto between = [&](uint64_t lowest, uint64_t highest) {
    return std::uniform_int_distribution<uint64_t>(lowest, highest)(random);
  };
  auto scaled = [&](uint64_t highest) {  // as many small values as large ones
    uint64_t bits = 0;
    while (bits < 63 && (1ull << (bits + 1)) <= highest) ++bits;
    return std::min(highest, between(1, 1ull << between(0, bits)));
  };
  uint64_t packets = 0, payloads = 0;
  for (int round = 0; round < 20'000; ++round) {
    Case tried{};
    tried.sizes.slot_bytes = 64 * between(1, scaled(1 << 15));
    tried.sizes.packet_bytes = between(0, std::min<uint64_t>(tried.sizes.slot_bytes, 1 << 18));
    tried.sizes.slots = 8;
    tried.shape = {
        static_cast<uint32_t>(32 * between(1, 17)),           static_cast<uint32_t>(32 * between(1, 8)),
        static_cast<uint32_t>(between(1, spark::kMaxPieces)), static_cast<uint32_t>(16 * scaled(1 << 16)),
        static_cast<uint32_t>(1024 + 16 * scaled(1 << 20)),   true};
    // A size on either side of every bound, and some anywhere.
    std::vector<uint64_t> sizes = {1, 2, 15, 16, 17, tried.sizes.packet_bytes, tried.sizes.packet_bytes + 1};
    for (uint64_t bound : {tried.sizes.slot_bytes, uint64_t{tried.shape.payload_message_bytes},
                           16 * tried.sizes.slot_bytes, uint64_t{tried.shape.payload_bytes_per_block}}) {
      sizes.insert(sizes.end(), {bound - 1, bound, bound + 1});
    }
    sizes.push_back(scaled(64 << 20));
    for (uint64_t bytes : sizes) {
      // Whatever the slots, some thousand pieces are enough to see a gap.
      if (bytes == 0 || bytes / tried.sizes.slot_bytes > 100) continue;
      tried.bytes = bytes;
      const LaunchPlan plan = spark::device::plan(bytes, tried.shape, tried.sizes);
      expect((plan.protocol == Protocol::kPackets) == (bytes <= tried.sizes.packet_bytes), "protocol", tried,
             plan);
      if (plan.protocol == Protocol::kPackets) {
        check_packets(tried, plan);
        ++packets;
      } else {
        check_payload(tried, plan);
        ++payloads;
      }
      check_peer(tried, plan);
    }
  }
  std::printf("%llu %llu\n", static_cast<unsigned long long>(packets),
              static_cast<unsigned long long>(payloads));
}
