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

struct abi::ibv_cq {
  std::deque<abi::ibv_wc> completions;
};

namespace {

uint32_t next_number = 1;

int poll(abi::ibv_cq* queue, int entries, abi::ibv_wc* completions) {
  int count = 0;
  for (; count < entries && !queue->completions.empty(); ++count) {
    completions[count] = queue->completions.front();
    queue->completions.pop_front();
  }
  return count;
}

// Both ranks have opened the same devices.
bool reports_ports() {
  return false;
}

int post(abi::ibv_qp* pair, abi::ibv_send_wr* request, abi::ibv_send_wr**) {
  for (; request != nullptr; request = request->next) {
    std::memcpy(reinterpret_cast<void*>(request->wr.rdma.remote_addr),
                reinterpret_cast<const void*>(request->sg_list->addr), request->sg_list->length);
    if ((request->send_flags & abi::IBV_SEND_SIGNALED) == 0) continue;
    abi::ibv_wc completion{};
    completion.wr_id = request->wr_id;
    pair->send_cq->completions.push_back(completion);
  }
  return 0;
}

}  // namespace

extern "C" {

abi::ibv_mr* ibv_reg_mr(abi::ibv_pd*, void* memory, size_t bytes, int) {
  if (std::getenv("REFUSE_PINNING") != nullptr) {
    errno = ENOMEM;
    return nullptr;
  }
  trace("nic-register", memory, bytes);
  auto* region = new abi::ibv_mr{};
  region->addr = memory;
  region->length = bytes;
  region->lkey = region->rkey = next_number++;
  return region;
}
int ibv_dereg_mr(abi::ibv_mr* region) {
  delete region;
  return 0;
}
abi::ibv_cq* ibv_create_cq(abi::ibv_context*, int, void*, void*, int) {
  return new abi::ibv_cq;
}
int ibv_destroy_cq(abi::ibv_cq* queue) {
  delete queue;
  return 0;
}
abi::ibv_qp* ibv_create_qp(abi::ibv_pd*, abi::ibv_qp_init_attr* setup) {
  auto* pair = new abi::ibv_qp{};
  pair->send_cq = setup->send_cq;
  pair->qp_num = next_number++;
  return pair;
}
// The time between two transmissions of a packet that the last queue pair was given, for tests.
int transmission_timeout = 0;
int ibv_modify_qp(abi::ibv_qp*, abi::ibv_qp_attr* attributes, int mask) {
  if ((mask & abi::IBV_QP_TIMEOUT) != 0) transmission_timeout = attributes->timeout;
  return 0;
}
int ibv_destroy_qp(abi::ibv_qp* pair) {
  delete pair;
  return 0;
}

}  // extern "C"
