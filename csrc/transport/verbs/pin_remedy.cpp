#include "pin_remedy.hpp"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../support/text_file.hpp"

namespace spark::verbs {
namespace {

// The KiB of `name` in /proc/meminfo, or 0.
uint64_t meminfo(const std::string& root, const std::string& name) {
  const std::vector<std::string> words = words_of(read_text(root + "/proc/meminfo"));
  for (size_t word = 0; word + 1 < words.size(); ++word) {
    if (words[word] == name + ":") return std::strtoull(words[word + 1].c_str(), nullptr, 10);
  }
  return 0;
}

// Whether the kernel was built to reserve memory for kexec handover unless its command line forbids it.
bool reserves_by_default(const std::string& root) {
  const std::vector<std::string> release = words_of(read_text(root + "/proc/sys/kernel/osrelease"));
  if (release.empty()) return false;
  for (const std::string& word : words_of(read_text(root + "/boot/config-" + release[0]))) {
    if (word == "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y") return true;
  }
  return false;
}

// Whether this kernel keeps memory reserved for kexec handover. Pages that programs may move lie there when
// memory is short, and must be moved out before they are pinned.
bool memory_is_reserved(const std::string& root) {
  std::string last;
  for (const std::string& word : words_of(read_text(root + "/proc/cmdline"))) {
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
