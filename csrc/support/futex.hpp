// A word that threads of this process, and of others that map it, wait for.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace spark {

// Sleeps until `futex_wake`, at most for `longest`; not at all if the word does not hold `expected`.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, const timespec& longest) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, expected, &longest, nullptr, 0);
}

// Wakes one thread that sleeps in `futex_wait`.
inline void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

}  // namespace spark
