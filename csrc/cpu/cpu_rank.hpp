// Collectives on CPU memory: two ranks exchange whole inputs, and each reduces or concatenates for itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "../proxy/doorbell.hpp"
#include "../proxy/proxy_thread.hpp"
#include "../rank/endpoint.hpp"
#include "../region/operation.hpp"

namespace spark {

struct KindCounters {
  std::atomic<uint64_t> operations{0};
  std::atomic<uint64_t> bytes{0};
};

struct Counters {
  KindCounters all_reduce;
  KindCounters all_gather;
  std::atomic<uint64_t> packet_messages{0};
  std::atomic<uint64_t> payload_messages{0};
  std::atomic<uint64_t> chunked_operations{0};
  std::atomic<uint64_t> wait_ns{0};
};

class Runtime {
 public:
  // Makes this rank's region. Throws UsageError for impossible options.
  explicit Runtime(const Options& options);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  Address address() const { return endpoint_.address(); }
  // See Endpoint.
  void connect(const Address& peer, const std::string& description);
  std::string open_link(const verbs::LinkOptions& options, const std::vector<verbs::RailAddress>& rails) {
    return endpoint_.open_link(options, rails);
  }
  void connect_link(const std::string& peer_offer, const std::string& description);
  // After `connect_link`, once both ranks have come so far: from here on messages go.
  void begin() { start(); }
  verbs::Link* link() const { return endpoint_.link(); }
  std::string path() const { return endpoint_.path(); }

  // Thread sanitizers can follow one rank's writes to the other's reads only in one mapping.
  void connect_in_process(const Runtime& peer);

  // out = sum over ranks of `elements` numbers. Any alignment; `out` may be `in`.
  void all_reduce(const void* in, void* out, uint64_t elements, DType dtype);

  // `in` is [outer, inner_bytes], `out` is [outer, ranks, inner_bytes]: concatenation along any dimension.
  void all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes);

  // Ends every wait of both ranks with `reason`. From any thread.
  void abort(const std::string& reason) { endpoint_.abort(reason); }

  // Nothing is allowed afterwards. From any thread, also while another one waits: that wait ends.
  void close();

  bool closed() const { return endpoint_.closed(); }
  std::string poison() const { return endpoint_.poison(); }
  uint32_t last_sequence() const { return sequence_.load(std::memory_order_relaxed); }
  const Counters& counters() const { return counters_; }
  const ProxyCounters* proxy_counters() const { return doorbell_ ? &doorbell_->counters() : nullptr; }
  void hold_proxy(bool held);

 private:
  class Use;
  class Wait;

  void send(const Operation& operation, const std::byte* data, size_t bytes);
  void wait_for_send_slot(const Operation& operation, uint32_t sequence);
  // The peer's message under `sequence`, contiguous until the next call.
  const std::byte* receive(const Operation& operation, uint32_t sequence, size_t bytes);
  const std::byte* receive_packets(const Operation& operation, uint32_t sequence, size_t bytes);
  const std::byte* receive_payload(const Operation& operation, uint32_t sequence, size_t bytes);
  uint32_t stripes_of(size_t bytes) const;
  template <typename Consume>
  void exchange(const Operation& operation, const std::byte* in, uint64_t bytes, Consume consume);

  void clear_now_and_then(uint32_t sequence);
  void start();
  void check_tag(const Operation& operation, uint32_t sequence, uint32_t tag) const;
  [[noreturn]] void give_up(const Operation& operation, uint32_t sequence, bool peer_gone) const;

  Endpoint endpoint_;
  const Options& options_;
  Region mine_;
  const Region* theirs_ = nullptr;  // in direct mode
  std::unique_ptr<Doorbell> doorbell_;
  std::unique_ptr<ProxyThread> proxy_;
  std::unique_ptr<std::byte[]> scratch_;  // a packet message's data, unpacked
  uint32_t received_ = 0;                 // last sequence seen from the peer
  std::atomic<uint32_t> sequence_;
  std::atomic<bool> in_use_{false};
  Counters counters_;
};

}  // namespace spark
