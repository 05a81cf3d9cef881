#include "peer_watch.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <utility>

#include "../support/errors.hpp"
#include "../support/thread.hpp"

namespace spark {

PeerWatch::PeerWatch(const Peer& peer, std::function<void()> gone) : stop_(eventfd(0, EFD_CLOEXEC)) {
  if (peer.process() < 0) return;
  if (stop_.get() < 0) throw CollectiveError("this process has no file descriptor left; raise ulimit -n");
  thread_ =
      start_thread("spark-peer", [process = peer.process(), stop = stop_.get(), gone = std::move(gone)] {
        pollfd events[] = {{process, POLLIN, 0}, {stop, POLLIN, 0}};
        // Without a bound: either the peer ends, or this object does. A signal may interrupt it.
        while (poll(events, 2, -1) < 0) {
        }
        if (events[1].revents == 0) gone();
      });
}

PeerWatch::~PeerWatch() {
  if (!thread_.joinable()) return;
  uint64_t one = 1;
  // It cannot fail: the counter is far from its end.
  [[maybe_unused]] ssize_t written = write(stop_.get(), &one, sizeof one);
  thread_.join();
}

}  // namespace spark
