#include "fast_cores.hpp"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "text_file.hpp"

namespace spark {
namespace {

// The capacity of a core that is as fast as another kind of core, in tenths of that one's.
constexpr int kFastTenths = 9;

// 0 where the kernel has no such file.
int capacity(const std::string& folder, int processor) {
  return std::atoi(read_text(folder + "/cpu" + std::to_string(processor) + "/cpu_capacity").c_str());
}

}  // namespace

cpu_set_t fast_cores(const cpu_set_t& allowed, const std::string& folder) {
  std::vector<int> capacities(CPU_SETSIZE);
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (CPU_ISSET(processor, &allowed)) capacities[processor] = capacity(folder, processor);
  }
  int most = *std::max_element(capacities.begin(), capacities.end());
  if (most == 0) return allowed;
  cpu_set_t fast;
  CPU_ZERO(&fast);
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (CPU_ISSET(processor, &allowed) && 10 * capacities[processor] >= kFastTenths * most)
      CPU_SET(processor, &fast);
  }
  return fast;
}

void stay_on_fast_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more processors than a cpu_set_t holds
  cpu_set_t fast = fast_cores(allowed);
  // It fails only if the processors changed meanwhile; then the thread stays where it is.
  if (!CPU_EQUAL(&fast, &allowed)) sched_setaffinity(0, sizeof fast, &fast);
}

}  // namespace spark
