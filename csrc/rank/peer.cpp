#include "peer.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

namespace spark {

Peer::Peer(int rank, const std::string& description)
    : name_("rank " + std::to_string(rank) + (description.empty() ? "" : " on " + description)) {}

Peer::Peer(int rank, pid_t process, const std::string& description)
    : name_(Peer(rank, description).name_),
      // A descriptor of the process, not its number: numbers are used again.
      process_(static_cast<int>(syscall(SYS_pidfd_open, process, 0))) {}

std::string Peer::state() const {
  if (process_.get() < 0) return "";
  return std::string(", though its process is ") + (alive() ? "alive" : "gone");
}

bool Peer::alive() const {
  if (process_.get() < 0) return true;
  pollfd ended{process_.get(), POLLIN, 0};
  return poll(&ended, 1, 0) <= 0;
}

}  // namespace spark
