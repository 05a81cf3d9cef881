// How staged messages reach the peer's region.
//
// A transport is driven by the proxy's thread alone.
#pragma once

#include <cstdint>

#include "../region/region.hpp"

namespace spark {

class Transport {
 public:
  virtual ~Transport() = default;

  // Moves the message, or the part of one, staged under `sequence` in this rank's send slots, at the latest
  // from the next `flush` on. Within a piece of payload, the flag arrives after the payload. Of two messages
  // for one slot the later arrives later; of others nothing is assumed.
  virtual void post(uint32_t sequence, const SendDescriptor& descriptor) = 0;

  // Starts moving everything posted so far. Called after the posts of one turn: a device then needs one
  // doorbell for all of them.
  virtual void flush() {}

  // Advances what was posted. Returns true while something is under way that waits for this call or the next
  // one: the caller does not sleep then.
  virtual bool progress() = 0;

  // Checks and repairs the connection itself. Called whenever there is time, and at least every 100 ms.
  virtual void maintain() {}

  // Nothing more will be posted: announces that to the peer, after everything posted has arrived. Bounded.
  virtual void finish() {}
};

}  // namespace spark
