// Collectives on CPU memory: two ranks exchange whole inputs, and each reduces or concatenates for itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "../proxy/doorbell.hpp"
#include "../rank/rank.hpp"
#include "../region/operation.hpp"

namespace spark {

class CpuRank final : public Rank {
 public:
  // Makes this rank's region. Throws UsageError for impossible options.
  explicit CpuRank(const Options& options);
  ~CpuRank() override { close(); }

  // out = sum over ranks of `elements` numbers. Any alignment; `out` may be `in`.
  void all_reduce(const void* in, void* out, uint64_t elements, DType dtype);

  // `in` is [outer, inner_bytes], `out` is [outer, ranks, inner_bytes]: concatenation along any dimension.
  void all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes);

  CollectiveCounters counters() const override;

 private:
  class CallGuard;
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

  void clear_if_due(uint32_t sequence);
  void check_tag(const Operation& operation, uint32_t sequence, uint32_t tag) const;
  [[noreturn]] void give_up(const Operation& operation, uint32_t sequence, bool peer_gone) const;

  void prepare() override { peer_region_ = endpoint_.theirs(); }
  std::unique_ptr<MessageSource> make_source() override;
  void wait_until_idle() override;

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

  const Options& options_;
  Region mine_;
  const Region* peer_region_ = nullptr;   // loopback only
  Doorbell* doorbell_ = nullptr;          // of the proxy, if there is one
  std::unique_ptr<std::byte[]> scratch_;  // a packet message's data, unpacked
  uint32_t received_ = 0;                 // last sequence seen from the peer
  std::atomic<uint32_t> sequence_;
  std::atomic<bool> in_use_{false};
  Counters counters_;
  // Set while an operation runs that is recorded. Not a local variable, so that one that is not costs
  // nothing.
  OperationRecord* recorded_ = nullptr;
  OperationRecord record_;
};

}  // namespace spark
