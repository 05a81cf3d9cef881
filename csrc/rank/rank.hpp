// Base of a rank on a CPU (cpu/cpu_rank.hpp) and one on a GPU (gpu/gpu_rank.hpp): everything but the
// collectives.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../proxy/proxy_thread.hpp"
#include "endpoint.hpp"

namespace spark {

// Counters of a rank's collectives and messages since it was made.
struct CollectiveCounters {
  uint64_t all_reduces = 0;
  uint64_t all_reduce_bytes = 0;
  uint64_t all_gathers = 0;
  uint64_t all_gather_bytes = 0;
  uint64_t packet_messages = 0;
  uint64_t payload_messages = 0;
  uint64_t chunked_operations = 0;
  double wait_seconds = 0;
  uint32_t last_sequence = 0;
};

// A collective on CPU memory. Times are of the steady clock; 0 where there is none.
struct OperationRecord {
  Operation operation{};
  uint64_t bytes = 0;
  uint32_t sequence = 0;  // of its first message
  uint32_t messages = 0;
  bool packets = false;  // the LL protocol
  int64_t start_ns = 0;
  int64_t sent_ns = 0;     // its first messages, as many as may be in flight, were staged or stored
  int64_t wait_ns = 0;     // when it first found that the peer's message was not there yet
  int64_t arrived_ns = 0;  // the peer's last message was there
  int64_t end_ns = 0;
  int64_t waited_ns = 0;  // in all
};

// What a rank did while it was recorded.
struct RankRecords {
  std::vector<OperationRecord> operations;  // on a GPU none: kernels run without the host
  std::vector<PostRecord> posts;            // without a proxy none
  uint64_t lost = 0;                        // records that found no room
};

class Rank {
 public:
  virtual ~Rank();
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  // Connecting to a peer on this machine: exchange addresses, then `connect`. To a peer on another machine:
  // `open_link`, exchange what it returns, `connect_link`, and `start` once both ranks have called it. See
  // Endpoint.
  Address address() const { return endpoint_.address(); }
  void connect(const Address& peer, const std::string& description);
  // Thread sanitizers can follow one rank's writes to the other's reads only in one mapping.
  void connect_in_process(const Rank& peer);
  std::string open_link(const verbs::LinkOptions& options, const std::vector<verbs::RailAddress>& rails) {
    return endpoint_.open_link(options, rails);
  }
  void connect_link(const std::string& peer_offer, const std::string& description);
  // Starts the proxy. From here on collectives are allowed. Throws UsageError if it has been called before.
  void start();

  // Null if the peer is on this machine.
  verbs::Link* link() const { return endpoint_.link(); }
  // The path of messages, in words: "over loopback, direct".
  std::string path() const { return endpoint_.path(); }

  // Ends every wait of both ranks with `reason`. From any thread; in a fork it has no effect.
  void abort(const std::string& reason) { endpoint_.abort(reason); }
  // Ends this rank's waits, and delivers what was sent; no collective is allowed afterwards. From any thread,
  // also while another one waits.
  void close();
  bool closed() const { return endpoint_.closed(); }
  // Why every collective fails; empty if none has failed.
  std::string poison() const { return endpoint_.poison(); }

  virtual CollectiveCounters counters() const = 0;
  // Null without a proxy.
  const ProxyCounters* proxy_counters() const { return source_ ? &source_->counters() : nullptr; }
  // Ends a rest of the proxy: collectives are about to be launched. From any thread, once `start` was called.
  void wake_proxy() {
    if (source_) source_->wake();
  }
  // Records collectives and posted messages, up to `capacity` of each, until `stop_recording`, which returns
  // them. From any thread, one at a time, once `start` was called.
  void start_recording(size_t capacity);
  RankRecords stop_recording();
  // Test hook: while held, the proxy posts nothing, as if it had not been scheduled.
  void hold_proxy(bool held) {
    if (proxy_) proxy_->hold(held);
  }

 protected:
  // Makes this rank's region, as Endpoint does. The destructor of a derived class must call `close`, which
  // uses the functions below.
  explicit Rank(const Options& options, std::shared_ptr<std::byte> memory = nullptr)
      : endpoint_(options, std::move(memory)) {}

  // After the endpoint has connected: prepares this rank's memory, and what else may fail, before the peer is
  // told that this rank is ready.
  virtual void prepare() {}
  // Where the proxy finds this rank's messages; called once, if there is a proxy.
  virtual std::unique_ptr<MessageSource> make_source() = 0;
  // Waits, while closing, until no collective uses this rank's memory or its proxy any more.
  virtual void wait_until_idle() = 0;

  Endpoint endpoint_;
  Recording<OperationRecord> operations_;

 private:
  bool started_ = false;
  std::unique_ptr<MessageSource> source_;
  std::unique_ptr<ProxyThread> proxy_;
};

}  // namespace spark
