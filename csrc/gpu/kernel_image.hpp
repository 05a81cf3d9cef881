// The compiled kernels (csrc/kernels/collectives.cu), loaded from their image and found by what they do.
#pragma once

#include <string>

#include "../region/operation.hpp"
#include "../region/region_layout.hpp"
#include "driver.hpp"

namespace spark::device {

class Kernels {
 public:
  // `image` is a fatbin. Throws CollectiveError if no part of it runs on this GPU.
  explicit Kernels(const std::string& image);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  Function get(Protocol protocol, Kind kind, DType dtype) const;

  // Blocks of `threads` threads that the GPU in use runs at once, of whichever payload kernel has the fewest.
  // Throws CollectiveError.
  uint32_t payload_blocks_at_once(uint32_t threads) const;

 private:
  static constexpr int kDTypes = 4;

  static int index(Protocol protocol, Kind kind, DType dtype) {
    int type = kind == Kind::kAllGather ? 0 : static_cast<int>(dtype);
    return (protocol == Protocol::kPackets ? 0 : kDTypes) + type;
  }

  Library library_ = nullptr;
  Function functions_[2 * kDTypes] = {};
};

}  // namespace spark::device
