// One rank's end of a pair: its region, the peer's, and whether the pair still works. Of a rank on a CPU or
// on a GPU (rank.hpp).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../region/operation.hpp"
#include "../region/region.hpp"
#include "../support/backoff.hpp"
#include "../support/errors.hpp"
#include "../support/shared_memory.hpp"
#include "../transport/link/link.hpp"
#include "../transport/loopback.hpp"
#include "../transport/modelled/modelled_link.hpp"
#include "peer.hpp"

namespace spark {

constexpr int kWorldSize = 2;

struct Options {
  int rank = 0;
  RegionSizes sizes{1 << 20, 8 << 10, 8};
  uint32_t depth = 4;       // chunks in flight; half of `sizes.slots`
  bool proxied = false;     // through a proxy, as always to another machine
  WireFigures wire;         // loopback, proxied: the modelled link; without rails there is none
  bool copy_lines = false;  // the same: packets go a whole cache line at a time, for a GPU that polls them
  uint32_t stripes = 1;     // pieces into which a CPU's larger messages are cut, for as many rails
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

class Endpoint {
 public:
  // Makes this rank's region: in `memory`, which is zeroed and has `region_bytes`, or, if that is null, in
  // shared memory, as a peer on this machine needs it. Throws UsageError for impossible options.
  explicit Endpoint(const Options& options, std::shared_ptr<std::byte> memory = nullptr);
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  // Throws UsageError for impossible options.
  static size_t region_bytes(const Options& options);

  Address address() const;
  // Opens the peer's region. Both ranks must have connected before either calls a collective.
  void connect(const Address& peer, const std::string& description);
  // As `connect`, for two ranks in one process that see the same mapping of each region. The peer must
  // outlive this rank's use.
  void connect_in_process(const Endpoint& peer);
  // In place of `connect`, for a peer on another machine: opens the rails, and returns what the peer must
  // know to connect to them. Throws CollectiveError.
  std::string open_link(const verbs::LinkOptions& options, const std::vector<verbs::RailAddress>& rails);
  void connect_link(const std::string& peer_offer, const std::string& description);
  // Last, when everything that collectives need exists: from here on they are allowed.
  void start();

  const Options& options() const { return options_; }
  const RegionLayout& layout() const { return layout_; }
  Region mine() const { return Region(memory(), options_.sizes); }
  // Where the payload of the peer's message `sequence` is once its flags have arrived: in this rank's receive
  // slot, or, over a modelled link, which copies none, in the peer's send slot. The peer writes there again
  // only after it has received a message that this rank sent later, as for a receive slot.
  std::byte* received_payload(uint32_t sequence) const {
    return modelled_ ? theirs_->send_payload(sequence) : mine().recv_payload(sequence);
  }
  // True if payloads are read from the peer's send slots.
  bool reads_send_slots() const { return modelled_ != nullptr; }
  // Null if the peer is on another machine.
  const Region* theirs() const { return theirs_.get(); }
  // How the proxy's messages get to the peer, once connected.
  Transport& transport() const { return *transport_; }
  // Null if the peer is on this machine and there is no modelled link to it.
  verbs::Link* link() const { return modelled_ ? &modelled_->link() : link_.get(); }
  // What messages take, in words: "over loopback, direct".
  std::string path() const;
  const Peer& peer() const { return peer_; }
  std::byte* memory() const { return memory_.get(); }
  bool shares_memory() const { return shared_.data() != nullptr; }
  std::byte* peer_memory() const { return theirs_base_; }
  bool owned_by_this_process() const;

  // Throws PoisonedError if `poison` was called.
  void check_poison() const;
  // Throws unless collectives may be called now.
  void check_usable();
  // Bytes of a collective's input. They throw UsageError for elements that have no sum, and over the limit.
  uint64_t all_reduce_bytes(uint64_t elements, DType dtype) const;
  uint64_t all_gather_bytes(uint64_t outer, uint64_t inner_bytes) const;

  // The ranks called different collectives: what this rank throws.
  MismatchError mismatch(uint32_t sequence, const Operation& mine, const Operation& theirs) const;
  // The peer's message did not arrive within the time-out: what this rank throws. `where` it waited, to stand
  // behind "in".
  TimeoutError timed_out(const std::string& where) const;
  // "rank 0 waited for rank 1 on spark-b in `where`".
  std::string wait_in(const std::string& where) const;

  // Ends every wait of both ranks with `reason`. From any thread; in a fork it has no effect.
  void abort(const std::string& reason);
  // Ends the peer's waits with `reason`, and none of this rank's.
  void end_peer_waits(const std::string& reason);
  bool aborted() const;
  // Ends this rank's waits with `reason`, as if the peer had said so.
  void end_waits(const std::string& reason);
  // Throws AbortedError with the reason if `aborted`.
  void check_abort() const;

  // From now on every collective fails for `reason`, if there is no earlier one.
  void poison(const std::string& reason);
  std::string poison() const;

  // Ends this rank's waits. False if it was called before, or in a fork, which has no right to.
  bool close();
  // In the single order of all, for what must not be taken away from under a caller.
  bool closed() const { return closed_.load(std::memory_order_seq_cst); }

 private:
  void publish_peer(std::byte* base, const Region& region, Peer peer);
  void publish_peer(Peer peer);
  void check_size(const char* collective, uint64_t bytes) const;
  // False if the word was taken already.
  static bool write_abort(Region region, const std::string& reason);
  std::string rank_name() const { return "rank " + std::to_string(options_.rank); }

  Options options_;
  RegionLayout layout_;
  SharedMemory shared_;                // this rank's region, unless it was given memory for that
  std::shared_ptr<std::byte> memory_;  // the same or that memory
  SharedMemory peer_memory_;
  std::byte* theirs_base_ = nullptr;
  std::unique_ptr<Region> theirs_;
  std::unique_ptr<LoopbackTransport> loopback_;
  std::unique_ptr<modelled::ModelledLink> modelled_;
  std::unique_ptr<verbs::Link> link_;
  Transport* transport_ = nullptr;
  std::atomic<bool> connected_{false};  // the peer's waits can be ended
  std::atomic<bool> started_{false};    // messages may be sent
  Peer peer_;
  pid_t process_;
  std::atomic<bool> closed_{false};
  std::atomic<const std::string*> poison_{nullptr};
};

}  // namespace spark
