// The CPU's half of an all-reduce: add two ranks' data in float32, in rank order.
#pragma once

#include <cstddef>

#include "../region/operation.hpp"

namespace spark {

// out[i] = round(float(first[i]) + float(second[i])), rounded to nearest even. Rank 0's data is `first` on
// both ranks, so both get the same bits. Any alignment; `out` may be `first` or `second`.
void reduce(const void* first, const void* second, void* out, size_t elements, DType dtype);

}  // namespace spark
