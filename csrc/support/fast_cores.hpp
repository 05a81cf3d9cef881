// Machines with two kinds of cores: a GB10 has ten Cortex-X925 and ten Cortex-A725.
#pragma once

#include <sched.h>

#include <string>

namespace spark {

// The fast ones of the processors in `allowed`: those whose capacity (the kernel's figure of a core's speed,
// Documentation/ABI/testing/sysfs-devices-system-cpu) is at least nine tenths of the largest one. A GB10's
// cores have 1024, 1017 and 997, or 731 and 718. `allowed` itself where the kernel has no such figures.
// `folder`: where they are.
cpu_set_t fast_cores(const cpu_set_t& allowed, const std::string& folder = "/sys/devices/system/cpu");

// Keeps the calling thread on the fast ones of the processors that it may run on now.
void stay_on_fast_cores();

}  // namespace spark
