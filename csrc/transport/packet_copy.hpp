// How a CPU copies packets into the peer's memory, in a NIC's place.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace spark {

// Copies the 8-byte words [kFirstWords, words) and leaves those before, the first packet, which the caller
// stores when all are to be seen, in ascending order. Relaxed: each packet carries its own flag, and the
// reader trusts no other order but that of a packet's halves: the flag of a wide one is in the second, which
// is stored later, or both at once.
//
// `whole_lines`: a whole cache line at a time and past the caches, as a NIC writes them, for a GPU that polls
// them; a core that polls them finds them sooner in a cache. The slots begin on a line.
constexpr size_t kFirstWords = 2;

void copy_all_but_first(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t words,
                        bool whole_lines);

}  // namespace spark
