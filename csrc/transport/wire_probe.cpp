#include "wire_probe.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <random>
#include <utility>

#include "../support/errors.hpp"

namespace spark::verbs {
namespace {

constexpr uint32_t kPacketNumbers = 1u << 24;
constexpr int kCompletionsAtOnce = 16;
constexpr uint32_t kMaxCount = 10'000'000;
constexpr auto kAttendInterval = std::chrono::milliseconds(100);
// Of answers: asked for now and then, as the transport does.
constexpr uint64_t kSignalEvery = 16;

// Pages of its own: nothing else may lie in what the peer writes.
class Pages {
 public:
  explicit Pages(size_t bytes)
      : bytes_(round_up(bytes, kPage)), start_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_))) {
    if (start_ == nullptr) throw std::bad_alloc();
    std::memset(start_, 0, bytes_);
  }
  ~Pages() { std::free(start_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::byte* start() const { return start_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  std::byte* start_;
};

std::string text(uint64_t number) {
  return std::to_string(number);
}

}  // namespace

// One rail of the probe: memory, and a connection. Every ping ends where the memory does, with a byte that
// says which one it is, so that nothing of an earlier one can be taken for it. Streams begin where the memory
// does, and end a page earlier.
class WireProbe::RailEnd {
 public:
  RailEnd(uint32_t index, const RailAddress& address, uint64_t largest, const WireClass& marks)
      : address_(address),
        name_("rail " + text(index) + " (" + address.device + ")"),
        end_(round_up(largest, kPage) + kPage),
        marks_(marks),
        packet_number_(static_cast<uint32_t>(std::random_device{}()) % kPacketNumbers),
        connection_(std::make_shared<Connection>(address, end_)) {}

  const std::string& name() const { return name_; }

  RailState state() const {
    RailState state{};
    state.phase = Phase::kOffered;
    state.queue_pair = connection_->pair.number();
    state.packet_number = packet_number_;
    state.remote_key = connection_->receiving.remote_key();
    state.mtu = address_.mtu;
    state.address = reinterpret_cast<uintptr_t>(connection_->received.start());
    state.gid = address_.gid;
    return state;
  }

  void connect(const RailState& peer) {
    connection_->pair.connect(
        {peer.queue_pair, peer.packet_number, std::min(address_.mtu, peer.mtu), peer.gid},
        connection_->device.gid_index(address_.port, address_.gid), packet_number_, marks_);
    remote_base_ = peer.address;
    sge_.lkey = connection_->sending.local_key();
    request_.sg_list = &sge_;
    request_.num_sge = 1;
    request_.opcode = abi::IBV_WR_RDMA_WRITE;
    request_.wr.rdma.rkey = peer.remote_key;
  }

  // The next ping or answer, whose last byte says its number.
  void post_ping(uint64_t bytes) {
    size_t at = end_ - bytes;
    connection_->sent.start()[end_ - 1] = mark(++pings_sent_);
    // As the transport's flags and ib_write_lat: what is small is copied into the request.
    uint32_t flags = 0;
    if (bytes <= QueuePair::kInlineBytes) flags |= abi::IBV_SEND_INLINE;
    if ((posted_ + 1) % kSignalEvery == 0) flags |= abi::IBV_SEND_SIGNALED;
    post(at, bytes, flags);
  }

  // True once the ping after the last one has come.
  bool ping_has_come() {
    auto* last = reinterpret_cast<std::atomic<std::byte>*>(connection_->received.start() + end_ - 1);
    // Acquire: whoever answers must not post before it has seen the ping.
    if (last->load(std::memory_order_acquire) != mark(pings_received_ + 1)) return false;
    ++pings_received_;
    return true;
  }

  void post_stream(uint64_t bytes) { post(0, bytes, abi::IBV_SEND_SIGNALED); }

  // Has a completion come for everything posted before.
  void post_last() {
    if (completed_ == posted_) return;
    post(0, 1, abi::IBV_SEND_SIGNALED);
  }

  uint64_t queued() const { return posted_ - completed_; }

  // Takes note of what has completed. Throws CollectiveError if the rail has failed.
  void poll(const std::string& peer_name) {
    abi::ibv_wc completions[kCompletionsAtOnce];
    int count = connection_->completions.poll(completions, kCompletionsAtOnce);
    if (count < 0) fail(peer_name, "its completion queue is broken");
    for (int at = 0; at < count; ++at) {
      if (completions[at].status != abi::IBV_WC_SUCCESS) {
        fail(peer_name, connection_->pair.failure_text(completions[at]));
      }
      completed_ = std::max(completed_, completions[at].wr_id);
    }
  }

  std::shared_ptr<void> end() {
    connection_->pair.end();  // from here on nothing of it reaches this machine's memory
    return std::move(connection_);
  }

 private:
  // Outlives the probe, if the device is slow to let go of it.
  struct Connection {
    Connection(const RailAddress& address, size_t bytes)
        : sent(bytes),
          received(bytes),
          device(address.device),
          sending(device, sent.start(), sent.bytes(), false),
          receiving(device, received.start(), received.bytes(), true),
          completions(device, static_cast<int>(QueuePair::kSendRequests)),
          pair(device, completions, address.port) {}

    Pages sent, received;
    Device device;
    MemoryRegion sending, receiving;
    CompletionQueue completions;
    QueuePair pair;
  };

  // Only one ping is under way at a time, so a byte says enough; never 0, which the memory starts with.
  static std::byte mark(uint64_t ping) { return static_cast<std::byte>(ping % 255 + 1); }

  [[noreturn]] void fail(const std::string& peer_name, const std::string& why) const {
    throw CollectiveError(name_ + " to " + peer_name + " failed: " + why +
                          "; see that its cable is in and both ports are active (vllm-spark doctor)");
  }

  void post(size_t at, uint64_t bytes, uint32_t flags) {
    sge_.addr = reinterpret_cast<uintptr_t>(connection_->sent.start() + at);
    sge_.length = static_cast<uint32_t>(bytes);
    request_.wr.rdma.remote_addr = remote_base_ + at;
    request_.send_flags = flags;
    request_.wr_id = posted_ + 1;
    int error = connection_->pair.post(&request_);
    if (error != 0) {
      throw CollectiveError(name_ + " takes no message of " + text(bytes) + " bytes (" +
                            std::strerror(error) + "); vllm-spark doctor says what is wrong with the device");
    }
    ++posted_;
  }

  RailAddress address_;
  std::string name_;
  size_t end_;
  WireClass marks_;
  uint32_t packet_number_;
  std::shared_ptr<Connection> connection_;
  uint64_t remote_base_ = 0;
  abi::ibv_sge sge_{};
  abi::ibv_send_wr request_{};
  uint64_t posted_ = 0, completed_ = 0;
  uint64_t pings_sent_ = 0, pings_received_ = 0;
};

class WireProbe::Patience {
 public:
  explicit Patience(WireProbe& probe) : probe_(probe), backoff_({kSpin, probe.options_.timeout, kNap}) {}

  // Between two looks at what is awaited. False once it has taken too long. Throws if one of `rails` has
  // failed.
  template <typename Rails>
  bool step(const Rails& rails) {
    if (!backoff_.step()) return true;
    for (RailEnd* rail : rails) rail->poll(probe_.peer_name_);
    Clock::time_point now = Clock::now();
    if (end_ == Clock::time_point{}) end_ = now + probe_.options_.timeout;
    probe_.attend_now_and_then(now);
    return now < end_;
  }

 private:
  // A ping is awaited on the core, as ib_write_lat does; but soft-RoCE works on the same cores, so it is
  // given away.
  static constexpr std::chrono::nanoseconds kSpin = std::chrono::microseconds(50);
  static constexpr std::chrono::nanoseconds kNap = std::chrono::microseconds(50);

  WireProbe& probe_;
  Backoff backoff_;
  Clock::time_point end_{};
};

WireProbe::WireProbe(const ProbeOptions& options, const std::vector<RailAddress>& rails) : options_(options) {
  if (rails.empty() || rails.size() > kMaxRails) {
    throw UsageError(text(rails.size()) + " rails are not possible; a link has 1 to " + text(kMaxRails));
  }
  for (uint32_t index = 0; index < rails.size(); ++index) {
    rails_.push_back(std::make_unique<RailEnd>(index, rails[index], options.largest, options.marks));
  }
}

WireProbe::~WireProbe() {
  for (auto& rail : rails_) reaper_.release(rail->end());
}

std::string WireProbe::offer() const {
  std::string offer;
  for (const auto& rail : rails_) {
    RailState state = rail->state();
    offer.append(reinterpret_cast<const char*>(&state), sizeof state);
  }
  return offer;
}

void WireProbe::connect(const std::string& peer_offer, const std::string& peer_name) {
  if (peer_offer.size() != rails_.size() * sizeof(RailState)) {
    throw CollectiveError(peer_name + " sent no valid description of " + text(rails_.size()) +
                          " rails; use the same version on both");
  }
  peer_name_ = peer_name;
  for (size_t index = 0; index < rails_.size(); ++index) {
    RailState peer;
    std::memcpy(&peer, peer_offer.data() + index * sizeof peer, sizeof peer);
    rails_[index]->connect(peer);
  }
}

std::vector<double> WireProbe::ping(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count) {
  std::vector<Part> parts = cut(rails, bytes);
  if (count == 0 || count > kMaxCount)
    throw UsageError(text(count) + " round trips are not possible; 1 to " + text(kMaxCount) + " are");
  std::vector<double> halves;
  halves.reserve(count);
  for (uint32_t done = 0; done < count; ++done) {
    Clock::time_point start = Clock::now();
    send(parts);
    receive(parts);
    Clock::time_point end = Clock::now();
    halves.push_back(std::chrono::duration<double, std::micro>(end - start).count() / 2);
    // Outside of what is timed, so that the queue never fills.
    for (const Part& part : parts) part.rail->poll(peer_name_);
    attend_now_and_then(end);
  }
  settle(chosen(rails, bytes));
  return halves;
}

void WireProbe::answer(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count) {
  std::vector<Part> parts = cut(rails, bytes);
  for (uint32_t done = 0; done < count; ++done) {
    receive(parts);
    send(parts);
    for (const Part& part : parts) part.rail->poll(peer_name_);
    attend_now_and_then(Clock::now());
  }
  settle(chosen(rails, bytes));
}

double WireProbe::stream(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count, uint32_t depth) {
  std::vector<RailEnd*> taken = chosen(rails, bytes);
  if (depth == 0 || depth > kMaxDepth) {
    throw UsageError("a depth of " + text(depth) + " is not possible; it goes from 1 to " + text(kMaxDepth));
  }
  if (count == 0 || count > kMaxCount)
    throw UsageError(text(count) + " messages are not possible; 1 to " + text(kMaxCount) + " are");
  Clock::time_point start = Clock::now();
  uint64_t posted = 0, completed = 0;
  std::optional<Patience> patience;
  while (completed < count) {
    uint64_t before = posted + completed;
    uint64_t queued = 0;
    for (RailEnd* rail : taken) {
      if (posted < count && rail->queued() < depth) {
        rail->post_stream(bytes);
        ++posted;
      }
      rail->poll(peer_name_);
      queued += rail->queued();
    }
    completed = posted - queued;
    if (posted + completed != before) {
      patience.reset();
      attend_now_and_then(Clock::now());
      continue;
    }
    if (!patience) patience.emplace(*this);
    if (!patience->step(taken)) {
      give_up(*taken.front(), text(queued) + " messages of " + text(bytes) + " bytes were not acknowledged");
    }
  }
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<WireProbe::RailEnd*> WireProbe::chosen(const std::vector<uint32_t>& rails, uint64_t bytes) {
  if (bytes == 0 || bytes > options_.largest) {
    throw UsageError("a message of " + text(bytes) + " bytes is not possible; it goes from 1 to " +
                     text(options_.largest));
  }
  if (rails.empty()) throw UsageError("no rail was named; name at least one");
  std::vector<RailEnd*> taken;
  for (uint32_t index : rails) {
    if (index >= rails_.size()) {
      throw UsageError("there is no rail " + text(index) + "; they go from 0 to " + text(rails_.size() - 1));
    }
    taken.push_back(rails_[index].get());
  }
  return taken;
}

std::vector<WireProbe::Part> WireProbe::cut(const std::vector<uint32_t>& rails, uint64_t bytes) {
  std::vector<RailEnd*> taken = chosen(rails, bytes);
  uint64_t each = stripe_bytes(bytes, static_cast<uint32_t>(taken.size()));
  std::vector<Part> parts;
  for (uint64_t at = 0; at < bytes; at += each) {
    parts.push_back({taken[parts.size()], std::min(each, bytes - at)});
  }
  return parts;
}

void WireProbe::send(const std::vector<Part>& parts) {
  for (const Part& part : parts) part.rail->post_ping(part.bytes);
}

void WireProbe::receive(const std::vector<Part>& parts) {
  for (const Part& part : parts) {
    if (part.rail->ping_has_come()) continue;
    Patience patience(*this);
    RailEnd* only[] = {part.rail};
    while (!part.rail->ping_has_come()) {
      if (!patience.step(only)) give_up(*part.rail, "no message of " + text(part.bytes) + " bytes came");
    }
  }
}

void WireProbe::attend_now_and_then(Clock::time_point now) {
  if (now < next_attention_) return;
  bool first = next_attention_ == Clock::time_point{};
  next_attention_ = now + kAttendInterval;
  if (!first && options_.attend) options_.attend();
}

void WireProbe::settle(const std::vector<RailEnd*>& rails) {
  for (RailEnd* rail : rails) {
    rail->post_last();
    Patience patience(*this);
    RailEnd* only[] = {rail};
    while (rail->queued() > 0) {
      rail->poll(peer_name_);
      if (rail->queued() > 0 && !patience.step(only)) give_up(*rail, "the last message was not acknowledged");
    }
  }
}

void WireProbe::give_up(const RailEnd& rail, const std::string& missing) const {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g s", std::chrono::duration<double>(options_.timeout).count());
  throw TimeoutError(rail.name() + " to " + peer_name_ + ": " + missing + " within " + seconds +
                     "; see that the other machine still runs and its cable is in");
}

}  // namespace spark::verbs
