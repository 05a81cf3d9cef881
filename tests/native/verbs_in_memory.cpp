// A libibverbs whose two devices copy within one process: for counting what our own code does for a message,
// which no emulated NIC lets one see. Not for correctness: that is shown on real queue pairs in tests/rdma.
//
// With the variable REFUSE_PINNING no memory can be registered (ENOMEM).

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "trace.hpp"
#include "verbs_devices.hpp"

struct abi::CompletionQueue {
  std::deque<abi::Completion> completions;
};

namespace {

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

abi::MemoryRegion* ibv_reg_mr(abi::ProtectionDomain*, void* memory, size_t bytes, int) {
  if (std::getenv("REFUSE_PINNING") != nullptr) {
    errno = ENOMEM;
    return nullptr;
  }
  trace("nic-register", memory, bytes);
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

}  // extern "C"
