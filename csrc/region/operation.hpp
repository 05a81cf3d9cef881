// The operation and its tag, by which two ranks check that they call the same one.
#pragma once

#include <cstdint>
#include <string>

#include "host_device.hpp"

namespace spark {

enum class Kind : uint32_t { kAllReduce = 1, kAllGather = 2 };

enum class DType : uint32_t { kBytes = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

SPARK_HOST_DEVICE constexpr uint32_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kBytes:
      return 1;
  }
  return 1;
}

// A whole operation, packed into the 32 bits that travel with every message: kind in 2 bits, dtype in 3, the
// number of elements modulo 2^27 in the rest. It is compared on arrival, so that ranks that call
// different operations get an error instead of a wrong sum.
struct Operation {
  Kind kind;
  DType dtype;
  uint64_t elements;

  SPARK_HOST_DEVICE constexpr uint32_t tag() const {
    return static_cast<uint32_t>(kind) << 30 | static_cast<uint32_t>(dtype) << 27 |
           static_cast<uint32_t>(elements & kElementMask);
  }

  static constexpr Operation from_tag(uint32_t tag) {
    return {static_cast<Kind>(tag >> 30), static_cast<DType>(tag >> 27 & 7u), tag & kElementMask};
  }

  // To stand behind "an": "all_reduce of 8 float32".
  std::string describe() const {
    const char* kinds[] = {"unknown collective", "all_reduce", "all_gather", "unknown collective"};
    const char* dtypes[] = {"bytes", "float32", "float16", "bfloat16"};
    uint32_t type = static_cast<uint32_t>(dtype);
    return std::string(kinds[static_cast<uint32_t>(kind) & 3u]) + " of " + std::to_string(elements) + " " +
           (type < 4 ? dtypes[type] : "unknown elements");
  }

  static constexpr uint32_t kElementMask = (1u << 27) - 1;
};

}  // namespace spark
