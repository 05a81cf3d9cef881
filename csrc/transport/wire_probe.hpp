// Measures the wire itself: RDMA writes of any size between two machines, without regions, packets or a
// proxy.
//
// Both machines make a probe with the same options and rails, connect them, and then call the same
// measurements in the same order: one calls `ping` while the other one calls `answer`. During a `stream` the
// other machine does nothing.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../support/backoff.hpp"
#include "verbs/background_release.hpp"
#include "verbs/connection.hpp"

namespace spark::verbs {

struct ProbeOptions {
  uint64_t largest;                  // bytes of the largest message
  std::chrono::nanoseconds timeout;  // longest wait for one message, or for room for another
  PathOptions path_options;
  // Called ten times a second while something is measured; an exception of it ends the measurement.
  std::function<void()> attend;
};

class WireProbe {
 public:
  static constexpr uint32_t kMaxDepth = Connection::kMessages;

  // Opens every rail, and pins memory for a message each way on each. Throws CollectiveError.
  WireProbe(const ProbeOptions& options, const std::vector<RailAddress>& rails);
  ~WireProbe();
  WireProbe(const WireProbe&) = delete;
  WireProbe& operator=(const WireProbe&) = delete;

  // What the other machine's probe must know to connect.
  std::string offer() const;
  // Connects every rail to what the other one offered. Nothing may be measured before both have. Throws
  // CollectiveError.
  void connect(const std::string& peer_offer, const std::string& peer_name);

  // Sends `count` messages of `bytes`, each once the answer to the one before has come. Over several rails a
  // message is cut as the transport cuts a payload, and has come when its last part has. Returns half of each
  // round trip, in microseconds. Throws TimeoutError, or CollectiveError if a rail fails.
  std::vector<double> ping(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count);
  // The other side of `ping`.
  void answer(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count);
  // Sends `count` messages of `bytes`, by turns over all `rails`, with at most `depth` under way on each.
  // Returns seconds from the first to the last acknowledgement. Throws as `ping`.
  double stream(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count, uint32_t depth);

 private:
  class RailEnd;
  class Wait;
  struct Part {
    RailEnd* rail;
    uint64_t bytes;
  };

  std::vector<RailEnd*> select_rails(const std::vector<uint32_t>& rails, uint64_t bytes);
  std::vector<Part> split(const std::vector<uint32_t>& rails, uint64_t bytes);
  void send(const std::vector<Part>& parts);
  void receive(const std::vector<Part>& parts);
  // Calls `attend` if the last call was long enough ago.
  void attend_if_due(Clock::time_point now);
  // Waits until everything posted is acknowledged.
  void flush(const std::vector<RailEnd*>& rails);
  [[noreturn]] void time_out(const RailEnd& rail, const std::string& missing) const;

  ProbeOptions options_;
  std::string peer_name_;
  Clock::time_point next_attend_{};
  BackgroundRelease release_;
  std::vector<std::unique_ptr<RailEnd>> rails_;
};

}  // namespace spark::verbs
