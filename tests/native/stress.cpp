// Two ranks as two threads of one process, for the sanitizers: random collectives, each checked, then an
// abort; and a GPU rank's proxy and its watch over the peer's process.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/cpu_rank.hpp"
#include "../../csrc/proxy/proxy_thread.hpp"
#include "../../csrc/proxy/slot_scanner.hpp"
#include "../../csrc/rank/endpoint.hpp"
#include "../../csrc/rank/peer_watch.hpp"
#include "../../csrc/support/errors.hpp"
#include "wide_message.hpp"

namespace {

[[noreturn]] void fail(const char* what, int operation) {
  std::fprintf(stderr, "operation %d: %s\n", operation, what);
  std::exit(1);
}

// Two rails with the latencies between two GB10 (vllm_spark/collective/link_model.py).
spark::WireFigures wire() {
  spark::RailFigures rail{{{2, 1740}, {1024, 2590}, {4096, 3190}, {32768, 6690}}, 11.7};
  return {{rail, rail}, 24, 240, 30};
}

void run_rank(spark::CpuRank& runtime, int rank, int operations) {
  std::mt19937 chance(5);  // the same on both ranks
  for (int operation = 0; operation < operations; ++operation) {
    size_t count = 1 + chance() % (operation % 20 == 0 ? 20'000 : 600);
    float first = static_cast<float>(chance() % 1000), second = static_cast<float>(chance() % 1000);
    std::vector<float> in(count, rank == 0 ? first : second);
    if (operation % 3 != 0) {
      std::vector<float> out(count, -1);
      runtime.all_reduce(in.data(), out.data(), count, spark::DType::kFloat32);
      for (float value : out) {
        if (value != first + second) fail("wrong sum", operation);
      }
    } else {
      std::vector<float> out(2 * count, -1);
      runtime.all_gather(in.data(), out.data(), 1, count * sizeof(float));
      for (size_t i = 0; i < 2 * count; ++i) {
        if (out[i] != (i < count ? first : second)) fail("wrong concatenation", operation);
      }
    }
  }
}

enum class Path { kDirect, kProxied, kModelled };

void run_pair(Path path, int operations) {
  bool proxied = path != Path::kDirect;
  spark::Options options;
  options.sizes = {4096, 512, 4};
  options.depth = 2;
  options.proxied = proxied;
  options.timeout = std::chrono::seconds(60);
  options.first_sequence = 0xffffff00u;  // wraps soon
  options.clear_interval = 16;           // clears often
  spark::Options other = options;
  other.rank = 1;
  if (proxied) {
    if (path == Path::kModelled) options.wire = other.wire = wire();
    options.sizes.slot_bytes = other.sizes.slot_bytes = 64 << 10;  // enough for two stripes
    options.stripes = other.stripes = 2;
  }
  spark::CpuRank left(options), right(other);
  left.connect_in_process(right);
  right.connect_in_process(left);

  std::thread peer([&] { run_rank(right, 1, operations); });
  run_rank(left, 0, operations);
  peer.join();

  // One rank waits for what never comes, or is about to; a third thread ends that.
  std::thread waiting([&] {
    float value = 1;
    try {
      left.all_reduce(&value, &value, 1, spark::DType::kFloat32);
      fail("an aborted wait returned", operations);
    } catch (const spark::AbortedError&) {
    }
  });
  std::thread aborting([&] { right.abort("enough"); });
  waiting.join();
  aborting.join();
  if (left.poison().empty()) fail("no poison after an abort", operations);
  std::thread closing([&] { left.close(); });
  right.close();
  closing.join();
}

// Stages a message as kernels do: packets without any order among them, or pieces of payload, each with its
// flag after it.
void stage_piece(spark::Region region, uint32_t sequence, uint32_t step, uint32_t piece, uint32_t pieces) {
  auto* payload = reinterpret_cast<uint32_t*>(region.send_payload(sequence));
  for (uint32_t word = piece * step; word < (piece + 1) * step; ++word) payload[word] = sequence + word;
  spark::Flag& flag = region.send_flag(sequence, piece);
  flag.offset = piece * step * 4;
  flag.bytes = step * 4;
  flag.pieces = pieces;
  region.send_flag_value(sequence, piece).store(spark::payload_flag(sequence, 7), std::memory_order_release);
}

void stage(spark::Region region, uint32_t sequence, uint32_t words, bool as_packets, uint32_t pieces) {
  if (as_packets) {
    spark::testing::WideMessage{7, words, sequence}.stage(region.send_packets(sequence), sequence);
    return;
  }
  uint32_t step = words / pieces;
  for (uint32_t piece = pieces; piece-- > 0;) stage_piece(region, sequence, step, piece, pieces);
}

// Waits until `arrived()`.
template <typename Arrived>
void wait_until(Arrived arrived) {
  for (auto start = spark::Clock::now(); !arrived(); std::this_thread::yield()) {
    if (spark::Clock::now() - start > std::chrono::seconds(60)) fail("a staged message did not come", 0);
  }
}

void expect_piece(spark::Region region, uint32_t sequence, uint32_t piece) {
  wait_until([&] {
    return spark::flag_sequence(region.recv_flag(sequence, piece).load(std::memory_order_acquire)) ==
           sequence;
  });
}

// Waits for that message on the other side, and checks it.
void expect(const spark::Endpoint& receiver, uint32_t sequence, uint32_t words, bool as_packets,
            uint32_t pieces) {
  spark::Region region = receiver.mine();
  if (as_packets) {
    auto start = spark::Clock::now();
    auto wait = [&] {
      if (spark::Clock::now() - start > std::chrono::seconds(60)) fail("a staged message did not come", 0);
      std::this_thread::yield();
    };
    spark::testing::WideMessage message{7, words, sequence};
    if (!message.arrives(region.recv_packets(sequence), sequence, wait)) fail("wrong packet", 0);
    return;
  }
  for (uint32_t piece = 0; piece < pieces; ++piece) expect_piece(region, sequence, piece);
  const auto* payload = reinterpret_cast<const uint32_t*>(receiver.received_payload(sequence));
  for (uint32_t word = 0; word < words / pieces * pieces; ++word) {
    if (payload[word] != sequence + word) fail("wrong payload", 0);
  }
}

// The proxy of a GPU rank, with this thread in the kernel's place: the proxy copies by itself, or a modelled
// link is between.
void run_scanner(bool modelled, int messages) {
  spark::Options options;
  options.sizes = {4096, 4096, 4};
  options.depth = 2;
  options.first_sequence = 0xfffffff0u;  // wraps soon
  options.proxied = true;
  if (modelled) options.wire = wire();
  spark::Options other = options;
  other.rank = 1;
  spark::Endpoint left(options), right(other);
  left.connect_in_process(right);
  right.connect_in_process(left);
  spark::SlotScanner scanner(left.mine(), options.first_sequence - 1, 2);
  spark::SlotScanner other_scanner(right.mine(), options.first_sequence - 1, 2);
  spark::ProxyThread proxy(scanner, left.transport());
  // It sends nothing. A rail is used once both ranks have proven it.
  spark::ProxyThread other_proxy(other_scanner, right.transport());
  std::mt19937 chance(9);
  for (int message = 0; message < messages; ++message) {
    uint32_t sequence = options.first_sequence + static_cast<uint32_t>(message);
    bool as_packets = chance() % 2 == 0;
    // Packets in one part, or in two.
    uint32_t words = as_packets ? (chance() % 2 == 0 ? 0 : 800) + chance() % 130 : 64 * (1 + chance() % 16);
    uint32_t pieces = 1 + chance() % 64;
    stage(left.mine(), sequence, words, as_packets, pieces);
    expect(right, sequence, words, as_packets, pieces);
  }
  // One block is back in the slot before another has staged its piece of the first round.
  uint32_t first = options.first_sequence + static_cast<uint32_t>(messages);
  uint32_t again = first + options.sizes.slots;
  stage_piece(left.mine(), first, 64, 0, 2);
  expect_piece(right.mine(), first, 0);
  stage_piece(left.mine(), again, 64, 0, 2);
  stage_piece(left.mine(), first, 64, 1, 2);
  expect_piece(right.mine(), first, 1);
}

// What a failed rail lost goes again from its slot, and may carry along the next message there before the
// proxy has come to it: then the slot is used again, and the proxy must not wait for what it held.
void run_scanner_that_comes_late() {
  spark::Options options;
  options.sizes = {4096, 512, 4};
  options.depth = 2;
  options.first_sequence = 0xfffffffeu;  // wraps at once
  options.proxied = true;
  spark::Endpoint left(options), right(options);
  left.connect_in_process(right);
  spark::SlotScanner scanner(left.mine(), options.first_sequence - 1, 1);
  spark::ProxyThread proxy(scanner, left.transport());
  proxy.hold(true);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it may be in the middle of a look
  constexpr uint32_t kRounds = 3;
  uint32_t last = options.first_sequence + kRounds * options.sizes.slots - 1;
  for (uint32_t sequence = options.first_sequence; sequence != last + 1; ++sequence) {
    stage(left.mine(), sequence, 4 + sequence % 4 * 2, true, 1);
  }
  proxy.hold(false);
  for (uint32_t sequence = last - options.sizes.slots + 1; sequence != last + 1; ++sequence) {
    expect(right, sequence, 4 + sequence % 4 * 2, true, 1);
  }
  if (scanner.counters().posts != options.sizes.slots) fail("something else was posted too", 0);
}

// A source of a rank that sends nothing. It may sleep only while nothing is on its way.
class IdleSource final : public spark::MessageSource {
 public:
  explicit IdleSource(spark::Transport& transport) : transport_(transport) {}
  bool post_staged(spark::Transport&) override { return false; }
  bool end_turn(bool, bool under_way) override { return !under_way; }
  void wake() override {}
  void rest() override {
    if (transport_.progress()) fail("the proxy sleeps while a write is on its way", 0);
    std::this_thread::yield();
  }

 private:
  spark::Transport& transport_;
};

// Over a modelled link the proxy delivers: also what it has posted itself, about its rails, just before it
// would sleep.
void run_idle_proxies() {
  spark::Options options;
  options.proxied = true;
  options.wire = {{{{{0, 1e6}}, 0}}};  // 1 ms: longer than what the thread does meanwhile
  spark::Options other = options;
  other.rank = 1;
  spark::Endpoint left(options), right(other);
  left.connect_in_process(right);
  right.connect_in_process(left);
  IdleSource left_source(left.transport()), right_source(right.transport());
  spark::ProxyThread left_proxy(left_source, left.transport());
  spark::ProxyThread right_proxy(right_source, right.transport());
  for (spark::Endpoint* rank : {&left, &right}) {
    wait_until([&] { return rank->link()->counters().rails_up.load() == 1; });
    // Then the peer is heard of five times in a second.
    wait_until([&] { return rank->link()->announcements().silence() > std::chrono::milliseconds(100); });
    wait_until([&] { return rank->link()->announcements().silence() < std::chrono::milliseconds(100); });
  }
}

// A peer in another process that ends, and one that outlives the watch.
void run_peer_watch() {
  for (bool ends : {true, false}) {
    pid_t child = fork();
    if (child == 0) {
      pause();
      _exit(0);
    }
    spark::Peer peer(1, child, "");
    std::atomic<bool> gone{false};
    {
      spark::PeerWatch watch(peer, [&] { gone.store(true); });
      if (ends) kill(child, SIGKILL);
      for (auto start = spark::Clock::now(); ends && !gone.load(); std::this_thread::yield()) {
        if (spark::Clock::now() - start > std::chrono::seconds(60)) fail("the end was not noticed", 0);
      }
    }
    if (gone.load() != ends) fail("a living peer was given up", 0);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int operations = argc > 1 ? std::atoi(argv[1]) : 3000;
  for (Path path : {Path::kDirect, Path::kProxied, Path::kModelled}) run_pair(path, operations);
  run_scanner(false, operations);
  run_scanner(true, operations);
  run_scanner_that_comes_late();
  run_idle_proxies();
  run_peer_watch();
  std::puts("ok");
}
