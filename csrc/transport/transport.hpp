// How staged messages reach the peer's region.
//
// A transport is driven by the proxy thread alone. The verbs transport will post RDMA writes here; loopback
// copies.
#pragma once

#include <cstdint>

#include "../region.hpp"

namespace spark {

class Transport {
 public:
  virtual ~Transport() = default;

  // Starts moving the message, or the piece of one, staged under `sequence` in this rank's send slots. They
  // arrive in the order of their posting; within a piece of payload, the flag arrives after the payload.
  virtual void post(uint32_t sequence, const SendDescriptor& descriptor) = 0;

  // Advances what was posted. Returns true while something is still under way.
  virtual bool progress() = 0;
};

}  // namespace spark
