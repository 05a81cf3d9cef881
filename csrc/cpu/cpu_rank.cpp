#include "cpu_rank.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "../support/errors.hpp"
#include "reduce.hpp"

namespace spark {
namespace {

constexpr auto kPeerCheckInterval = std::chrono::milliseconds(20);
// Shorter pieces of payload are not worth a flag of their own.
constexpr size_t kSmallestStripe = 32 << 10;

}  // namespace

// One caller at a time: collectives are ordered, and two threads have no order.
class Runtime::Use {
 public:
  explicit Use(Runtime& runtime) : runtime_(runtime) {
    // Acquire and release: the next caller, on another thread, must see what this one left in plain members.
    // In the single order of all: this stores in_use_, then loads closed_; `close` stores closed_, then loads
    // in_use_. Were both to miss, the proxy would be taken away from under a caller.
    if (runtime_.in_use_.exchange(true, std::memory_order_seq_cst)) {
      throw UsageError(
          "two threads called collectives at the same time; the ranks' order would be lost, so call "
          "them from one thread");
    }
    try {
      runtime_.endpoint_.check_usable();
    } catch (...) {
      runtime_.in_use_.store(false, std::memory_order_release);
      throw;
    }
  }
  ~Use() { runtime_.in_use_.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  Runtime& runtime_;
};

// One bounded wait for the peer.
class Runtime::Wait {
 public:
  Wait(Runtime& runtime, const Operation& operation, uint32_t sequence)
      : runtime_(runtime), operation_(operation), sequence_(sequence), backoff_(runtime.options_.backoff) {}

  ~Wait() {
    if (start_ == Clock::time_point{}) return;
    auto waited = static_cast<uint64_t>((Clock::now() - start_).count());
    runtime_.counters_.wait_ns.fetch_add(waited, std::memory_order_relaxed);
  }

  // Between two looks at the awaited word. Throws when waiting makes no sense any more, but not before one
  // more look: what the peer sent before it stopped has arrived, and so has what came while this process did
  // not run.
  void step() {
    if (start_ == Clock::time_point{}) start_ = next_peer_check_ = Clock::now();
    if (end_ != End::kNone) give_up();
    // Acquires what was sent before the abort word: the next look sees it.
    if (runtime_.endpoint_.aborted()) {
      end_ = End::kAborted;
      return;
    }
    if (!backoff_.step()) return;
    Clock::time_point now = Clock::now();
    if (now - start_ > runtime_.options_.timeout) end_ = End::kTimedOut;
    if (now < next_peer_check_) return;
    next_peer_check_ = now + kPeerCheckInterval;
    look_for_other_operation();
    if (!runtime_.endpoint_.peer().alive()) end_ = End::kPeerGone;
  }

 private:
  enum class End { kNone, kAborted, kTimedOut, kPeerGone };

  void give_up() {
    if (end_ == End::kAborted) runtime_.endpoint_.check_abort();
    look_for_other_operation();
    runtime_.give_up(operation_, sequence_, end_ == End::kPeerGone);
  }

  // The peer may have called something of a size that travels by the other protocol.
  void look_for_other_operation() {
    uint64_t flag = runtime_.mine_.recv_flag(sequence_).load(std::memory_order_acquire);
    if (flag_sequence(flag) == sequence_) runtime_.check_tag(operation_, sequence_, flag_tag(flag));
    uint64_t header = runtime_.mine_.recv_packets(sequence_)[0].load(std::memory_order_relaxed);
    if (half_arrived(header, sequence_)) runtime_.check_tag(operation_, sequence_, half_data(header));
  }

  Runtime& runtime_;
  Operation operation_;
  uint32_t sequence_;
  Backoff backoff_;
  Clock::time_point start_{};
  Clock::time_point next_peer_check_{};
  End end_ = End::kNone;  // why this wait ends if the next look is in vain too
};

Runtime::Runtime(const Options& options)
    : endpoint_(options),
      options_(endpoint_.options()),
      mine_(endpoint_.mine()),
      scratch_(new std::byte[packet_count(options.sizes.packet_bytes) * kPacketData]),
      received_(options.first_sequence - 1),
      sequence_(options.first_sequence - 1) {}

Runtime::~Runtime() {
  // A fork has a copy of this object, but not its thread.
  if (!endpoint_.owned_by_this_process()) {
    static_cast<void>(proxy_.release());
    static_cast<void>(doorbell_.release());
  }
  close();
}

void Runtime::connect(const Address& peer, const std::string& description) {
  endpoint_.connect(peer, description);
  start();
}

void Runtime::connect_link(const std::string& peer_offer, const std::string& description) {
  endpoint_.connect_link(peer_offer, description);
}

void Runtime::connect_in_process(const Runtime& peer) {
  endpoint_.connect_in_process(peer.endpoint_);
  start();
}

void Runtime::start() {
  theirs_ = endpoint_.theirs();
  if (options_.proxied) {
    doorbell_ = std::make_unique<Doorbell>(mine_, options_.first_sequence - 1, options_.backoff);
    proxy_ = std::make_unique<ProxyThread>(*doorbell_, endpoint_.transport());
  }
  endpoint_.start();
}

void Runtime::all_reduce(const void* in, void* out, uint64_t elements, DType dtype) {
  Use use(*this);
  uint64_t bytes = endpoint_.all_reduce_bytes(elements, dtype);
  const std::byte* source = static_cast<const std::byte*>(in);
  std::byte* target = static_cast<std::byte*>(out);
  bool first_is_mine = options_.rank == 0;
  exchange({Kind::kAllReduce, dtype, elements}, source, bytes,
           [&](const std::byte* theirs, uint64_t offset, size_t length) {
             const std::byte* mine = source + offset;
             reduce(first_is_mine ? mine : theirs, first_is_mine ? theirs : mine, target + offset,
                    length / size_of(dtype), dtype);
           });
  counters_.all_reduce.operations.fetch_add(1, std::memory_order_relaxed);
  counters_.all_reduce.bytes.fetch_add(bytes, std::memory_order_relaxed);
}

void Runtime::all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes) {
  Use use(*this);
  uint64_t bytes = endpoint_.all_gather_bytes(outer, inner_bytes);
  const std::byte* source = static_cast<const std::byte*>(in);
  std::byte* target = static_cast<std::byte*>(out);
  // Copies input bytes [offset, offset + length) of one rank to where they belong in the concatenation.
  auto place = [&](int rank, const std::byte* data, uint64_t offset, size_t length) {
    while (length > 0) {
      uint64_t row = offset / inner_bytes, column = offset % inner_bytes;
      size_t piece = static_cast<size_t>(std::min<uint64_t>(length, inner_bytes - column));
      uint64_t start = (row * kWorldSize + static_cast<uint64_t>(rank)) * inner_bytes + column;
      std::memcpy(target + start, data, piece);
      data += piece;
      offset += piece;
      length -= piece;
    }
  };
  exchange({Kind::kAllGather, DType::kBytes, bytes}, source, bytes,
           [&](const std::byte* theirs, uint64_t offset, size_t length) {
             place(options_.rank, source + offset, offset, length);
             place(kWorldSize - 1 - options_.rank, theirs, offset, length);
           });
  counters_.all_gather.operations.fetch_add(1, std::memory_order_relaxed);
  counters_.all_gather.bytes.fetch_add(bytes, std::memory_order_relaxed);
}

template <typename Consume>
void Runtime::exchange(const Operation& operation, const std::byte* in, uint64_t bytes, Consume consume) {
  if (bytes == 0) return;  // nothing to wait for; the ranks' order is kept by the operations that have data
  uint64_t chunk = options_.sizes.slot_bytes;
  uint64_t chunks = (bytes + chunk - 1) / chunk;
  if (chunks > 1) counters_.chunked_operations.fetch_add(1, std::memory_order_relaxed);
  auto length = [&](uint64_t index) { return static_cast<size_t>(std::min(chunk, bytes - index * chunk)); };
  uint32_t base = sequence_.load(std::memory_order_relaxed) + 1;
  try {
    uint64_t sent = 0;
    for (uint64_t index = 0; index < chunks; ++index) {
      // Sequence j goes out only after the peer's j - depth was consumed: so whoever receives j knows that
      // its own j - depth has been read, and 2 * depth slots are never overwritten too early
      // (docs/protocol.md).
      for (; sent < std::min(chunks, index + options_.depth); ++sent) {
        send(operation, in + sent * chunk, length(sent));
      }
      const std::byte* theirs = receive(operation, base + static_cast<uint32_t>(index), length(index));
      consume(theirs, index * chunk, length(index));
      clear_now_and_then(base + static_cast<uint32_t>(index));
    }
  } catch (const CollectiveError& error) {
    endpoint_.poison(error.what());
    // The peer waits for what will not come: tell it why, unless it told us.
    if (dynamic_cast<const AbortedError*>(&error) == nullptr) endpoint_.tell_peer(error.what());
    throw;
  }
}

void Runtime::send(const Operation& operation, const std::byte* data, size_t bytes) {
  uint32_t sequence = sequence_.load(std::memory_order_relaxed) + 1;
  if (doorbell_) wait_for_send_slot(operation, sequence);
  uint32_t tag = operation.tag();
  bool as_packets = bytes <= options_.sizes.packet_bytes;
  if (as_packets) {
    std::atomic<uint64_t>* packets =
        doorbell_ ? mine_.send_packets(sequence) : theirs_->recv_packets(sequence);
    auto put = [&](size_t half, uint32_t word) {
      // Relaxed: word and flag travel together, and the reader trusts nothing else. Proxied, the doorbell's
      // release orders these stores before the proxy's loads.
      packets[half].store(packet_half(word, sequence), std::memory_order_relaxed);
    };
    // Release: this message tells the peer that an earlier one of its own was read, and so lets it write that
    // slot again. Our loads from there must not sink below this store.
    packets[0].store(packet_half(tag, sequence), std::memory_order_release);
    put(1, static_cast<uint32_t>(bytes));
    for (size_t word = 0; word * sizeof(uint32_t) < bytes; ++word) {
      uint32_t value = 0;
      std::memcpy(&value, data + word * sizeof value, std::min(sizeof value, bytes - word * sizeof value));
      put(2 + word, value);
    }
    if (bytes % kPacketData != 0 && bytes % kPacketData <= sizeof(uint32_t)) {
      put(2 + (bytes + sizeof(uint32_t) - 1) / sizeof(uint32_t), 0);  // the last packet's second half
    }
    counters_.packet_messages.fetch_add(1, std::memory_order_relaxed);
  } else {
    if (doorbell_) {
      std::memcpy(mine_.send_payload(sequence), data, bytes);
    } else {
      deliver_payload(data, theirs_->recv_payload(sequence), bytes, theirs_->recv_flag(sequence),
                      payload_flag(sequence, tag));
    }
    counters_.payload_messages.fetch_add(1, std::memory_order_relaxed);
  }
  if (doorbell_) {
    mine_.descriptor(sequence) = {as_packets ? Protocol::kPackets : Protocol::kPayload,
                                  tag,
                                  bytes,
                                  0,
                                  0,
                                  as_packets ? 1 : stripes_of(bytes)};
    doorbell_->ring(sequence);
  }
  sequence_.store(sequence, std::memory_order_relaxed);
}

// That the peer has a message does not say that the proxy has posted it: one that a failed rail lost goes
// again from its slot, and carries along what is there by then (docs/protocol.md, "Why that is safe"). Mostly
// one look.
void Runtime::wait_for_send_slot(const Operation& operation, uint32_t sequence) {
  Wait wait(*this, operation, sequence);
  while (!doorbell_->has_posted(sequence - options_.sizes.slots)) wait.step();
}

const std::byte* Runtime::receive(const Operation& operation, uint32_t sequence, size_t bytes) {
  const std::byte* data = bytes <= options_.sizes.packet_bytes ? receive_packets(operation, sequence, bytes)
                                                               : receive_payload(operation, sequence, bytes);
  received_ = sequence;
  return data;
}

const std::byte* Runtime::receive_packets(const Operation& operation, uint32_t sequence, size_t bytes) {
  const std::atomic<uint64_t>* packets = mine_.recv_packets(sequence);
  Wait wait(*this, operation, sequence);
  auto take = [&](size_t half, std::memory_order order) {
    uint64_t value = packets[half].load(order);
    while (!half_arrived(value, sequence)) {
      wait.step();
      value = packets[half].load(order);
    }
    return half_data(value);
  };
  // Acquire: pairs with the release in `send`. Only with it may this rank write the slot that the peer has
  // read.
  check_tag(operation, sequence, take(0, std::memory_order_acquire));
  // Implied by the tag and the place in it. Read nevertheless, so that nothing of this message comes later.
  take(1, std::memory_order_relaxed);
  size_t words = 2 * (packet_count(bytes) - 1);
  for (size_t word = 0; word < words; ++word) {
    uint32_t value = take(2 + word, std::memory_order_relaxed);
    std::memcpy(scratch_.get() + word * sizeof value, &value, sizeof value);
  }
  return scratch_.get();
}

const std::byte* Runtime::receive_payload(const Operation& operation, uint32_t sequence, size_t bytes) {
  Wait wait(*this, operation, sequence);
  for (uint32_t stripe = 0; stripe < stripes_of(bytes); ++stripe) {
    // Acquire: pairs with the release (or the NIC's ordered write) of the flag after the payload.
    uint64_t flag = mine_.recv_flag(sequence, stripe).load(std::memory_order_acquire);
    while (flag_sequence(flag) != sequence) {
      wait.step();
      flag = mine_.recv_flag(sequence, stripe).load(std::memory_order_acquire);
    }
    // Also before the next stripe: the peer may have sent something else that has fewer of them.
    check_tag(operation, sequence, flag_tag(flag));
  }
  return mine_.recv_payload(sequence);
}

// The same on both ranks, for it depends on the size alone.
uint32_t Runtime::stripes_of(size_t bytes) const {
  return static_cast<uint32_t>(std::clamp<size_t>(bytes / kSmallestStripe, 1, options_.stripes));
}

void Runtime::clear_now_and_then(uint32_t sequence) {
  // Sequence numbers come round after 2^32 messages, which is days of decoding. A word that no later message
  // happened to overwrite would then be taken for a new one. So each slot is cleared four times in that time,
  // after its message was read, and before the peer learns of that.
  if (sequence % options_.clear_interval < options_.sizes.slots) mine_.clear_recv(sequence);
}

void Runtime::check_tag(const Operation& operation, uint32_t sequence, uint32_t tag) const {
  if (tag == operation.tag()) return;
  throw endpoint_.mismatch(sequence, operation, Operation::from_tag(tag));
}

void Runtime::give_up(const Operation& operation, uint32_t sequence, bool peer_gone) const {
  std::string where = "an " + operation.describe() + ", sequence " + std::to_string(sequence) +
                      " (last seen " + std::to_string(received_) + "), " + endpoint_.path();
  if (peer_gone) throw TimeoutError(endpoint_.wait_in(where) + ": " + kProcessEnded);
  throw endpoint_.overdue(where);
}

void Runtime::close() {
  if (!endpoint_.close()) return;
  // A caller that waits leaves now; its memory must outlive it.
  while (in_use_.load(std::memory_order_seq_cst)) std::this_thread::sleep_for(std::chrono::microseconds(100));
  if (proxy_) proxy_->stop();  // delivers what was sent
  endpoint_.tell_peer("it closed its runtime");
}

void Runtime::hold_proxy(bool held) {
  if (proxy_) proxy_->hold(held);
}

}  // namespace spark
