// Prints which of the processors 0 to N-1 are fast, by the kernel's figures in a folder.
//
//     fast_cores FOLDER N
#include "../../csrc/support/fast_cores.hpp"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  int count = std::atoi(argv[2]);
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  for (int processor = 0; processor < count; ++processor) CPU_SET(processor, &allowed);
  cpu_set_t fast = spark::fast_cores(allowed, argv[1]);
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (CPU_ISSET(processor, &fast)) std::printf("%d\n", processor);
  }
}
