// A rank on a GPU: collectives on its memory. Each is one kernel launch on the caller's stream, and nothing
// else, so it can be captured into a CUDA graph, whose replay needs no host.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "../kernels/parameters.hpp"
#include "../rank/peer_watch.hpp"
#include "../rank/rank.hpp"
#include "../region/operation.hpp"
#include "driver.hpp"
#include "kernel_image.hpp"
#include "launch_plan.hpp"

namespace spark::device {

class GpuRank final : public Rank {
 public:
  // Makes this rank's region and its state on the current CUDA device. `image` holds the kernels. Throws
  // UsageError for impossible options and where there is no driver, CollectiveError for what the driver
  // refuses. The region is in memory of the GPU's driver if `uses_driver_memory`, which no other process can
  // open, and else in shared memory.
  GpuRank(const Options& options, const LaunchShape& shape, const std::string& image,
          bool uses_driver_memory);
  // Waits for the GPU: memory is freed only after the last kernel that may use it.
  ~GpuRank() override;

  // out = sum over ranks of `elements` numbers, once `stream` gets there. Both aligned to 16 bytes, and
  // apart or the same.
  void all_reduce(const void* in, void* out, uint64_t elements, DType dtype, Stream stream);

  // `in` is [outer, inner_bytes], `out` is [outer, ranks, inner_bytes]; both aligned to 16 bytes, and so is
  // `inner_bytes`; apart.
  void all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes, Stream stream);

  // Throws the error of a kernel that has failed, or what poisoned this rank otherwise: kernels cannot throw.
  void check();

  // Of the kernels that have begun.
  CollectiveCounters counters() const override;

 private:
  void prepare() override;
  std::unique_ptr<MessageSource> make_source() override;
  // Waits for all that runs on the GPU: this rank's kernels give up at once, other kernels may take any time.
  void wait_until_idle() override;

  void launch(const Operation& operation, const Call& call, Stream stream);
  Slots receive_slots(unsigned char* base) const;
  Slots send_slots(unsigned char* base) const;
  const Report& report() const { return *static_cast<const Report*>(gpu_->report.on_host()); }

  // Resources of the CUDA driver; they must be released with their context current.
  struct DriverResources {
    Kernels kernels;
    std::unique_ptr<RegisteredMemory> mine;    // once connected; null for memory of the driver
    std::unique_ptr<RegisteredMemory> theirs;  // the same, if the peer is on this machine
    MappedMemory report;
    DeviceMemory progress;
  };

  void* context_;
  LaunchShape shape_;
  std::unique_ptr<DriverResources> gpu_;
  RankParameters parameters_{};
  std::unique_ptr<PeerWatch> peer_watch_;
  std::mutex launching_;  // held during a launch: no kernel starts once `close` waits for the GPU
};

}  // namespace spark::device
