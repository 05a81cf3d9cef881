// Threads, with a sentence where the kernel has none left.
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "errors.hpp"

namespace spark {

template <typename Body>
std::thread start_thread(Body&& body) {
  try {
    return std::thread(std::forward<Body>(body));
  } catch (const std::system_error& error) {
    throw CollectiveError("this process can start no thread (" + error.code().message() +
                          "); allow its user more processes (ulimit -u), or its container more (pids limit)");
  }
}

}  // namespace spark
