// Sums of pairs, as csrc/cpu/reduce.cpp computes them: in float32, rounded to nearest even, one NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace spark::device {

struct Float32 {
  static constexpr int kBytes = 4;
  __device__ static uint32_t add(uint32_t a, uint32_t b) {
    float sum = __uint_as_float(a) + __uint_as_float(b);
    return sum == sum ? __float_as_uint(sum) : 0x7fc00000u;
  }
};

struct BFloat16 {
  static constexpr int kBytes = 2;
  __device__ static uint32_t add(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(half(a, b)) | static_cast<uint32_t>(half(a >> 16, b >> 16)) << 16;
  }
  __device__ static uint16_t half(uint32_t a, uint32_t b) {
    float sum = __uint_as_float(a << 16) + __uint_as_float(b << 16);
    return sum == sum ? __bfloat16_as_ushort(__float2bfloat16_rn(sum)) : uint16_t{0x7fc0};
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  __device__ static uint32_t add(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(half(a, b)) | static_cast<uint32_t>(half(a >> 16, b >> 16)) << 16;
  }
  __device__ static uint16_t half(uint32_t a, uint32_t b) {
    float sum = __half2float(__ushort_as_half(static_cast<uint16_t>(a))) +
                __half2float(__ushort_as_half(static_cast<uint16_t>(b)));
    return sum == sum ? __half_as_ushort(__float2half_rn(sum)) : uint16_t{0x7e00};
  }
};

}  // namespace spark::device
