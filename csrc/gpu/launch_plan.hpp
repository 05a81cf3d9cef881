// How one collective is launched and cut into messages, by its size alone.
#pragma once

#include <cstdint>

#include "../region/region_layout.hpp"

namespace spark::device {

// Upper bounds of a launch, within the limits that vllm_spark.collective.LaunchShape sets: measured on the
// device, else a default (docs/decisions.md).
struct LaunchShape {
  uint32_t packet_threads = 288;             // threads of a block that move data
  uint32_t payload_threads = 256;            // the same, for each direction
  uint32_t payload_blocks = 32;              // up to kMaxPieces
  uint32_t payload_bytes_per_block = 4096;   // fewer blocks, rather than less than this for each
  uint32_t payload_message_bytes = 1 << 17;  // more is cut into several messages
  // Start a kernel while the one before it still runs; ignored below compute capability 9.0.
  bool dependent_launch = true;
};

// The grid of one launch. `blocks` of the payload protocol and `message_bytes` are part of what both ranks
// must do alike: block b of either rank handles byte b * piece_bytes() of every message.
struct LaunchPlan {
  Protocol protocol;
  uint32_t blocks;
  uint32_t threads;        // of a block, with those that move no data
  uint32_t message_bytes;  // payload only: of every message but the last; a multiple of the blocks' pieces

  uint32_t piece_bytes() const { return message_bytes / blocks; }
};

// The plan for an input of `bytes`, at least one. Depends on nothing else, and its cut not on the number of
// threads nor on `dependent_launch`: two ranks of equal sizes and an otherwise equal shape cut alike.
LaunchPlan plan(uint64_t bytes, const LaunchShape& shape, const RegionSizes& sizes);

}  // namespace spark::device
