// Marks functions that kernels call too. A CPU build sees nothing of it.
#pragma once

#if defined(__CUDACC__)
#define SPARK_HOST_DEVICE __host__ __device__
#else
#define SPARK_HOST_DEVICE
#endif
