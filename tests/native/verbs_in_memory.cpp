// A libibverbs whose two devices copy within one process: for counting what our own code does for a message,
// which no emulated NIC lets one see. Not for correctness: that is shown on real queue pairs in tests/rdma.
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <deque>

#include "../../csrc/transport/verbs/abi.hpp"

namespace abi = spark::verbs::abi;

struct abi::Device {
  const char* name;
};
struct abi::ProtectionDomain {};
struct abi::CompletionQueue {
  std::deque<abi::Completion> completions;
};

namespace {

abi::Device devices[] = {{"memory0"}, {"memory1"}};
uint32_t next_number = 1;

int poll(abi::CompletionQueue* queue, int entries, abi::Completion* completions) {
  int count = 0;
  for (; count < entries && !queue->completions.empty(); ++count) {
    completions[count] = queue->completions.front();
    queue->completions.pop_front();
  }
  return count;
}

int post(abi::QueuePair* pair, abi::SendRequest* request, abi::SendRequest**) {
  for (; request != nullptr; request = request->next) {
    std::memcpy(reinterpret_cast<void*>(request->remote_address),
                reinterpret_cast<const void*>(request->pieces->address), request->pieces->length);
    if ((request->flags & abi::kSignaled) == 0) continue;
    abi::Completion completion{};
    completion.id = request->id;
    pair->send_completions->completions.push_back(completion);
  }
  return 0;
}

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
  context->event_fd = eventfd(0, EFD_CLOEXEC);
  return context;
}
int ibv_close_device(abi::Context* context) {
  close(context->event_fd);
  delete context;
  return 0;
}
abi::ProtectionDomain* ibv_alloc_pd(abi::Context*) {
  return new abi::ProtectionDomain;
}
int ibv_dealloc_pd(abi::ProtectionDomain* domain) {
  delete domain;
  return 0;
}
abi::MemoryRegion* ibv_reg_mr(abi::ProtectionDomain*, void* memory, size_t bytes, int) {
  auto* region = new abi::MemoryRegion{};
  region->address = memory;
  region->length = bytes;
  region->local_key = region->remote_key = next_number++;
  return region;
}
int ibv_dereg_mr(abi::MemoryRegion* region) {
  delete region;
  return 0;
}
abi::CompletionQueue* ibv_create_cq(abi::Context*, int, void*, void*, int) {
  return new abi::CompletionQueue;
}
int ibv_destroy_cq(abi::CompletionQueue* queue) {
  delete queue;
  return 0;
}
abi::QueuePair* ibv_create_qp(abi::ProtectionDomain*, abi::QueuePairSetup* setup) {
  auto* pair = new abi::QueuePair{};
  pair->send_completions = setup->send_completions;
  pair->number = next_number++;
  return pair;
}
int ibv_modify_qp(abi::QueuePair*, abi::QueuePairAttributes*, int) {
  return 0;
}
int ibv_destroy_qp(abi::QueuePair* pair) {
  delete pair;
  return 0;
}
int ibv_query_port(abi::Context*, uint8_t port, abi::PortAttributes* attributes) {
  if (port != 1) return EINVAL;
  attributes->state = abi::kPortActive;
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
  return -1;
}
void ibv_ack_async_event(abi::Event*) {}
const char* ibv_wc_status_str(uint32_t) {
  return "an error";
}
const char* ibv_event_type_str(uint32_t) {
  return "an event";
}
int ibv_fork_init() {
  return 0;
}

}  // extern "C"
