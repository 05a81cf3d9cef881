// The collective runtime of one rank: two ranks exchange whole inputs, and each reduces or concatenates for
// itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "backoff.hpp"
#include "operation.hpp"
#include "peer.hpp"
#include "proxy.hpp"
#include "region.hpp"
#include "shared_memory.hpp"
#include "transport/loopback.hpp"

namespace spark {

constexpr int kWorldSize = 2;

struct Options {
  int rank = 0;
  RegionSizes sizes{1 << 20, 8 << 10, 8};
  uint32_t depth = 4;  // chunks in flight; half of `sizes.slots`
  bool proxied = false;
  WireModel wire;
  std::chrono::nanoseconds timeout{std::chrono::seconds(600)};
  uint32_t first_sequence = 1;
  uint64_t largest_message = 64ull << 20;  // bytes
  uint32_t clear_interval = 1u << 30;      // messages between two clearings of the slots; a power of two
  BackoffTimes backoff;
};

// Where a rank's region can be opened; exchanged out of band.
struct Address {
  pid_t process;
  int descriptor;
  uint64_t nonce[2];
};

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
  std::atomic<uint64_t> longest_wait_ns{0};
};

class Runtime {
 public:
  // Makes this rank's region. Throws UsageError for impossible options.
  explicit Runtime(const Options& options);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  Address address() const;
  // Opens the peer's region. Both ranks must have connected before either calls a collective.
  void connect(const Address& peer, const std::string& description);

  // As `connect`, for two ranks in one process. Both see the same mapping of each region, which is what
  // thread sanitizers need to follow one rank's writes to the other's reads. The peer must outlive this
  // rank's use.
  void connect_in_process(const Runtime& peer);

  // out = sum over ranks of `elements` numbers. Any alignment; `out` may be `in`.
  void all_reduce(const void* in, void* out, uint64_t elements, DType dtype);

  // `in` is [outer, inner_bytes], `out` is [outer, ranks, inner_bytes]: concatenation along any dimension.
  void all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes);

  // Ends every wait of both ranks with `reason`. From any thread.
  void abort(const std::string& reason);

  // Nothing is allowed afterwards. From any thread, also while another one waits: that wait ends.
  void close();

  bool closed() const { return closed_.load(std::memory_order_relaxed); }
  std::string poison() const;
  uint32_t last_sequence() const { return sequence_.load(std::memory_order_relaxed); }
  const Counters& counters() const { return counters_; }
  const ProxyCounters* proxy_counters() const { return proxy_ ? &proxy_->counters() : nullptr; }
  void hold_proxy(bool held);

 private:
  class Use;
  class Wait;

  uint32_t send(const Operation& operation, const std::byte* data, size_t bytes);
  // The peer's message under `sequence`, contiguous until the next call.
  const std::byte* receive(const Operation& operation, uint32_t sequence, size_t bytes);
  const std::byte* receive_packets(const Operation& operation, uint32_t sequence, size_t bytes);
  const std::byte* receive_payload(const Operation& operation, uint32_t sequence);
  template <typename Consume>
  void exchange(const Operation& operation, const std::byte* in, uint64_t bytes, Consume consume);

  void clear_now_and_then(uint32_t sequence);
  void attach(Region peer_region, Peer peer);
  void check_usable();
  bool aborted() const;
  void check_abort() const;
  void check_tag(const Operation& operation, uint32_t sequence, uint32_t tag) const;
  void write_abort(Region region, const std::string& reason);
  [[noreturn]] void timed_out(const Operation& operation, uint32_t sequence, bool peer_gone) const;
  void set_poison(const std::string& reason);

  Options options_;
  RegionLayout layout_;
  SharedMemory memory_;
  SharedMemory peer_memory_;
  std::unique_ptr<Region> mine_;
  std::unique_ptr<Region> theirs_;
  Peer peer_;
  std::unique_ptr<Proxy> proxy_;
  std::unique_ptr<std::byte[]> scratch_;  // a packet message's data, unpacked
  pid_t process_;
  uint32_t received_ = 0;  // last sequence seen from the peer
  std::atomic<uint32_t> sequence_;
  std::atomic<bool> in_use_{false};
  std::atomic<bool> closed_{false};
  std::atomic<const std::string*> poison_{nullptr};
  Counters counters_;
};

}  // namespace spark
