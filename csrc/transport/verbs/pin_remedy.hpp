// What to do when the kernel refuses to pin memory for a NIC.
#pragma once

#include <string>

namespace spark::verbs {

// The end of a sentence, without a full stop. Reads the kernel's files below `root`, which is empty but for
// tests.
std::string pin_remedy(const std::string& root = "");

}  // namespace spark::verbs
