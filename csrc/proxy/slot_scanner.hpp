// The source of a GPU rank's proxy: it polls the send slots for what kernels have staged.
//
// Kernels ring no doorbell. For flagged packets that would take a release, which waits until everything
// before it has arrived in host memory (1.25 us on an H100, benchmarks/NOTES.md). The flags in the slots tell
// as much.
#pragma once

#include <atomic>
#include <cstdint>

#include "../region/region.hpp"
#include "../support/backoff.hpp"
#include "message_source.hpp"

namespace spark {

class SlotScanner final : public MessageSource {
 public:
  // For the sequence numbers after `last`, in their order, in the slots of `region`. A message's packets are
  // posted in so many `parts`, if there are enough: the first while the rest is still being scanned, and over
  // as many rails. The thread rests between turns once nothing was staged, and `wake` was not called,
  // for `awake`.
  SlotScanner(Region region, uint32_t last, uint32_t parts,
              std::chrono::nanoseconds awake = std::chrono::seconds(1))
      : region_(region), last_(last), parts_(parts), awake_(awake) {}

  bool post_staged(Transport& transport) override;
  bool end_turn(bool busy, bool under_way) override;
  void rest() override;
  // Graphs are replayed, and kernels launched, without this thread's knowledge: their caller calls this
  // first, so that their first message does not wait for the end of a rest.
  void wake() override;

 private:
  bool post_packets(Transport& transport, uint32_t sequence);
  bool post_pieces(Transport& transport, uint32_t sequence);
  // Message `sequence` is complete: the next one is scanned for.
  void finish(uint32_t sequence);

  Region region_;
  uint32_t last_;   // sequence number of the last complete message
  uint32_t parts_;  // of a message's packets
  std::chrono::nanoseconds awake_;
  size_t staged_packets_ = 0;   // of the next message
  size_t posted_packets_ = 0;   // the same, a whole number of parts
  uint32_t pieces_ = 0;         // of the next message's payload; 0: not known yet
  uint64_t posted_pieces_ = 0;  // of the next message's payload, one bit each

  Clock::time_point idle_since_{};
  uint32_t idle_turns_ = 0;
  bool sleeps_ = false;  // between turns

  // Calls of `wake`, how many of them `rest` has seen, and whether the thread sleeps.
  std::atomic<uint32_t> calls_{0};
  uint32_t seen_calls_ = 0;
  std::atomic<uint32_t> asleep_{0};
};

}  // namespace spark
