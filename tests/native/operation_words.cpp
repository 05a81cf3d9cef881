// Prints how the operation of each tag that is given reads in an error.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/region/operation.hpp"

int main(int count, char** tags) {
  for (int at = 1; at < count; ++at) {
    auto tag = static_cast<uint32_t>(std::strtoul(tags[at], nullptr, 0));
    std::puts(("an " + spark::Operation::from_tag(tag).describe()).c_str());
  }
}
