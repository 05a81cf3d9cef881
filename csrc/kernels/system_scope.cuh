// Accesses to memory that the peer, the NIC or a CPU thread shares with this kernel.
//
// System scope is not optional: on GB10 the L2 is not coherent with what the NIC writes, and `volatile`,
// `.cv` and plain loads after a fence have returned stale data there, where `ld.relaxed.sys` and
// `ld.acquire.sys` do not.
#pragma once

#include <cstdint>

namespace spark::device {

// Two 8-byte halves in one access. Each half is whole; nothing is assumed of the pair.
struct alignas(16) Halves {
  uint64_t first;
  uint64_t second;
};

__device__ inline Halves load_relaxed(const Halves* from) {
  Halves value;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(value.first), "=l"(value.second)
               : "l"(from)
               : "memory");
  return value;
}

__device__ inline void store_relaxed(Halves* to, Halves value) {
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(value.first), "l"(value.second)
               : "memory");
}

// The same as one access, whose 16 bytes are whole: two halves and a flag that belong together.
__device__ inline Halves load_relaxed_whole(const Halves* from) {
  Halves value;
  asm volatile(
      "{\n\t.reg .b128 whole;\n\tld.relaxed.sys.global.b128 whole, [%2];\n\tmov.b128 {%0, %1}, whole;\n\t}"
      : "=l"(value.first), "=l"(value.second)
      : "l"(from)
      : "memory");
  return value;
}

__device__ inline void store_relaxed_whole(Halves* to, Halves value) {
  asm volatile(
      "{\n\t.reg .b128 whole;\n\tmov.b128 whole, {%1, %2};\n\tst.relaxed.sys.global.b128 [%0], whole;\n\t}" ::
          "l"(to),
      "l"(value.first), "l"(value.second)
      : "memory");
}

__device__ inline uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ inline void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ inline void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ inline void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Nanoseconds of a clock that all multiprocessors share.
__device__ inline uint64_t now() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

}  // namespace spark::device
