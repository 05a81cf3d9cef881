#include "reduce.hpp"

#include <cstdint>
#include <cstring>

namespace spark {
namespace {

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);  // inputs may be misaligned
  return value;
}

template <typename To, typename From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Number formats: `widen` to float is exact, `narrow` rounds to nearest even. Every NaN becomes the same
// quiet one: which of two NaNs an addition keeps depends on how the compiler arranged its loop, and both
// ranks must get the same bits.
struct Float32 {
  using Storage = uint32_t;
  static float widen(Storage bits) { return bit_cast<float>(bits); }
  static Storage narrow(float value) { return value == value ? bit_cast<uint32_t>(value) : 0x7fc00000u; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float widen(Storage bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static Storage narrow(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<Storage>(is_nan ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;

  static float widen(Storage half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | magnitude << 13);  // infinity, NaN
    // Scaling by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
    float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
  }

  static Storage narrow(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7e00u;
    if (magnitude >= 0x477ff000u) return static_cast<Storage>(sign | 0x7c00u);  // rounds beyond 65504
    if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 lets the float adder round to a multiple of 2^-24, to nearest even.
      float aligned = bit_cast<float>(magnitude) + 0.5f;
      return static_cast<Storage>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<Storage>(sign | ((rounded - 0x38000000u) >> 13));
  }
};

template <typename Format>
void reduce_as(const std::byte* first, const std::byte* second, std::byte* out, size_t elements) {
  using Storage = typename Format::Storage;
  for (size_t i = 0; i < elements; ++i) {
    size_t at = i * sizeof(Storage);
    float sum = Format::widen(load<Storage>(first + at)) + Format::widen(load<Storage>(second + at));
    Storage narrowed = Format::narrow(sum);
    std::memcpy(out + at, &narrowed, sizeof narrowed);
  }
}

}  // namespace

void reduce(const void* first, const void* second, void* out, size_t elements, DType dtype) {
  const std::byte* a = static_cast<const std::byte*>(first);
  const std::byte* b = static_cast<const std::byte*>(second);
  std::byte* c = static_cast<std::byte*>(out);
  switch (dtype) {
    case DType::kFloat32:
      return reduce_as<Float32>(a, b, c, elements);
    case DType::kFloat16:
      return reduce_as<Float16>(a, b, c, elements);
    case DType::kBFloat16:
      return reduce_as<BFloat16>(a, b, c, elements);
    case DType::kBytes:
      break;  // refused by the runtime: bytes have no sum
  }
}

}  // namespace spark
