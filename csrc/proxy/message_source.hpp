// Where a proxy's thread finds the messages that its rank has staged in the send slots.
#pragma once

#include <atomic>
#include <cstdint>

#include "../support/backoff.hpp"
#include "../support/recording.hpp"
#include "../transport/transport.hpp"

namespace spark {

struct ProxyCounters {
  std::atomic<uint64_t> posts{0};
  std::atomic<uint64_t> coalesced{0};  // posts beyond the first of one turn
};

// A message, or a part of one, that the proxy has given to the transport. It leaves with the next `flush`,
// which follows in the same turn.
struct PostRecord {
  uint32_t sequence;
  uint32_t piece;
  uint64_t bytes;  // with the flags of packets
  bool packets;
  int64_t time_ns;  // of the steady clock
};

// The proxy's thread calls everything here but `wake`, `counters` and `recording`, which any thread may call.
class MessageSource {
 public:
  virtual ~MessageSource() = default;

  // Posts every message, or piece of one, that is staged and has not been posted. False if there was none.
  virtual bool post_staged(Transport& transport) = 0;

  // Ends a turn of the thread. `busy`: something was posted in this turn. `under_way`: the transport must be
  // called again soon. True if there has been nothing to do for so long that the caller has time to check the
  // connection, and must then call `rest`.
  virtual bool end_turn(bool busy, bool under_way) = 0;

  // Sleeps if `end_turn` found that the thread may.
  virtual void rest() = 0;

  // Ends `rest`, or the next one if the thread does not rest now, soon.
  virtual void wake() = 0;

  const ProxyCounters& counters() const { return counters_; }
  Recording<PostRecord>& recording() { return recording_; }

 protected:
  void post_part(Transport& transport, uint32_t sequence, const SendDescriptor& part) {
    if (recording_.on()) {
      recording_.add({sequence, part.piece, part.bytes, part.protocol == Protocol::kPackets,
                      nanoseconds_of(Clock::now())});
    }
    transport.post(sequence, part);
  }

  void count(uint32_t posts) {
    counters_.posts.fetch_add(posts, std::memory_order_relaxed);
    counters_.coalesced.fetch_add(posts - 1, std::memory_order_relaxed);
  }

 private:
  ProxyCounters counters_;
  Recording<PostRecord> recording_;
};

}  // namespace spark
