// The proxy: a thread that posts what its rank has staged to the transport, and drives the transport.
#pragma once

#include <atomic>
#include <thread>

#include "message_source.hpp"

namespace spark {

class ProxyThread {
 public:
  // Starts the thread. Throws CollectiveError if the process can start none. `source` and `transport` must
  // outlive it.
  ProxyThread(MessageSource& source, Transport& transport);
  ~ProxyThread() { stop(); }
  ProxyThread(const ProxyThread&) = delete;
  ProxyThread& operator=(const ProxyThread&) = delete;

  // Delivers what the caller knows to be staged, then ends the thread.
  void stop();

  // Test hook: while held, the thread posts nothing, as if it had not been scheduled.
  void hold(bool held) { held_.store(held, std::memory_order_relaxed); }

 private:
  void run();

  MessageSource& source_;
  Transport& transport_;
  std::atomic<bool> held_{false};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace spark
