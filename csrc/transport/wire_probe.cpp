#include "wire_probe.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "../region/region_layout.hpp"
#include "../support/device_order.hpp"
#include "../support/errors.hpp"

namespace spark::verbs {
namespace {

constexpr uint32_t kMaxCount = 10'000'000;
constexpr auto kAttendInterval = std::chrono::milliseconds(100);

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
// is the ping's number, so that no byte of an earlier one is taken for it. Streams begin where the memory
// does, and end a page earlier.
class WireProbe::RailEnd {
 public:
  RailEnd(uint32_t index, const RailAddress& address, uint64_t largest)
      : name_("rail " + text(index) + " (" + address.device + ")"),
        end_(round_up(largest, kPage) + kPage),
        resources_(std::make_shared<Resources>(address, end_)) {}

  const std::string& name() const { return name_; }
  ConnectionInfo info() const { return resources_->connection.info(); }

  void connect(const ConnectionInfo& peer, const PathOptions& path_options) {
    resources_->connection.connect(peer, path_options);
    remote_base_ = peer.address;
    write_.prepare(resources_->sending.local_key(), peer.remote_key);
  }

  // Posts the next ping or answer, whose last byte is its number.
  void post_ping(uint64_t bytes) {
    resources_->sent.start()[end_ - 1] = ping_byte(++pings_sent_);
    // As the transport's flags and ib_write_lat: small messages are copied into the request.
    uint32_t flags = 0;
    if (bytes <= QueuePair::kInlineBytes) flags = abi::IBV_SEND_INLINE;
    post(end_ - bytes, bytes, flags, false);
  }

  // True once the ping after the last one has arrived.
  bool ping_arrived() {
    auto* last = reinterpret_cast<std::atomic<std::byte>*>(resources_->received.start() + end_ - 1);
    // The answer must not be posted before the ping was seen.
    if (load_from_device(*last) != ping_byte(pings_received_ + 1)) return false;
    ++pings_received_;
    return true;
  }

  void post_stream(uint64_t bytes) { post(0, bytes, 0, true); }

  // Requests a completion for everything posted before.
  void post_last() {
    if (queued() > 0) post(0, 1, 0, true);
  }

  uint64_t queued() const { return resources_->connection.queued(); }

  // Counts completions. Throws CollectiveError if the rail has failed.
  void poll(const std::string& peer_name) {
    std::optional<std::string> problem = resources_->connection.poll();
    if (!problem) return;
    throw CollectiveError(name_ + " to " + peer_name + " failed: " + *problem +
                          "; see that its cable is in and both ports are active (vllm-spark doctor)");
  }

  // Ends all traffic. Returns what takes long to release.
  std::shared_ptr<void> end() {
    resources_->connection.end();
    return std::move(resources_);
  }

 private:
  // Outlives the probe if the device takes long to destroy a queue pair.
  struct Resources {
    Resources(const RailAddress& address, size_t bytes)
        : sent(bytes),
          received(bytes),
          device(std::make_shared<Device>(address.device)),
          sending(*device, sent.start(), sent.bytes(), false),
          connection(device, address, received.start(), received.bytes()) {}

    Pages sent, received;
    std::shared_ptr<const Device> device;
    MemoryRegion sending;
    Connection connection;
  };

  // Only one ping is under way at a time, so a byte is enough; never 0, which the memory starts with.
  static std::byte ping_byte(uint64_t ping) { return static_cast<std::byte>(ping % 255 + 1); }

  void post(size_t at, uint64_t bytes, uint32_t flags, bool signal) {
    write_.set(resources_->sent.start() + at, bytes, remote_base_ + at);
    resources_->connection.number(write_.request, flags, signal);
    int error = resources_->connection.post(write_.request);
    if (error != 0) {
      throw CollectiveError(name_ + " takes no message of " + text(bytes) + " bytes (" +
                            std::strerror(error) + "); vllm-spark doctor says what is wrong with the device");
    }
  }

  std::string name_;
  size_t end_;  // bytes of the memory
  std::shared_ptr<Resources> resources_;
  uint64_t remote_base_ = 0;
  WriteRequest write_;
  uint64_t pings_sent_ = 0, pings_received_ = 0;
};

// One bounded wait: spins, then yields the core and checks for failures.
class WireProbe::Wait {
 public:
  explicit Wait(WireProbe& probe) : probe_(probe), backoff_({kSpin, probe.options_.timeout, kSleep}) {}

  // Called between two polls of what is awaited. False once the time-out is over. Throws if one of `rails`
  // has failed.
  template <typename Rails>
  bool step(const Rails& rails) {
    if (!backoff_.step()) return true;
    for (RailEnd* rail : rails) rail->poll(probe_.peer_name_);
    Clock::time_point now = Clock::now();
    if (end_ == Clock::time_point{}) end_ = now + probe_.options_.timeout;
    probe_.attend_if_due(now);
    return now < end_;
  }

 private:
  // Spins as ib_write_lat does; then yields, because soft-RoCE runs on the same cores.
  static constexpr std::chrono::nanoseconds kSpin = std::chrono::microseconds(50);
  static constexpr std::chrono::nanoseconds kSleep = std::chrono::microseconds(50);

  WireProbe& probe_;
  Backoff backoff_;
  Clock::time_point end_{};
};

WireProbe::WireProbe(const ProbeOptions& options, const std::vector<RailAddress>& rails) : options_(options) {
  if (rails.empty() || rails.size() > kMaxRails) {
    throw UsageError(text(rails.size()) + " rails are not possible; a link has 1 to " + text(kMaxRails));
  }
  for (uint32_t index = 0; index < rails.size(); ++index) {
    rails_.push_back(std::make_unique<RailEnd>(index, rails[index], options.largest));
  }
}

WireProbe::~WireProbe() {
  for (auto& rail : rails_) release_.release(rail->end());
}

std::string WireProbe::offer() const {
  std::string offer;
  for (const auto& rail : rails_) {
    ConnectionInfo info = rail->info();
    offer.append(reinterpret_cast<const char*>(&info), sizeof info);
  }
  return offer;
}

void WireProbe::connect(const std::string& peer_offer, const std::string& peer_name) {
  if (peer_offer.size() != rails_.size() * sizeof(ConnectionInfo)) {
    throw CollectiveError(peer_name + " sent no valid description of " + text(rails_.size()) +
                          " rails; use the same version on both");
  }
  peer_name_ = peer_name;
  for (size_t index = 0; index < rails_.size(); ++index) {
    ConnectionInfo peer;
    std::memcpy(&peer, peer_offer.data() + index * sizeof peer, sizeof peer);
    rails_[index]->connect(peer, options_.path_options);
  }
}

std::vector<double> WireProbe::ping(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count) {
  std::vector<Part> parts = split(rails, bytes);
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
    attend_if_due(end);
  }
  flush(select_rails(rails, bytes));
  return halves;
}

void WireProbe::answer(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count) {
  std::vector<Part> parts = split(rails, bytes);
  for (uint32_t done = 0; done < count; ++done) {
    receive(parts);
    send(parts);
    for (const Part& part : parts) part.rail->poll(peer_name_);
    attend_if_due(Clock::now());
  }
  flush(select_rails(rails, bytes));
}

double WireProbe::stream(const std::vector<uint32_t>& rails, uint64_t bytes, uint32_t count, uint32_t depth) {
  std::vector<RailEnd*> selected = select_rails(rails, bytes);
  if (depth == 0 || depth > kMaxDepth) {
    throw UsageError("a depth of " + text(depth) + " is not possible; it goes from 1 to " + text(kMaxDepth));
  }
  if (count == 0 || count > kMaxCount)
    throw UsageError(text(count) + " messages are not possible; 1 to " + text(kMaxCount) + " are");
  Clock::time_point start = Clock::now();
  uint64_t posted = 0, completed = 0;
  std::optional<Wait> wait;
  while (completed < count) {
    uint64_t before = posted + completed;
    uint64_t queued = 0;
    for (RailEnd* rail : selected) {
      if (posted < count && rail->queued() < depth) {
        rail->post_stream(bytes);
        ++posted;
      }
      rail->poll(peer_name_);
      queued += rail->queued();
    }
    completed = posted - queued;
    if (posted + completed != before) {
      wait.reset();
      attend_if_due(Clock::now());
      continue;
    }
    if (!wait) wait.emplace(*this);
    if (!wait->step(selected)) {
      time_out(*selected.front(),
               text(queued) + " messages of " + text(bytes) + " bytes were not acknowledged");
    }
  }
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<WireProbe::RailEnd*> WireProbe::select_rails(const std::vector<uint32_t>& rails, uint64_t bytes) {
  if (bytes == 0 || bytes > options_.largest) {
    throw UsageError("a message of " + text(bytes) + " bytes is not possible; it goes from 1 to " +
                     text(options_.largest));
  }
  if (rails.empty()) throw UsageError("no rail was named; name at least one");
  std::vector<RailEnd*> selected;
  for (uint32_t index : rails) {
    if (index >= rails_.size()) {
      throw UsageError("there is no rail " + text(index) + "; they go from 0 to " + text(rails_.size() - 1));
    }
    selected.push_back(rails_[index].get());
  }
  return selected;
}

std::vector<WireProbe::Part> WireProbe::split(const std::vector<uint32_t>& rails, uint64_t bytes) {
  std::vector<RailEnd*> selected = select_rails(rails, bytes);
  uint64_t each = stripe_bytes(bytes, static_cast<uint32_t>(selected.size()));
  std::vector<Part> parts;
  for (uint64_t at = 0; at < bytes; at += each) {
    parts.push_back({selected[parts.size()], std::min(each, bytes - at)});
  }
  return parts;
}

void WireProbe::send(const std::vector<Part>& parts) {
  for (const Part& part : parts) part.rail->post_ping(part.bytes);
}

void WireProbe::receive(const std::vector<Part>& parts) {
  for (const Part& part : parts) {
    if (part.rail->ping_arrived()) continue;
    Wait wait(*this);
    RailEnd* only[] = {part.rail};
    while (!part.rail->ping_arrived()) {
      if (!wait.step(only)) time_out(*part.rail, "no message of " + text(part.bytes) + " bytes came");
    }
  }
}

void WireProbe::attend_if_due(Clock::time_point now) {
  if (now < next_attend_) return;
  bool first = next_attend_ == Clock::time_point{};
  next_attend_ = now + kAttendInterval;
  if (!first && options_.attend) options_.attend();
}

void WireProbe::flush(const std::vector<RailEnd*>& rails) {
  for (RailEnd* rail : rails) {
    rail->post_last();
    Wait wait(*this);
    RailEnd* only[] = {rail};
    while (rail->queued() > 0) {
      rail->poll(peer_name_);
      if (rail->queued() > 0 && !wait.step(only)) time_out(*rail, "the last message was not acknowledged");
    }
  }
}

void WireProbe::time_out(const RailEnd& rail, const std::string& missing) const {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g s", std::chrono::duration<double>(options_.timeout).count());
  throw TimeoutError(rail.name() + " to " + peer_name_ + ": " + missing + " within " + seconds +
                     "; see that the other machine still runs and its cable is in");
}

}  // namespace spark::verbs
