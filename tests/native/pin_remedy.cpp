// Prints what csrc/transport/verbs/pin_remedy.cpp says of a machine whose files lie below a folder.
//
//   pin_remedy FOLDER
#include "../../csrc/transport/verbs/pin_remedy.hpp"

#include <cstdio>

int main(int argc, char** argv) {
  std::puts(spark::verbs::pin_remedy(argc > 1 ? argv[1] : "").c_str());
}
