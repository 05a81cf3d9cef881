// Collectives on GPU memory: each is one kernel launch on the caller's stream, and nothing else. So they may
// be captured into CUDA graphs; what is replayed needs no host.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "../kernels/parameters.hpp"
#include "../proxy/proxy_thread.hpp"
#include "../proxy/slot_scanner.hpp"
#include "../rank/endpoint.hpp"
#include "../rank/peer_watch.hpp"
#include "../region/operation.hpp"
#include "driver.hpp"
#include "kernels.hpp"
#include "launch_plan.hpp"

namespace spark::device {

class DeviceRuntime {
 public:
  // Makes this rank's region and its state on the current CUDA device. `image` holds the kernels. Throws
  // UsageError for impossible options and where there is no driver, CollectiveError for what the driver
  // refuses.
  DeviceRuntime(const Options& options, const LaunchShape& shape, const std::string& image);
  // Frees nothing before the GPU is through with it.
  ~DeviceRuntime();
  DeviceRuntime(const DeviceRuntime&) = delete;
  DeviceRuntime& operator=(const DeviceRuntime&) = delete;

  Address address() const { return endpoint_.address(); }
  // See Endpoint.
  void connect(const Address& peer, const std::string& description);
  std::string open_link(const verbs::LinkOptions& options, const std::vector<verbs::RailAddress>& rails) {
    return endpoint_.open_link(options, rails);
  }
  void connect_link(const std::string& peer_offer, const std::string& description);
  // After `connect_link`, once both ranks have come so far: from here on messages go.
  void begin() { start(); }
  verbs::Link* link() const { return endpoint_.link(); }
  std::string path() const { return endpoint_.path(); }

  // out = sum over ranks of `elements` numbers, once `stream` gets there. Both aligned to 16 bytes, and
  // apart or the same.
  void all_reduce(const void* in, void* out, uint64_t elements, DType dtype, Stream stream);

  // `in` is [outer, inner_bytes], `out` is [outer, ranks, inner_bytes]; both aligned to 16 bytes, and so is
  // `inner_bytes`; apart.
  void all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes, Stream stream);

  // Throws what made a kernel give up, if one has, and what poisoned the runtime otherwise; kernels cannot
  // throw themselves.
  void check();

  // Ends every wait of both ranks with `reason`. From any thread.
  void abort(const std::string& reason) { endpoint_.abort(reason); }

  // Nothing is allowed afterwards. Waits for all that runs on the GPU: kernels of this runtime give up at
  // once, for others there is no bound.
  void close();

  bool closed() const { return endpoint_.closed(); }
  std::string poison() const { return endpoint_.poison(); }
  // What kernels have begun so far.
  Totals totals() const;
  const ProxyCounters* proxy_counters() const { return scanner_ ? &scanner_->counters() : nullptr; }
  void hold_proxy(bool held);

 private:
  // Lets the GPU use this rank's region. After the NIC has registered it: the kernel moves pages out of
  // memory that must stay movable when they are pinned first, and cannot once the GPU's driver holds them.
  void pin();
  void start();
  void launch(const Operation& operation, const Call& call, Stream stream);
  Lane receive_lane(unsigned char* base) const;
  Lane send_lane(unsigned char* base) const;
  const Report& report() const { return *static_cast<const Report*>(gpu_->report.on_host()); }

  // Resources of the CUDA driver; they must be released with their context current.
  struct Lent {
    Kernels kernels;
    std::unique_ptr<RegisteredMemory> mine;    // once connected
    std::unique_ptr<RegisteredMemory> theirs;  // the same, if the peer is on this machine
    MappedMemory report;
    DeviceMemory progress;
  };

  Endpoint endpoint_;
  void* context_;
  LaunchShape shape_;
  std::unique_ptr<Lent> gpu_;
  Rank rank_{};
  std::unique_ptr<SlotScanner> scanner_;
  std::unique_ptr<ProxyThread> proxy_;
  std::unique_ptr<PeerWatch> peer_watch_;
  std::mutex launching_;  // between a launch and the end: no kernel starts once `close` waits for the GPU
};

}  // namespace spark::device
