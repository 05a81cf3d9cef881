// Kernels that measure a machine: what a round trip between its GPU and a CPU takes, and a kernel after
// another one.
#pragma once

#include "progress.cuh"
#include "system_scope.cuh"

namespace spark::device {

// One thread: stores 1, 2, ... `count` into `ping`, and each time waits until a thread of the CPU has stored
// the same into `pong`. Ends early, with `count` + 1 in `ping`, if that takes longer than `timeout_ns` in
// all.
__device__ inline void ping_cpu(uint64_t* ping, const uint64_t* pong, uint32_t count, uint64_t timeout_ns) {
  const uint64_t begin = now();
  for (uint64_t turn = 1; turn <= count; ++turn) {
    store_release(ping, turn);
    while (load_acquire(pong) != turn) {
      if (now() - begin > timeout_ns) {
        store_release(ping, uint64_t{count} + 1);
        return;
      }
    }
  }
}

// What every kernel of the runtime has to do around its work.
__device__ inline void do_nothing() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

}  // namespace spark::device
