#include "device.hpp"

#include <fcntl.h>

#include <cerrno>
#include <cstring>

#include "../../support/errors.hpp"

namespace spark::verbs {
namespace {

// libibverbs fills the form of its first version, which is a part of this one.
abi::ibv_port_attr query_port(const Library& library, abi::ibv_context* context, uint8_t port, bool& exists) {
  abi::ibv_port_attr attributes{};
  exists = library.query_port(context, port, &attributes) == 0;
  return attributes;
}

class DeviceList {
 public:
  DeviceList() : devices_(Library::get().get_device_list(&count_)) {}
  ~DeviceList() {
    if (devices_ != nullptr) Library::get().free_device_list(devices_);
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;

  abi::ibv_device** begin() const { return devices_; }
  abi::ibv_device** end() const { return devices_ == nullptr ? nullptr : devices_ + count_; }

 private:
  int count_ = 0;
  abi::ibv_device** devices_;
};

constexpr uint8_t kMostPorts = 4;

std::vector<GidInfo> list_gids(const Library& library, abi::ibv_context* context, uint8_t port, int count) {
  std::vector<GidInfo> gids;
  for (int index = 0; index < count; ++index) {
    abi::ibv_gid_entry entry{};
    if (library.query_gid(context, port, static_cast<uint32_t>(index), &entry, 0, sizeof entry) != 0) {
      continue;  // an empty place of the table
    }
    if (entry.gid_type != abi::IBV_GID_TYPE_ROCE_V2) continue;
    gids.push_back({entry.gid_index, entry.gid, entry.ndev_ifindex});
  }
  return gids;
}

}  // namespace

std::vector<PortInfo> list_ports() {
  const Library& library = Library::get();
  std::vector<PortInfo> ports;
  for (abi::ibv_device* device : DeviceList()) {
    abi::ibv_context* context = library.open_device(device);
    if (context == nullptr) continue;  // another user's, or going away
    for (uint8_t port = 1; port <= kMostPorts; ++port) {
      bool exists = false;
      abi::ibv_port_attr attributes = query_port(library, context, port, exists);
      if (!exists) break;
      ports.push_back({library.get_device_name(device), port, attributes.state == abi::IBV_PORT_ACTIVE,
                       attributes.link_layer == abi::IBV_LINK_LAYER_ETHERNET,
                       mtu_bytes(attributes.active_mtu),
                       list_gids(library, context, port, attributes.gid_tbl_len)});
    }
    library.close_device(context);
  }
  return ports;
}

namespace {

abi::ibv_context* open_device(const std::string& name) {
  const Library& library = Library::get();
  std::string known;
  for (abi::ibv_device* device : DeviceList()) {
    const char* found = library.get_device_name(device);
    known += (known.empty() ? "" : ", ") + std::string(found);
    if (name != found) continue;
    if (abi::ibv_context* context = library.open_device(device)) return context;
  }
  throw CollectiveError("the RDMA device " + name + " cannot be opened; this machine has " +
                        (known.empty() ? "none" : known) + ", and this user needs access to /dev/infiniband");
}

}  // namespace

Device::Device(const std::string& name) : Device(name, Library::get(), open_device(name)) {}

Device::Device(const std::string& name, const Library& library, abi::ibv_context* opened)
    : name_(name), library_(library), context_(opened) {
  domain_ = library.alloc_pd(context_);
  // Events are polled by the proxy's thread, which must not block.
  int flags = fcntl(context_->async_fd, F_GETFL);
  if (domain_ == nullptr || flags < 0 || fcntl(context_->async_fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    std::string why = std::strerror(errno);
    if (domain_ != nullptr) library.dealloc_pd(domain_);
    library.close_device(context_);
    throw CollectiveError("the RDMA device " + name + " does not work (" + why + "); see the kernel's log");
  }
}

Device::~Device() {
  library_.dealloc_pd(domain_);
  library_.close_device(context_);
}

bool Device::port_active(uint8_t port) const {
  bool exists = false;
  abi::ibv_port_attr attributes = query_port(library_, context_, port, exists);
  return exists && attributes.state == abi::IBV_PORT_ACTIVE;
}

uint32_t Device::gid_index(uint8_t port, const abi::ibv_gid& gid) const {
  bool exists = false;
  int count = query_port(library_, context_, port, exists).gid_tbl_len;
  for (const GidInfo& info : list_gids(library_, context_, port, exists ? count : 0)) {
    if (std::memcmp(info.gid.raw, gid.raw, sizeof gid.raw) == 0) return info.index;
  }
  throw CollectiveError("port " + std::to_string(port) + " of the RDMA device " + name_ +
                        " has lost the address that it was chosen by; see that its network interface is up");
}

bool Device::next_event(DeviceEvent& event) const {
  abi::ibv_async_event raw{};
  if (library_.get_async_event(context_, &raw) != 0) return false;
  event = {false, 0, nullptr, library_.event_text(raw.event_type)};
  switch (raw.event_type) {
    case abi::IBV_EVENT_PORT_ERR:
      event.fatal = true;
      [[fallthrough]];
    case abi::IBV_EVENT_PORT_ACTIVE:
      event.port = static_cast<uint32_t>(raw.element.port_num);
      break;
    case abi::IBV_EVENT_QP_FATAL:
    case abi::IBV_EVENT_QP_REQ_ERR:
    case abi::IBV_EVENT_QP_ACCESS_ERR:
      event.fatal = true;
      event.queue_pair = raw.element.qp;
      break;
    case abi::IBV_EVENT_DEVICE_FATAL:
      event.fatal = true;
      break;
    default:
      break;
  }
  library_.ack_async_event(&raw);
  return true;
}

}  // namespace spark::verbs
