// A thread that sleeps until the peer's process ends, for ranks whose waits cannot check that
// themselves: those of kernels.
#pragma once

#include <functional>
#include <thread>

#include "../support/shared_memory.hpp"
#include "peer.hpp"

namespace spark {

class PeerWatch {
 public:
  // Calls `gone` once, from its own thread, when the process of `peer` has ended. Where this machine cannot
  // tell, never. Throws CollectiveError if the kernel has no descriptor left. `peer` must outlive it.
  PeerWatch(const Peer& peer, std::function<void()> gone);
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

 private:
  FileDescriptor stop_;  // an eventfd: readable once this object goes
  std::thread thread_;
};

}  // namespace spark
