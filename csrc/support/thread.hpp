// Threads with names, and with a sentence where the kernel has none left.
#pragma once

#include <pthread.h>

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "errors.hpp"

namespace spark {

// `name`: what `top` and debuggers show, at most 15 characters.
template <typename Body>
std::thread start_thread(const char* name, Body&& body) {
  try {
    std::thread thread(std::forward<Body>(body));
    pthread_setname_np(thread.native_handle(), name);
    return thread;
  } catch (const std::system_error& error) {
    throw CollectiveError("this process can start no thread (" + error.code().message() +
                          "); allow its user more processes (ulimit -u), or its container more (pids limit)");
  }
}

}  // namespace spark
