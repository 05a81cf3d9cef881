#include "kernel_image.hpp"

#include <algorithm>
#include <limits>

namespace spark::device {

Kernels::Kernels(const std::string& image) {
  const Driver& driver = Driver::get();
  driver.check(driver.load_library(&library_, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               "load this project's kernels; they are built for compute capability 8.0 and later");
  struct Entry {
    Kind kind;
    DType dtype;
    const char* suffix;
  };
  const Entry entries[] = {{Kind::kAllReduce, DType::kFloat32, "_float32"},
                           {Kind::kAllReduce, DType::kFloat16, "_float16"},
                           {Kind::kAllReduce, DType::kBFloat16, "_bfloat16"},
                           {Kind::kAllGather, DType::kBytes, ""}};
  try {
    for (Protocol protocol : {Protocol::kPackets, Protocol::kPayload}) {
      for (const Entry& entry : entries) {
        std::string name = entry.kind == Kind::kAllReduce ? "all_reduce" : "all_gather";
        name += protocol == Protocol::kPackets ? "_packets" : "_payload";
        name += entry.suffix;
        Kernel kernel = nullptr;
        driver.check(driver.find_kernel(&kernel, library_, name.c_str()), "find the kernel " + name);
        // Loads it now. Left to the first launch, that would wait for all that runs on the GPU, perhaps a
        // kernel that waits for this one, and would end a capture.
        driver.check(driver.load_kernel(&functions_[index(protocol, entry.kind, entry.dtype)], kernel),
                     "load the kernel " + name);
      }
    }
  } catch (...) {
    driver.unload_library(library_);
    throw;
  }
}

Kernels::~Kernels() {
  Driver::get().unload_library(library_);
}

Function Kernels::get(Protocol protocol, Kind kind, DType dtype) const {
  return functions_[index(protocol, kind, dtype)];
}

uint32_t Kernels::payload_blocks_at_once(uint32_t threads) const {
  const Driver& driver = Driver::get();
  int fewest = std::numeric_limits<int>::max();
  for (int payload = kDTypes; payload < 2 * kDTypes; ++payload) {
    int blocks = 0;
    driver.check(driver.blocks_per_multiprocessor(&blocks, functions_[payload], static_cast<int>(threads), 0),
                 "tell how many blocks fit");
    fewest = std::min(fewest, blocks);
  }
  return static_cast<uint32_t>(fewest * multiprocessors());
}

}  // namespace spark::device
