// The order in which a CPU loads what a device, a GPU or a NIC, has stored in host memory.
#pragma once

#include <atomic>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace spark {

// Orders all loads before it ahead of all accesses after it, also for what devices have stored: an acquire
// fence. On aarch64 that of C++ is a barrier for the inner shareable domain, in which a device need not be;
// as Linux' dma_rmb() it must be one for the outer shareable domain.
inline void acquire_from_device() {
#if defined(__aarch64__)
  asm volatile("dmb oshld" ::: "memory");
#elif defined(__SANITIZE_THREAD__) && defined(__x86_64__)
  std::atomic_signal_fence(std::memory_order_acquire);  // the processor keeps the order of loads
#else
  std::atomic_thread_fence(std::memory_order_acquire);
#endif
}

// Declares to ThreadSanitizer, which does not support fences, that a relaxed load of `word` before the last
// `acquire_from_device` has seen what was stored with release. So it checks the order that ships. No code
// without it.
template <typename Word>
void acquired([[maybe_unused]] const std::atomic<Word>& word) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<std::atomic<Word>*>(&word));
#endif
}

// Loads a word that a device, or another processor, stores after the data that it announces.
template <typename Word>
Word load_from_device(const std::atomic<Word>& word) {
  Word value = word.load(std::memory_order_relaxed);
  acquire_from_device();
  acquired(word);
  return value;
}

}  // namespace spark
