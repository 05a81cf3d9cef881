// What the libraries of tests in libibverbs' place have in common: two devices with an active port each,
// named memory0 and memory1. Who includes it defines `poll` and `post`, and what is made of memory regions,
// completion queues and queue pairs.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "../../csrc/transport/verbs/abi.hpp"

namespace abi = spark::verbs::abi;

struct abi::Device {
  const char* name;
  bool active = true;  // its port
};
// Each rail opens its device for itself, and has one domain: the ranks' rails in the order of their opening.
struct abi::ProtectionDomain {
  const abi::Device* device;
  int number;
};

namespace {

abi::Device devices[] = {{"memory0"}, {"memory1"}};
int domains = 0;  // opened so far; tests open devices from one thread

int poll(abi::CompletionQueue* queue, int entries, abi::Completion* completions);
int post(abi::QueuePair* pair, abi::SendRequest* request, abi::SendRequest** failed);

}  // namespace

extern "C" {

abi::Device** ibv_get_device_list(int* count) {
  *count = 2;
  return new abi::Device*[3]{&devices[0], &devices[1], nullptr};
}
void ibv_free_device_list(abi::Device** list) {
  delete[] list;
}
const char* ibv_get_device_name(abi::Device* device) {
  return device->name;
}
abi::Context* ibv_open_device(abi::Device* device) {
  auto* context = new abi::Context{};
  context->device = device;
  context->operations[abi::kPollCompletions] = reinterpret_cast<void*>(&poll);
  context->operations[abi::kPostSend] = reinterpret_cast<void*>(&post);
  context->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  return context;
}
int ibv_close_device(abi::Context* context) {
  close(context->event_fd);
  delete context;
  return 0;
}
abi::ProtectionDomain* ibv_alloc_pd(abi::Context* context) {
  return new abi::ProtectionDomain{context->device, domains++};
}
int ibv_dealloc_pd(abi::ProtectionDomain* domain) {
  delete domain;
  return 0;
}
int ibv_query_port(abi::Context* context, uint8_t port, abi::PortAttributes* attributes) {
  if (port != 1) return EINVAL;
  attributes->state = context->device->active ? abi::kPortActive : 1u;  // IBV_PORT_DOWN
  attributes->active_mtu = 5;
  attributes->gid_count = 1;
  attributes->link_layer = abi::kEthernet;
  return 0;
}
int _ibv_query_gid_ex(abi::Context*, uint32_t port, uint32_t index, abi::GidEntry* entry, uint32_t, size_t) {
  *entry = {{}, index, port, abi::kRoceV2, 0};
  return 0;
}
int ibv_get_async_event(abi::Context*, abi::Event*) {
  errno = EAGAIN;
  return -1;
}
const char* ibv_wc_status_str(uint32_t status) {
  constexpr uint32_t kRetriesExceeded = 12;
  return status == kRetriesExceeded ? "transport retry counter exceeded" : "an error";
}
const char* ibv_event_type_str(uint32_t) {
  return "an event";
}
int ibv_fork_init() {
  return 0;
}
void ibv_ack_async_event(abi::Event*) {}

}  // extern "C"
