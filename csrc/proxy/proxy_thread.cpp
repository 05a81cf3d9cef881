#include "proxy_thread.hpp"

#include "../support/backoff.hpp"
#include "../support/fast_cores.hpp"
#include "../support/thread.hpp"

namespace spark {
namespace {

// Maximum time for delivering, at the end, what was staged before.
constexpr auto kDrainTime = std::chrono::seconds(1);
// Turns between two checks of the connection while the thread is busy: some ten microseconds.
constexpr uint32_t kTurnsPerCheck = 256;

}  // namespace

ProxyThread::ProxyThread(MessageSource& source, Transport& transport)
    : source_(source), transport_(transport) {
  thread_ = start_thread("spark-proxy", [this] {
    // Messages wait for every instruction of this thread.
    stay_on_fast_cores();
    run();
  });
}

void ProxyThread::stop() {
  if (!thread_.joinable()) return;
  // Release: the thread acquires it, and its last turn sees everything that the caller knows to be staged.
  stopping_.store(true, std::memory_order_release);
  source_.wake();
  thread_.join();  // bounded: by one `rest`, one `maintain`, kDrainTime and the transport's `finish`
}

void ProxyThread::run() {
  uint32_t turns = 0;
  // Acquire: what was staged before `stop` is seen by the last turn below.
  while (!stopping_.load(std::memory_order_acquire)) {
    bool busy = !held_.load(std::memory_order_relaxed) && source_.post_staged(transport_);
    bool under_way = transport_.progress();
    bool idle = source_.end_turn(busy, under_way);
    if (++turns % kTurnsPerCheck == 0 || idle) transport_.maintain();
    // After the check: what `progress` found is announced before the sleep, and a message that ends the sleep
    // is posted before the next check, which may take long. Not while something is under way that the check
    // has posted: a transport may need this thread to deliver it.
    if (idle && !transport_.progress()) source_.rest();
  }
  // The peer may still wait for what was staged before the end.
  while (source_.post_staged(transport_)) {
  }
  for (Clock::time_point end = Clock::now() + kDrainTime; transport_.progress() && Clock::now() < end;) {
    transport_.maintain();
    std::this_thread::yield();
  }
  transport_.finish();
}

}  // namespace spark
