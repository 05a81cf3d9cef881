// The runtime as the Python module `vllm_spark._native`: raw pointers in, exceptions out, no Python lock
// while waiting.
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/cpu_rank.hpp"
#include "gpu/gpu_rank.hpp"
#include "gpu/machine_probe.hpp"
#include "support/errors.hpp"
#include "support/text.hpp"
#include "transport/wire_probe.hpp"

namespace py = pybind11;

namespace spark {
namespace {

// For functions that may wait or call a driver: with the interpreter's lock held no other thread of Python
// runs, such as those that send heartbeats, and announcements by which a link reconnects. None of these
// functions touches a Python object, and none of their locks is held when the interpreter's is taken again.
//
// Not for functions that take a few microseconds and do not wait, even if they are called often: another
// thread may take the interpreter's lock, and keeps it for its switch interval (5 ms). Such a function may
// take a lock that other threads hold only to copy words, and without the interpreter's lock
// (Announcements').
using Unlocked = py::call_guard<py::gil_scoped_release>;

// The same for the end of an object, which may be the garbage collector's work: closing waits for the GPU and
// for the peer.
struct DeleteUnlocked {
  template <typename Object>
  void operator()(Object* object) const {
    // Python may be gone, or the thread not one of its own: then there is nothing to release.
    if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) {
      delete object;
      return;
    }
    py::gil_scoped_release unlocked;
    delete object;
  }
};

template <typename Object>
using Held = std::unique_ptr<Object, DeleteUnlocked>;

// Makes an object without the interpreter's lock: pinning memory and loading kernels take a while.
template <typename Object, typename... Arguments>
Held<Object> make_unlocked(Arguments&&... arguments) {
  py::gil_scoped_release unlocked;
  return Held<Object>(new Object(std::forward<Arguments>(arguments)...));
}

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

constexpr double kLongestSeconds = 1e6;

// `seconds` of the option `name`, from `least` to kLongestSeconds. Checked before the conversion,
// which is undefined for what a count of nanoseconds cannot hold.
std::chrono::nanoseconds nanoseconds(const char* name, double seconds, double least) {
  if (!(seconds >= least && seconds <= kLongestSeconds)) {
    throw UsageError(std::string(name) + " " + number_text(seconds) + " is invalid: must be " +
                     number_text(least) + " to " + number_text(kLongestSeconds) + " seconds");
  }
  return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

std::chrono::nanoseconds timeout_of(const char* name, double seconds) {
  return nanoseconds(name, seconds, 1e-9);
}

uint64_t read(const std::atomic<uint64_t>& counter) {
  return counter.load(std::memory_order_relaxed);
}

void put_proxy_counters(py::dict& values, const ProxyCounters* proxy) {
  values["proxy_posts"] = proxy ? read(proxy->posts) : 0;
  values["proxy_coalesced"] = proxy ? read(proxy->coalesced) : 0;
}

void put_link_counters(py::dict& values, const verbs::Link* link) {
  static const verbs::LinkCounters none;
  const verbs::LinkCounters& counters = link != nullptr ? link->counters() : none;
  values["rails_up"] = read(counters.rails_up);
  values["rail_failures"] = read(counters.rail_failures);
  values["rail_recoveries"] = read(counters.rail_recoveries);
  values["rail_proof_failures"] = read(counters.rail_proof_failures);
  values["reposts"] = read(counters.reposts);
  auto by_rail = [](const std::atomic<uint64_t>(&counters)[verbs::kMaxRails]) {
    py::list values;
    for (const auto& rail : counters) values.append(read(rail));
    return py::tuple(values);
  };
  values["rail_posts"] = by_rail(counters.posts);
  values["rail_bytes"] = by_rail(counters.bytes);
  values["rail_doorbells"] = by_rail(counters.doorbells);
  py::list states;
  for (size_t rail = 0; link != nullptr && rail < link->rails(); ++rail) {
    states.append(verbs::kRailConditions[static_cast<uint32_t>(
        counters.conditions[rail].load(std::memory_order_relaxed))]);
  }
  values["rail_states"] = py::tuple(states);
  values["link_lost"] = counters.lost.load(std::memory_order_relaxed);
}

py::dict counters_of(const Rank& rank) {
  CollectiveCounters counters = rank.counters();
  py::dict values;
  values["all_reduces"] = counters.all_reduces;
  values["all_reduce_bytes"] = counters.all_reduce_bytes;
  values["all_gathers"] = counters.all_gathers;
  values["all_gather_bytes"] = counters.all_gather_bytes;
  values["packet_messages"] = counters.packet_messages;
  values["payload_messages"] = counters.payload_messages;
  values["chunked_operations"] = counters.chunked_operations;
  values["wait_seconds"] = counters.wait_seconds;
  put_proxy_counters(values, rank.proxy_counters());
  put_link_counters(values, rank.link());
  values["last_sequence"] = counters.last_sequence;
  return values;
}

py::tuple records_of(const RankRecords& records) {
  static const char* const kinds[] = {"", "all_reduce", "all_gather", ""};
  py::list operations, posts;
  for (const OperationRecord& record : records.operations) {
    operations.append(py::make_tuple(kinds[static_cast<uint32_t>(record.operation.kind) & 3u], record.bytes,
                                     record.sequence, record.messages, record.packets, record.start_ns,
                                     record.sent_ns, record.wait_ns, record.arrived_ns, record.end_ns,
                                     record.waited_ns));
  }
  for (const PostRecord& record : records.posts) {
    posts.append(py::make_tuple(record.sequence, record.piece, record.bytes, record.packets, record.time_ns));
  }
  return py::make_tuple(operations, posts, records.lost);
}

device::Stream stream(uintptr_t handle) {
  return reinterpret_cast<device::Stream>(handle);
}

py::tuple address_of(const Rank& rank) {
  Address address = rank.address();
  return py::make_tuple(address.process, address.descriptor, address.nonce[0], address.nonce[1]);
}

py::list rdma_ports() {
  std::vector<verbs::PortInfo> found;
  {
    py::gil_scoped_release unlocked;
    found = verbs::list_ports();
  }
  py::list ports;
  for (const verbs::PortInfo& info : found) {
    py::list gids;
    for (const verbs::GidInfo& gid : info.gids) {
      gids.append(py::make_tuple(gid.index,
                                 py::bytes(reinterpret_cast<const char*>(gid.gid.raw), sizeof gid.gid.raw),
                                 gid.interface_index));
    }
    ports.append(py::make_tuple(info.device, info.port, info.active, info.ethernet, info.mtu, gids));
  }
  return ports;
}

using RailTuple = std::tuple<std::string, uint8_t, py::bytes, uint32_t>;

std::vector<verbs::RailAddress> rail_addresses(const std::vector<RailTuple>& rails) {
  std::vector<verbs::RailAddress> addresses;
  for (const auto& [device, port, gid, mtu] : rails) {
    std::string raw = gid;
    verbs::RailAddress address{device, port, {}, mtu};
    if (raw.size() != sizeof address.gid.raw) {
      throw UsageError("a GID has 16 bytes, and not " + std::to_string(raw.size()) +
                       "; give those of a rail that local_ports() found");
    }
    std::memcpy(address.gid.raw, raw.data(), raw.size());
    addresses.push_back(std::move(address));
  }
  return addresses;
}

verbs::Link& link_of(const Rank& rank) {
  if (rank.link() == nullptr) throw UsageError("this runtime has no rails; its peer is on this machine");
  return *rank.link();
}

// The base of both runtimes.
void bind_rank(py::module_& module) {
  py::class_<Rank, Held<Rank>>(module, "_Rank")
      .def("address", &address_of)
      .def(
          "connect",
          [](Rank& rank, pid_t process, int descriptor, uint64_t nonce0, uint64_t nonce1,
             const std::string& description) {
            rank.connect({process, descriptor, {nonce0, nonce1}}, description);
          },
          Unlocked())
      .def(
          "open_link",
          [](Rank& rank, const std::vector<RailTuple>& rails, double timeout_s, double rail_timeout_s,
             uint8_t traffic_class, uint8_t service_level) {
            std::vector<verbs::RailAddress> addresses = rail_addresses(rails);
            verbs::LinkOptions options;
            options.timeout = timeout_of("link_timeout_s", timeout_s);
            options.path_options = {traffic_class, service_level,
                                    timeout_of("rail_timeout_s", rail_timeout_s)};
            std::string offer;
            {
              py::gil_scoped_release unlocked;
              offer = rank.open_link(options, addresses);
            }
            return py::bytes(offer);
          },
          py::kw_only(), py::arg("rails"), py::arg("timeout_s"), py::arg("rail_timeout_s"),
          py::arg("traffic_class"), py::arg("service_level"))
      .def("connect_link", &Rank::connect_link, Unlocked())
      .def("start", &Rank::start, Unlocked())
      // It may wait 20 ms for the peer's reason (Endpoint::end_waits).
      .def("abort", &Rank::abort, Unlocked())
      .def("close", &Rank::close, Unlocked())
      .def("wake_proxy", &Rank::wake_proxy)
      .def("start_recording", &Rank::start_recording, py::arg("capacity"))
      .def("stop_recording", [](Rank& rank) { return records_of(rank.stop_recording()); })
      .def("hold_proxy", &Rank::hold_proxy)
      .def("deliver",
           [](Rank& rank, const std::string& announcement) {
             link_of(rank).announcements().deliver(announcement);
           })
      .def("take_announcement", [](Rank& rank) { return py::bytes(link_of(rank).announcements().take()); })
      .def("silence",
           [](const Rank& rank) {
             return std::chrono::duration<double>(link_of(rank).announcements().silence()).count();
           })
      .def("take_log", [](Rank& rank) { return link_of(rank).announcements().take_log(); })
      .def("break_rail", [](Rank& rank, uint32_t rail) { link_of(rank).break_rail(rail); })
      .def_property_readonly(
          "link_ready",
          [](const Rank& rank) { return rank.link() == nullptr ? -1 : rank.link()->announcements().ready(); })
      .def_property_readonly("path", &Rank::path)
      .def("counters", [](const Rank& rank) { return counters_of(rank); })
      .def_property_readonly("closed", &Rank::closed)
      .def_property_readonly("poison", &Rank::poison);
}

using LatencyTuple = std::pair<uint64_t, double>;                       // bytes, microseconds
using RailFiguresTuple = std::pair<std::vector<LatencyTuple>, double>;  // and GB/s

// The names and units of Python's settings; the values are checked where a runtime is made of them.
void bind_options(py::module_& module) {
  py::class_<WireFigures>(module, "WireFigures")
      .def(py::init([](const std::vector<RailFiguresTuple>& rails, double gbytes_per_s, double doorbell_us,
                       double work_request_us) {
             WireFigures figures{{}, gbytes_per_s, doorbell_us * 1e3, work_request_us * 1e3};
             for (const auto& [latency, rate] : rails) {
               RailFigures rail{{}, rate};  // 1 GB/s is a byte in a nanosecond
               for (const auto& [bytes, us] : latency) rail.latency.push_back({bytes, us * 1e3});
               figures.rails.push_back(std::move(rail));
             }
             return figures;
           }),
           py::kw_only(), py::arg("rails"), py::arg("gbytes_per_s"), py::arg("doorbell_us"),
           py::arg("work_request_us"));

  py::class_<Options>(module, "Options")
      .def(py::init([](int rank, uint64_t slot_bytes, uint64_t packet_bytes, uint32_t depth, bool proxied,
                       const std::optional<WireFigures>& wire, uint32_t stripes, double timeout_s,
                       uint32_t first_sequence, uint64_t largest_message, uint32_t clear_interval) {
             Options options;
             options.rank = rank;
             options.sizes = {slot_bytes, packet_bytes, 2 * depth};
             options.depth = depth;
             options.proxied = proxied;
             if (wire) options.wire = *wire;
             options.stripes = stripes;
             options.timeout = timeout_of("timeout_s", timeout_s);
             options.first_sequence = first_sequence;
             options.largest_message = largest_message;
             options.clear_interval = clear_interval;
             return options;
           }),
           py::kw_only(), py::arg("rank"), py::arg("slot_bytes"), py::arg("packet_bytes"), py::arg("depth"),
           py::arg("proxied"), py::arg("wire") = py::none(), py::arg("stripes"), py::arg("timeout_s"),
           py::arg("first_sequence"), py::arg("largest_message"),
           py::arg("clear_interval") = Options().clear_interval);

  using device::LaunchShape;
  py::class_<LaunchShape>(module, "LaunchShape")
      .def(py::init([](uint32_t packet_threads, uint32_t payload_threads, uint32_t payload_blocks,
                       uint32_t payload_bytes_per_block, uint32_t payload_message_bytes,
                       bool dependent_launch) {
             return LaunchShape{packet_threads,          payload_threads,       payload_blocks,
                                payload_bytes_per_block, payload_message_bytes, dependent_launch};
           }),
           py::kw_only(), py::arg("packet_threads"), py::arg("payload_threads"), py::arg("payload_blocks"),
           py::arg("payload_bytes_per_block"), py::arg("payload_message_bytes"), py::arg("dependent_launch"));
}

void bind_machine_probe(py::module_& module) {
  using device::MachineProbe;
  py::class_<MachineProbe, Held<MachineProbe>>(module, "MachineProbe")
      .def(py::init([](const py::bytes& kernels) {
             std::string image = kernels;
             return make_unlocked<MachineProbe>(image);
           }),
           py::arg("kernels"))
      .def(
          "round_trip",
          [](const MachineProbe& self, uint32_t count, double timeout_s, uintptr_t handle) {
            return self.round_trip(count, timeout_of("timeout_s", timeout_s), stream(handle));
          },
          Unlocked(), py::arg("count"), py::arg("timeout_s"), py::arg("stream"))
      .def(
          "launch_nothing",
          [](const MachineProbe& self, uintptr_t handle) { self.launch_nothing(stream(handle)); },
          py::arg("stream"));
}

void bind_wire_probe(py::module_& module) {
  using verbs::WireProbe;
  auto probe = py::class_<WireProbe, Held<WireProbe>>(module, "WireProbe");
  probe.attr("MAX_DEPTH") = WireProbe::kMaxDepth;
  probe
      .def(py::init([](const std::vector<RailTuple>& rails, uint64_t largest, double timeout_s,
                       double rail_timeout_s, uint8_t traffic_class, uint8_t service_level,
                       const std::function<void()>& attend) {
             verbs::ProbeOptions options{
                 largest,
                 timeout_of("timeout_s", timeout_s),
                 {traffic_class, service_level, timeout_of("rail_timeout_s", rail_timeout_s)},
                 attend};
             return make_unlocked<WireProbe>(options, rail_addresses(rails));
           }),
           py::kw_only(), py::arg("rails"), py::arg("largest"), py::arg("timeout_s"),
           py::arg("rail_timeout_s"), py::arg("traffic_class"), py::arg("service_level"), py::arg("attend"))
      .def("offer", [](const WireProbe& self) { return py::bytes(self.offer()); })
      .def("connect", &WireProbe::connect, Unlocked())
      .def("ping", &WireProbe::ping, Unlocked())
      .def("answer", &WireProbe::answer, Unlocked())
      .def("stream", &WireProbe::stream, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native collective runtime; see vllm_spark.collective for the public interface.";

  auto collective_error =
      py::register_exception<CollectiveError>(module, "CollectiveError", PyExc_RuntimeError);
  py::object value_error = py::reinterpret_borrow<py::object>(PyExc_ValueError);
  py::register_exception<UsageError>(module, "UsageError", py::make_tuple(collective_error, value_error));
  py::register_exception<MismatchError>(module, "MismatchError", collective_error);
  py::register_exception<TimeoutError>(module, "CollectiveTimeoutError", collective_error);
  py::register_exception<AbortedError>(module, "CollectiveAbortedError", collective_error);
  py::register_exception<PoisonedError>(module, "PoisonedError", collective_error);

  py::enum_<DType>(module, "DType")
      .value("FLOAT32", DType::kFloat32)
      .value("FLOAT16", DType::kFloat16)
      .value("BFLOAT16", DType::kBFloat16);

  module.def("rdma_ports", &rdma_ports,
             "Every port of every RDMA device: name, port, active, Ethernet, MTU, GIDs.");

  module.def(
      "region_bytes",
      [](uint64_t slot_bytes, uint64_t packet_bytes, uint32_t depth) {
        return RegionLayout({slot_bytes, packet_bytes, 2 * depth}).total();
      },
      py::kw_only(), py::arg("slot_bytes"), py::arg("packet_bytes"), py::arg("depth"),
      "The size of one rank's region: control, receive slots and send slots.");

  module.attr("WORLD_SIZE") = kWorldSize;
  module.attr("MAX_RAILS") = verbs::kMaxRails;
  module.attr("REGION_VERSION") = kRegionVersion;
  module.attr("MAX_DEPTH") = kMaxSlots / 2;

  bind_options(module);

  bind_rank(module);
  auto runtime = py::class_<CpuRank, Rank, Held<CpuRank>>(module, "Runtime");
  runtime.def(py::init([](const Options& options) { return make_unlocked<CpuRank>(options); }),
              py::arg("options"));
  runtime
      .def(
          "all_reduce",
          [](CpuRank& self, uintptr_t in, uintptr_t out, uint64_t elements, DType dtype) {
            self.all_reduce(pointer(in), pointer(out), elements, dtype);
          },
          Unlocked())
      .def(
          "all_gather",
          [](CpuRank& self, uintptr_t in, uintptr_t out, uint64_t outer, uint64_t inner_bytes) {
            self.all_gather(pointer(in), pointer(out), outer, inner_bytes);
          },
          Unlocked());

  using device::GpuRank;
  auto device_runtime = py::class_<GpuRank, Rank, Held<GpuRank>>(module, "DeviceRuntime");
  device_runtime.def(py::init([](const Options& options, const device::LaunchShape& shape,
                                 const py::bytes& kernels, bool driver_memory) {
                       std::string image = kernels;
                       return make_unlocked<GpuRank>(options, shape, image, driver_memory);
                     }),
                     py::arg("options"), py::arg("shape"), py::arg("kernels"),
                     py::arg("driver_memory") = false);
  // A launch takes microseconds, but it waits while the driver's queue of launches is full, as it is when the
  // kernels in front wait for the peer. `check` reads a word that the kernels write, and calls no driver.
  device_runtime
      .def(
          "all_reduce",
          [](GpuRank& self, uintptr_t in, uintptr_t out, uint64_t elements, DType dtype, uintptr_t handle) {
            self.all_reduce(pointer(in), pointer(out), elements, dtype, stream(handle));
          },
          Unlocked())
      .def(
          "all_gather",
          [](GpuRank& self, uintptr_t in, uintptr_t out, uint64_t outer, uint64_t inner_bytes,
             uintptr_t handle) {
            self.all_gather(pointer(in), pointer(out), outer, inner_bytes, stream(handle));
          },
          Unlocked())
      .def("check", &GpuRank::check)
      .def_property_readonly_static("limits_kernel_time",
                                    [](const py::object&) { return device::limits_kernel_time(); });

  bind_wire_probe(module);
  bind_machine_probe(module);
}

}  // namespace spark
