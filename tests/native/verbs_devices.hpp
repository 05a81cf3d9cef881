// What the libraries of tests in libibverbs' place have in common: two devices with an active port each,
// named memory0 and memory1. The source that includes it defines `poll`, `post` and
// `reports_ports`, and what is made of memory regions, completion queues and queue pairs.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "../../csrc/transport/verbs/abi.hpp"

namespace abi = spark::verbs::abi;

struct abi::ibv_device {
  const char* name;
  std::atomic<bool> active{true};  // its port
};
// What opened a device.
struct OpenDevice {
  abi::ibv_context context{};
  bool active = true;  // the port's state that was reported last
};
// Each rail opens its device for itself, and has one domain: the ranks' rails in the order of their opening.
struct abi::ibv_pd {
  const abi::ibv_device* device;
  int number;
};

namespace {

abi::ibv_device devices[] = {{"memory0"}, {"memory1"}};
int domains = 0;  // opened so far; tests open devices from one thread

int poll(abi::ibv_cq* queue, int entries, abi::ibv_wc* completions);
int post(abi::ibv_qp* pair, abi::ibv_send_wr* request, abi::ibv_send_wr** failed);
bool reports_ports();  // whether a change of a port is an event for all that have opened the device

}  // namespace

extern "C" {

abi::ibv_device** ibv_get_device_list(int* count) {
  *count = 2;
  return new abi::ibv_device*[3]{&devices[0], &devices[1], nullptr};
}
void ibv_free_device_list(abi::ibv_device** list) {
  delete[] list;
}
const char* ibv_get_device_name(abi::ibv_device* device) {
  return device->name;
}
abi::ibv_context* ibv_open_device(abi::ibv_device* device) {
  auto* open = new OpenDevice;
  open->active = device->active;
  open->context.device = device;
  open->context.ops[abi::kPollCq] = reinterpret_cast<void*>(&poll);
  open->context.ops[abi::kPostSend] = reinterpret_cast<void*>(&post);
  open->context.async_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  return &open->context;
}
int ibv_close_device(abi::ibv_context* context) {
  close(context->async_fd);
  delete reinterpret_cast<OpenDevice*>(context);
  return 0;
}
abi::ibv_pd* ibv_alloc_pd(abi::ibv_context* context) {
  return new abi::ibv_pd{context->device, domains++};
}
int ibv_dealloc_pd(abi::ibv_pd* domain) {
  delete domain;
  return 0;
}
int ibv_query_port(abi::ibv_context* context, uint8_t port, abi::ibv_port_attr* attributes) {
  if (port != 1) return EINVAL;
  attributes->state = context->device->active ? abi::IBV_PORT_ACTIVE : abi::IBV_PORT_DOWN;
  attributes->active_mtu = 5;
  attributes->gid_tbl_len = 1;
  attributes->link_layer = abi::IBV_LINK_LAYER_ETHERNET;
  return 0;
}
int _ibv_query_gid_ex(abi::ibv_context*, uint32_t port, uint32_t index, abi::ibv_gid_entry* entry, uint32_t,
                      size_t) {
  *entry = {{}, index, port, abi::IBV_GID_TYPE_ROCE_V2, 0};
  return 0;
}
int ibv_get_async_event(abi::ibv_context* context, abi::ibv_async_event* event) {
  auto* open = reinterpret_cast<OpenDevice*>(context);
  bool active = context->device->active;
  if (!reports_ports() || active == open->active) {
    errno = EAGAIN;
    return -1;
  }
  open->active = active;
  event->element.port_num = 1;
  event->event_type = active ? abi::IBV_EVENT_PORT_ACTIVE : abi::IBV_EVENT_PORT_ERR;
  return 0;
}
const char* ibv_wc_status_str(uint32_t status) {
  return status == abi::IBV_WC_RETRY_EXC_ERR ? "transport retry counter exceeded" : "an error";
}
const char* ibv_event_type_str(uint32_t event) {
  return event == abi::IBV_EVENT_PORT_ERR ? "port error" : "port active";
}
int ibv_fork_init() {
  return 0;
}
void ibv_ack_async_event(abi::ibv_async_event*) {}

}  // extern "C"
