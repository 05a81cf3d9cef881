// Marks functions that kernels call too; empty in a CPU build.
#pragma once

#if defined(__CUDACC__)
#define SPARK_HOST_DEVICE __host__ __device__
#else
#define SPARK_HOST_DEVICE
#endif
