// How a CPU copies packets into the peer's memory, in a NIC's place.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace spark {

// Copies the 8-byte words [1, words) and leaves the first one, which the caller stores when all are to be
// seen. Relaxed: each half of a packet carries its own flag, and the reader trusts no other order.
//
// `whole_lines`: a whole cache line at a time and past the caches, as a NIC writes them, for a GPU that polls
// them; a core that polls them finds them sooner in a cache. The slots begin on a line.
void copy_all_but_first(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t words,
                        bool whole_lines);

}  // namespace spark
