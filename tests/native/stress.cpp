// Two ranks as two threads of one process, for the sanitizers: random collectives, each checked, then an
// abort.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/errors.hpp"
#include "../../csrc/runtime.hpp"

namespace {

[[noreturn]] void fail(const char* what, int operation) {
  std::fprintf(stderr, "operation %d: %s\n", operation, what);
  std::exit(1);
}

void run_rank(spark::Runtime& runtime, int rank, int operations) {
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

void run_pair(bool proxied, int operations) {
  spark::Options options;
  options.sizes = {4096, 512, 4};
  options.depth = 2;
  options.proxied = proxied;
  options.timeout = std::chrono::seconds(60);
  options.first_sequence = 0xffffff00u;  // wraps soon
  options.clear_interval = 16;           // clears often
  spark::Options other = options;
  other.rank = 1;
  if (proxied) options.wire = other.wire = {std::chrono::microseconds(3), 24.0};
  spark::Runtime left(options), right(other);
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

}  // namespace

int main(int argc, char** argv) {
  int operations = argc > 1 ? std::atoi(argv[1]) : 3000;
  run_pair(false, operations);
  run_pair(true, operations);
  std::puts("ok");
}
