#include "cpu_rank.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "../support/device_order.hpp"
#include "../support/errors.hpp"
#include "reduce.hpp"

namespace spark {
namespace {

constexpr auto kPeerCheckInterval = std::chrono::milliseconds(20);
// Minimum of a stripe: a shorter one costs more for its flag than it gains.
constexpr size_t kSmallestStripe = 32 << 10;

int64_t now_ns() {
  return nanoseconds_of(Clock::now());
}

}  // namespace

// One caller at a time: collectives are ordered, and two threads have no order.
class CpuRank::CallGuard {
 public:
  explicit CallGuard(CpuRank& rank) : rank_(rank) {
    // Acquire and release: the next caller, on another thread, must see what this one left in plain members.
    // Sequentially consistent: this stores in_use_, then loads closed_; `close` stores closed_, then loads
    // in_use_. In any weaker order both could miss, and the proxy would end during a call.
    if (rank_.in_use_.exchange(true, std::memory_order_seq_cst)) {
      throw UsageError(
          "two threads called collectives at the same time; the ranks' order would be lost, so call "
          "them from one thread");
    }
    try {
      rank_.endpoint_.check_usable();
    } catch (...) {
      rank_.in_use_.store(false, std::memory_order_release);  // for the next caller, as above
      throw;
    }
  }
  // Release: for the next caller, as above.
  ~CallGuard() { rank_.in_use_.store(false, std::memory_order_release); }
  CallGuard(const CallGuard&) = delete;
  CallGuard& operator=(const CallGuard&) = delete;

 private:
  CpuRank& rank_;
};

// One wait for the peer, bounded by the time-out.
class CpuRank::Wait {
 public:
  Wait(CpuRank& rank, const Operation& operation, uint32_t sequence)
      : rank_(rank), operation_(operation), sequence_(sequence), backoff_(rank.options_.backoff) {}

  ~Wait() {
    if (start_ == Clock::time_point{}) return;
    auto waited = static_cast<uint64_t>((Clock::now() - start_).count());
    rank_.counters_.wait_ns.fetch_add(waited, std::memory_order_relaxed);
    if (OperationRecord* record = rank_.recorded_) {
      if (record->wait_ns == 0) record->wait_ns = nanoseconds_of(start_);
      record->waited_ns += static_cast<int64_t>(waited);
    }
  }

  // Called between two loads of the awaited word. Throws when the wait has failed, but only after the word
  // was loaded once more: what the peer sent before it stopped has arrived, and so has what came while this
  // process did not run.
  void step() {
    if (start_ == Clock::time_point{}) start_ = next_peer_check_ = Clock::now();
    if (end_ != End::kNone) give_up();
    // Acquires what was sent before the abort word: the next load sees it.
    if (rank_.endpoint_.aborted()) {
      end_ = End::kAborted;
      return;
    }
    if (!backoff_.step()) return;
    Clock::time_point now = Clock::now();
    if (now - start_ > rank_.options_.timeout) end_ = End::kTimedOut;
    if (now < next_peer_check_) return;
    next_peer_check_ = now + kPeerCheckInterval;
    check_other_protocol();
    if (!rank_.endpoint_.peer().alive()) end_ = End::kPeerGone;
  }

 private:
  enum class End { kNone, kAborted, kTimedOut, kPeerGone };

  void give_up() {
    if (end_ == End::kAborted) rank_.endpoint_.check_abort();
    check_other_protocol();
    rank_.give_up(operation_, sequence_, end_ == End::kPeerGone);
  }

  // The peer may have called an operation whose size takes the other protocol.
  void check_other_protocol() {
    uint64_t flag = load_from_device(rank_.mine_.recv_flag(sequence_));
    if (flag_sequence(flag) == sequence_) rank_.check_tag(operation_, sequence_, flag_tag(flag));
    uint64_t header = rank_.mine_.recv_packets(sequence_)[0].load(std::memory_order_relaxed);
    if (half_arrived(header, sequence_)) rank_.check_tag(operation_, sequence_, half_data(header));
  }

  CpuRank& rank_;
  Operation operation_;
  uint32_t sequence_;
  Backoff backoff_;
  Clock::time_point start_{};
  Clock::time_point next_peer_check_{};
  End end_ = End::kNone;  // why this wait fails if the next load does not see the word either
};

CpuRank::CpuRank(const Options& options)
    : Rank(options),
      options_(endpoint_.options()),
      mine_(endpoint_.mine()),
      scratch_(new std::byte[packet_count(options.sizes.packet_bytes) * kPacketData]),
      received_(options.first_sequence - 1),
      sequence_(options.first_sequence - 1) {}

std::unique_ptr<MessageSource> CpuRank::make_source() {
  auto doorbell = std::make_unique<Doorbell>(mine_, options_.first_sequence - 1, options_.backoff);
  doorbell_ = doorbell.get();
  return doorbell;
}

CollectiveCounters CpuRank::counters() const {
  auto value = [](const std::atomic<uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  return {value(counters_.all_reduce.operations),   value(counters_.all_reduce.bytes),
          value(counters_.all_gather.operations),   value(counters_.all_gather.bytes),
          value(counters_.packet_messages),         value(counters_.payload_messages),
          value(counters_.chunked_operations),      static_cast<double>(value(counters_.wait_ns)) * 1e-9,
          sequence_.load(std::memory_order_relaxed)};
}

void CpuRank::all_reduce(const void* in, void* out, uint64_t elements, DType dtype) {
  CallGuard guard(*this);
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

void CpuRank::all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes) {
  CallGuard guard(*this);
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
void CpuRank::exchange(const Operation& operation, const std::byte* in, uint64_t bytes, Consume consume) {
  if (bytes == 0) return;  // needs no message; operations with data keep the ranks in order
  uint64_t chunk = options_.sizes.slot_bytes;
  uint64_t chunks = (bytes + chunk - 1) / chunk;
  if (chunks > 1) counters_.chunked_operations.fetch_add(1, std::memory_order_relaxed);
  auto length = [&](uint64_t index) { return static_cast<size_t>(std::min(chunk, bytes - index * chunk)); };
  uint32_t base = sequence_.load(std::memory_order_relaxed) + 1;
  recorded_ = nullptr;
  if (operations_.on()) {
    record_ = OperationRecord();
    record_.operation = operation;
    record_.bytes = bytes;
    record_.sequence = base;
    record_.messages = static_cast<uint32_t>(chunks);
    record_.packets = bytes <= options_.sizes.packet_bytes;
    record_.start_ns = now_ns();
    recorded_ = &record_;
  }
  try {
    uint64_t sent = 0;
    for (uint64_t index = 0; index < chunks; ++index) {
      // Sequence j goes out only after the peer's j - depth was consumed: so the arrival of j means
      // that the receiver's own j - depth has been read, and 2 * depth slots are never overwritten too early
      // (docs/protocol.md).
      for (; sent < std::min(chunks, index + options_.depth); ++sent) {
        send(operation, in + sent * chunk, length(sent));
      }
      if (recorded_ && index == 0) record_.sent_ns = now_ns();
      const std::byte* theirs = receive(operation, base + static_cast<uint32_t>(index), length(index));
      if (recorded_) record_.arrived_ns = now_ns();
      consume(theirs, index * chunk, length(index));
      clear_if_due(base + static_cast<uint32_t>(index));
    }
    if (recorded_) {
      record_.end_ns = now_ns();
      operations_.add(record_);
    }
  } catch (const CollectiveError& error) {
    endpoint_.poison(error.what());
    // The peer waits for a message that will not come: this ends its wait, unless it was the one that
    // aborted.
    if (dynamic_cast<const AbortedError*>(&error) == nullptr) endpoint_.end_peer_waits(error.what());
    throw;
  }
}

void CpuRank::send(const Operation& operation, const std::byte* data, size_t bytes) {
  uint32_t sequence = sequence_.load(std::memory_order_relaxed) + 1;
  if (doorbell_) wait_for_send_slot(operation, sequence);
  uint32_t tag = operation.tag();
  bool as_packets = bytes <= options_.sizes.packet_bytes;
  if (as_packets) {
    std::atomic<uint64_t>* packets =
        doorbell_ ? mine_.send_packets(sequence) : peer_region_->recv_packets(sequence);
    auto put = [&](size_t half, uint32_t word) {
      // Relaxed: word and flag are one atomic store, and the reader relies on nothing else. Proxied, the
      // doorbell's release orders these stores before the proxy's loads.
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
      deliver_payload(data, peer_region_->recv_payload(sequence), bytes, peer_region_->recv_flag(sequence),
                      payload_flag(sequence, tag));
    }
    counters_.payload_messages.fetch_add(1, std::memory_order_relaxed);
  }
  if (doorbell_) {
    mine_.descriptor(sequence) = {as_packets ? Protocol::kPackets : Protocol::kPayload,
                                  tag,
                                  as_packets ? packet_count(bytes) * sizeof(Packet) : bytes,
                                  0,
                                  0,
                                  as_packets ? 1 : stripes_of(bytes)};
    doorbell_->ring(sequence);
  }
  sequence_.store(sequence, std::memory_order_relaxed);
}

// The peer may have a message that the proxy has not posted: the retransmission of an earlier one, which a
// failed rail lost, reads the slot and carries what is there by then (docs/protocol.md, "Why that is safe").
// Mostly one load.
void CpuRank::wait_for_send_slot(const Operation& operation, uint32_t sequence) {
  Wait wait(*this, operation, sequence);
  while (!doorbell_->has_posted(sequence - options_.sizes.slots)) wait.step();
}

const std::byte* CpuRank::receive(const Operation& operation, uint32_t sequence, size_t bytes) {
  const std::byte* data = bytes <= options_.sizes.packet_bytes ? receive_packets(operation, sequence, bytes)
                                                               : receive_payload(operation, sequence, bytes);
  received_ = sequence;
  return data;
}

const std::byte* CpuRank::receive_packets(const Operation& operation, uint32_t sequence, size_t bytes) {
  const std::atomic<uint64_t>* packets = mine_.recv_packets(sequence);
  Wait wait(*this, operation, sequence);
  auto take = [&](size_t half) {
    uint64_t value = packets[half].load(std::memory_order_relaxed);
    while (!half_arrived(value, sequence)) {
      wait.step();
      value = packets[half].load(std::memory_order_relaxed);
    }
    return half_data(value);
  };
  uint32_t tag = take(0);
  // Acquire: pairs with the release in `send`, or with a NIC's write. Only with it may this rank write the
  // slot that the peer has read.
  acquire_from_device();
  acquired(packets[0]);
  check_tag(operation, sequence, tag);
  // Implied by the tag and the place in it. Awaited nevertheless, so that no part of this message arrives
  // later.
  take(1);
  size_t words = 2 * (packet_count(bytes) - 1);
  for (size_t word = 0; word < words; ++word) {
    uint32_t value = take(2 + word);
    std::memcpy(scratch_.get() + word * sizeof value, &value, sizeof value);
  }
  return scratch_.get();
}

const std::byte* CpuRank::receive_payload(const Operation& operation, uint32_t sequence, size_t bytes) {
  Wait wait(*this, operation, sequence);
  for (uint32_t stripe = 0; stripe < stripes_of(bytes); ++stripe) {
    // Acquire: pairs with the release (or the NIC's ordered write) of the flag after the payload.
    const std::atomic<uint64_t>& word = mine_.recv_flag(sequence, stripe);
    uint64_t flag = load_from_device(word);
    while (flag_sequence(flag) != sequence) {
      wait.step();
      flag = load_from_device(word);
    }
    // Also before the next stripe: the peer may have sent another operation, which has fewer of them.
    check_tag(operation, sequence, flag_tag(flag));
  }
  return endpoint_.received_payload(sequence);
}

// The same on both ranks, for it depends on the size alone.
uint32_t CpuRank::stripes_of(size_t bytes) const {
  return static_cast<uint32_t>(std::clamp<size_t>(bytes / kSmallestStripe, 1, options_.stripes));
}

void CpuRank::clear_if_due(uint32_t sequence) {
  if (clears(sequence, options_.clear_interval, options_.sizes.slots)) mine_.clear_recv(sequence);
}

void CpuRank::check_tag(const Operation& operation, uint32_t sequence, uint32_t tag) const {
  if (tag == operation.tag()) return;
  throw endpoint_.mismatch(sequence, operation, Operation::from_tag(tag));
}

void CpuRank::give_up(const Operation& operation, uint32_t sequence, bool peer_gone) const {
  std::string where = "an " + operation.describe() + ", sequence " + std::to_string(sequence) +
                      " (last seen " + std::to_string(received_) + "), " + endpoint_.path();
  if (peer_gone) throw TimeoutError(endpoint_.wait_in(where) + ": " + kProcessEnded);
  throw endpoint_.timed_out(where);
}

void CpuRank::wait_until_idle() {
  // A caller that waits leaves now; its memory must outlive it. Sequentially consistent: see CallGuard.
  while (in_use_.load(std::memory_order_seq_cst)) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

}  // namespace spark
