// Every kernel of the runtime, by the name under which the host finds it (csrc/gpu/kernels.cpp).
#include "packets.cuh"
#include "payload.cuh"
#include "probe.cuh"

namespace {

using spark::device::BFloat16;
using spark::device::Call;
using spark::device::Concatenation;
using spark::device::Float16;
using spark::device::Float32;
using spark::device::RankParameters;
using spark::device::Sum;

}  // namespace

#define SPARK_KERNEL(name, threads, exchange, ...)                                           \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                   \
      name(const __grid_constant__ RankParameters rank, const __grid_constant__ Call call) { \
    spark::device::exchange<__VA_ARGS__>(rank, call);                                        \
  }

// Threads that move data, and the side warps (csrc/gpu/launch_plan.cpp).
SPARK_KERNEL(all_reduce_packets_float32, 576, exchange_packets, Sum<Float32>)
SPARK_KERNEL(all_reduce_packets_float16, 576, exchange_packets, Sum<Float16>)
SPARK_KERNEL(all_reduce_packets_bfloat16, 576, exchange_packets, Sum<BFloat16>)
SPARK_KERNEL(all_gather_packets, 576, exchange_packets, Concatenation)
SPARK_KERNEL(all_reduce_payload_float32, 576, exchange_payload, Sum<Float32>)
SPARK_KERNEL(all_reduce_payload_float16, 576, exchange_payload, Sum<Float16>)
SPARK_KERNEL(all_reduce_payload_bfloat16, 576, exchange_payload, Sum<BFloat16>)
SPARK_KERNEL(all_gather_payload, 576, exchange_payload, Concatenation)

extern "C" __global__ void __launch_bounds__(32, 1)
    probe_round_trip(uint64_t* ping, const uint64_t* pong, uint32_t count, uint64_t timeout_ns) {
  if (threadIdx.x == 0) spark::device::ping_cpu(ping, pong, count, timeout_ns);
}

extern "C" __global__ void __launch_bounds__(32, 1) probe_nothing() {
  spark::device::do_nothing();
}
