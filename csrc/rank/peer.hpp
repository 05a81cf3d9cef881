// The other rank: its name, and whether its process still runs.
#pragma once

#include <string>

#include "../support/shared_memory.hpp"

namespace spark {

// What to say of a peer whose process is gone.
constexpr const char* kProcessEnded = "that process has ended; its log says why";

class Peer {
 public:
  Peer() = default;
  // On this machine.
  Peer(int rank, pid_t process, const std::string& description);
  // On another machine, whose processes cannot be watched from here.
  Peer(int rank, const std::string& description);

  // False once the process has ended. True also where this machine cannot tell.
  bool alive() const;
  // How it is, to end a sentence with: ", though its process is alive"; empty where this machine cannot tell.
  std::string state() const;
  // A descriptor that is readable once the process has ended; negative where this machine has none.
  int process() const { return process_.get(); }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  FileDescriptor process_;
};

}  // namespace spark
