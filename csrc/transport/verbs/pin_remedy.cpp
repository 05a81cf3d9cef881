#include "pin_remedy.hpp"

#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>

namespace spark::verbs {
namespace {

// The KiB of `name` in /proc/meminfo, or 0.
uint64_t meminfo(const std::string& root, const std::string& name) {
  std::ifstream file(root + "/proc/meminfo");
  std::string word;
  for (uint64_t value = 0; file >> word;) {
    if (word == name + ":" && file >> value) return value;
  }
  return 0;
}

// Whether the kernel was built to reserve memory for kexec handover unless its command line forbids it.
bool reserves_by_default(const std::string& root) {
  std::string release, line;
  std::ifstream(root + "/proc/sys/kernel/osrelease") >> release;
  std::ifstream config(root + "/boot/config-" + release);
  while (std::getline(config, line)) {
    if (line == "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y") return true;
  }
  return false;
}

// Whether this kernel keeps memory reserved for kexec handover. Pages that programs may move lie there when
// memory is short, and must be moved out before they are pinned.
bool memory_is_reserved(const std::string& root) {
  std::ifstream file(root + "/proc/cmdline");
  std::string last;
  for (std::string word; file >> word;) {
    if (word.rfind("kho=", 0) == 0) last = word.substr(4);
  }
  // As the kernel reads a truth value: "off" in any case, and what begins with one of these letters.
  if (!last.empty()) {
    auto begins = [&last](size_t at, const char* letters) {
      return last.size() > at && std::strchr(letters, last[at]) != nullptr;
    };
    return !begins(0, "nNfF0") && !(begins(0, "oO") && begins(1, "fF"));
  }
  // The reserved memory is counted where free CMA is, and not in the total. There may be none free just now.
  return meminfo(root, "CmaFree") > meminfo(root, "CmaTotal") || reserves_by_default(root);
}

}  // namespace

std::string pin_remedy(const std::string& root) {
  std::string text =
      "raise the limit of locked memory (ulimit -l unlimited, memlock in /etc/security/limits.conf, or "
      "LimitMEMLOCK=infinity in a systemd unit)";
  if (memory_is_reserved(root)) {
    text +=
        "; if it is unlimited, boot with kho=off on the kernel's command line: pages that lie in the memory "
        "reserved for kexec handover cannot be pinned once the GPU's driver uses them";
  }
  return text;
}

}  // namespace spark::verbs
