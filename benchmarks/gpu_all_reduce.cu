// An all-reduce kernel by itself: two ranks on one GPU, each with a region in host memory and a stream, 97
// calls in a graph.
//
//     nvcc -std=c++17 -O3 -arch=native -o gpu_all_reduce benchmarks/gpu_all_reduce.cu && ./gpu_all_reduce
//
// Both ranks share one PCIe link here, which two machines or two GPUs do not: an upper bound for the direct
// mode. Prints one line per size and launch shape: microseconds for one call (minimum, median, 95th
// percentile of 60 graph launches), and the number of wrong elements, which must be 0.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/kernels/all_reduce.cuh"

namespace {

using spark::RegionLayout;
using spark::RegionSizes;
using spark::device::Failure;
using spark::device::Progress;
using spark::device::Rank;

constexpr int kCalls = 97;  // all-reduces of one token in a 48-layer model
constexpr int kLaunches = 60;
constexpr size_t kLargest = 1 << 20;  // bytes
constexpr RegionSizes kSizes{1 << 20, 128 << 10, 8};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Side {
  Rank rank;
  cudaStream_t stream;
  uint2* in;
  uint2* out;
  cudaGraphExec_t graph;
};

uint16_t bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// Eighths up to 12: exact in bfloat16, and so is the sum of two of them.
float input(int rank, size_t index) {
  return static_cast<float>((index * 7 + rank * 13) % 97) / 8;
}

template <int kPackets>
void launch(Side& side, uint32_t bytes, int blocks, int threads) {
  spark::Operation operation{spark::Kind::kAllReduce, spark::DType::kBFloat16, bytes / 2};
  spark::device::all_reduce_packets<spark::device::BFloat16, kPackets><<<blocks, threads, 0, side.stream>>>(
      side.rank, side.in, side.out, bytes / 8 + 1, operation.tag(), bytes);
  check(cudaGetLastError());
}

void launch(Side& side, uint32_t bytes, int blocks, int threads, int per_thread) {
  if (per_thread <= 1) return launch<1>(side, bytes, blocks, threads);
  if (per_thread <= 2) return launch<2>(side, bytes, blocks, threads);
  if (per_thread <= 4) return launch<4>(side, bytes, blocks, threads);
  launch<8>(side, bytes, blocks, threads);
}

void prepare(Side (&sides)[2]) {
  unsigned char* regions[2];
  const size_t total = RegionLayout(kSizes).total();
  for (auto& region : regions) {
    check(cudaHostAlloc(reinterpret_cast<void**>(&region), total, cudaHostAllocMapped));
    std::memset(region, 0, total);
  }
  for (int index = 0; index < 2; ++index) {
    Side& side = sides[index];
    Progress* progress;
    Failure* failure;
    check(cudaMalloc(&progress, sizeof *progress));
    check(cudaMemset(progress, 0, sizeof *progress));
    check(cudaHostAlloc(reinterpret_cast<void**>(&failure), sizeof *failure, cudaHostAllocMapped));
    std::memset(failure, 0, sizeof *failure);
    side.rank =
        Rank{regions[index], regions[1 - index], progress, failure, kSizes, 2'000'000'000, uint32_t(index)};
    check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
    check(cudaMalloc(&side.in, kLargest));
    check(cudaMalloc(&side.out, kLargest));
    std::vector<uint16_t> values(kLargest / 2);
    for (size_t at = 0; at < values.size(); ++at) values[at] = bfloat16(input(index, at));
    check(cudaMemcpy(side.in, values.data(), kLargest, cudaMemcpyHostToDevice));
  }
}

size_t wrong_elements(const Side& side, uint32_t bytes) {
  std::vector<uint16_t> sums(bytes / 2);
  check(cudaMemcpy(sums.data(), side.out, bytes, cudaMemcpyDeviceToHost));
  size_t wrong = 0;
  for (size_t at = 0; at < sums.size(); ++at) wrong += sums[at] != bfloat16(input(0, at) + input(1, at));
  return wrong;
}

// Returns false if a kernel gave up.
bool measure(Side (&sides)[2], uint32_t bytes, int blocks, int threads, int per_thread) {
  for (Side& side : sides) {
    cudaGraph_t graph;
    check(cudaMemset(side.out, 0, bytes));
    check(cudaStreamBeginCapture(side.stream, cudaStreamCaptureModeThreadLocal));
    for (int call = 0; call < kCalls; ++call) launch(side, bytes, blocks, threads, per_thread);
    check(cudaStreamEndCapture(side.stream, &graph));
    check(cudaGraphInstantiate(&side.graph, graph, 0));
    check(cudaGraphDestroy(graph));
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> samples;
  for (int count = 0; count < kLaunches; ++count) {
    check(cudaEventRecord(begin, sides[0].stream));
    for (Side& side : sides) check(cudaGraphLaunch(side.graph, side.stream));
    check(cudaEventRecord(end, sides[0].stream));
    check(cudaDeviceSynchronize());
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    samples.push_back(milliseconds * 1000 / kCalls);
  }
  std::sort(samples.begin(), samples.end());
  std::printf("%6u bytes, %2d blocks of %4d: min %6.2f  median %6.2f  p95 %6.2f us, wrong elements %zu\n",
              bytes, blocks, threads, samples.front(), samples[kLaunches / 2], samples[kLaunches * 95 / 100],
              wrong_elements(sides[0], bytes) + wrong_elements(sides[1], bytes));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  bool good = true;
  for (Side& side : sides) {
    check(cudaGraphExecDestroy(side.graph));
    if (side.rank.failure->code != 0) {
      std::printf("rank %u gave up: code %u at sequence %u\n", side.rank.index, side.rank.failure->code,
                  side.rank.failure->sequence);
      good = false;
    }
  }
  return good;
}

}  // namespace

int main() {
  Side sides[2];
  prepare(sides);
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, CUDA %d\n", device.name, CUDART_VERSION);
  for (uint32_t bytes : {1024u, 4096u, 8192u, 16384u, 65536u}) {
    for (int threads : {160, 288, 544, 1024}) {
      for (int blocks : {1, 2, 4, 8, 16}) {
        const uint32_t packets = bytes / 8 + 1, all = static_cast<uint32_t>(blocks * threads);
        const int per_thread = static_cast<int>((packets + all - 1) / all);
        const bool idle_block = blocks > 1 && all - threads >= packets;
        if (per_thread > 8 || idle_block) continue;
        if (!measure(sides, bytes, blocks, threads, per_thread)) return 1;
      }
    }
  }
}
