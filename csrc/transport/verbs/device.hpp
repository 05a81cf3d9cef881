// RDMA devices of this machine: what there is, and an open one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "library.hpp"

namespace spark::verbs {

// One RoCE v2 address of a port.
struct GidInfo {
  uint32_t index;
  abi::ibv_gid gid;
  uint32_t interface_index;  // of the network interface it belongs to; 0 if there is none
};

struct PortInfo {
  std::string device;
  uint8_t port;
  bool active;
  bool ethernet;
  uint32_t mtu;  // bytes of payload in a packet
  std::vector<GidInfo> gids;
};

// Every port of every device. Throws CollectiveError where libibverbs is missing.
std::vector<PortInfo> list_ports();

// MTUs travel as 1 to 5 for 256 to 4096 bytes.
constexpr uint32_t mtu_bytes(uint32_t code) {
  return 128u << code;
}
constexpr uint32_t mtu_code(uint32_t bytes) {
  uint32_t code = 1;
  while (code < 5 && mtu_bytes(code + 1) <= bytes) ++code;
  return code;
}

// An asynchronous event of a device or one of its ports.
struct DeviceEvent {
  bool fatal;     // the device, a port or a queue pair does not work any more
  uint32_t port;  // 0: not about a port
  void* queue_pair;
  std::string text;
};

class Device {
 public:
  // Throws CollectiveError if libibverbs knows none of that name, or it cannot be opened.
  explicit Device(const std::string& name);
  // A device of `library` that has been opened; it is closed with this object, also if this throws
  // CollectiveError. `library` must outlive it.
  Device(const std::string& name, const Library& library, abi::ibv_context* opened);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const { return name_; }
  const Library& library() const { return library_; }
  abi::ibv_context* context() const { return context_; }
  abi::ibv_pd* domain() const { return domain_; }

  // True while the port can carry traffic.
  bool port_active(uint8_t port) const;
  // Where the RoCE v2 address `gid` stands in the port's table now: an interface that was down has it
  // elsewhere. Throws CollectiveError if it is not there.
  uint32_t gid_index(uint8_t port, const abi::ibv_gid& gid) const;
  // The next event that has come, if any; never waits.
  bool next_event(DeviceEvent& event) const;

 private:
  std::string name_;
  const Library& library_;
  abi::ibv_context* context_;
  abi::ibv_pd* domain_ = nullptr;
};

}  // namespace spark::verbs
