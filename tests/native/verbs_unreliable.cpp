// A libibverbs whose devices copy within one process, and fail: by chance connections break and posts are
// refused while writes are under way, some of which still arrive afterwards, until the peer has ended its
// end. For sanitizers and for the link's state machine; real queue pairs are in tests/rdma.
//
// What it does is set by environment variables. Each may be absent, which is never:
//
//   BREAK_EVERY    posts from one broken connection to the next, on average
//   REFUSE_EVERY   requests from one that is refused to the next, on average
//   FAULTY_DEVICE  memory0, memory1 or `both`: the rails whose connections come up and then lose writes
//   LOSE_OVER      on these, writes of more bytes than this are lost; -1: all writes
//   LOSE_FROM      on these, everything from this write of a connection on is lost
//   LOSE_ONE_WAY   if 1, only what the rank that opened its devices first sends is lost
//   RETRY_MS       after so long a connection whose write was lost is broken
//   REFUSE_CONNECT memory0, memory1 or `both`: the rails that cannot be connected (ETIMEDOUT, as where nobody
//                  answers for the peer's address), until they are healed
//
// Compiled without sanitizers, and it locks with a spinning flag: its lock must not order the ranks' threads,
// or a thread sanitizer would take that order for one that the code under test has made. Of what really is
// ordered, a write after its posting and its last word's reader after it, the sanitizer is told.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "verbs_devices.hpp"

// Of a thread sanitizer's runtime; null without one.
extern "C" void __tsan_acquire(void* address) __attribute__((weak));
extern "C" void __tsan_release(void* address) __attribute__((weak));

namespace {

constexpr uint32_t kVendorError = 0x81;

struct Write {
  uint64_t id;
  uint64_t target;
  uint32_t key;
  bool signaled;
  const unsigned char* source;
  uint32_t bytes;
  unsigned char* posting;             // stands for the moment at which it was posted
  std::vector<unsigned char> copied;  // inline data, or what had left memory when the connection broke

  void copy() {
    if (copied.empty()) copied.assign(source, source + bytes);
  }
};

struct End {
  abi::ibv_pd domain{};
  uint64_t carried = 0;  // writes that have arrived
  std::optional<std::chrono::steady_clock::time_point>
      lost;  // when a write was lost first: nothing arrives any more
  abi::ibv_qp pair{};
  abi::ibv_qp_state state = abi::IBV_QPS_RESET;
  uint32_t destination = 0;
  std::deque<Write> under_way;
};

struct Keys {
  uintptr_t start;
  size_t bytes;
};

std::atomic_flag locked = ATOMIC_FLAG_INIT;

class Lock {
 public:
  Lock() {
    while (locked.test_and_set(std::memory_order_acquire)) sched_yield();
  }
  ~Lock() { locked.clear(std::memory_order_release); }
};

}  // namespace

struct abi::ibv_cq {
  std::deque<abi::ibv_wc> completions;
};

namespace {

// Behind `Lock`, all of them; never destroyed, for the wire runs on while the process ends.
auto& ends = *new std::map<uint32_t, End*>;
auto& regions = *new std::map<uint32_t, Keys>;
uint32_t next_number = 1;
std::minstd_rand chance(7);
constexpr uint64_t kPostings = 1 << 16;  // more than are ever under way
constexpr uint32_t kWord = 8;            // bytes that a reader sees at once
unsigned char postings[kPostings];
bool healed = false;  // FAULTY_DEVICE is not faulty any more
std::map<std::string, uint64_t>& connections = *new std::map<std::string, uint64_t>;  // made, by device
std::string& refusing = *new std::string;  // which rails cannot be connected
int refusing_from = 0;                     // and of which ranks: of domains from this number on
uint64_t posted = 0, next_break = 0, breaks = 0, late = 0, refused = 0, refused_posts = 0, early = 0;
uint64_t refuse_from = 0;  // requests of the next chain that is refused; 0: none

int64_t number_from(const char* variable, int64_t absent) {
  const char* text = std::getenv(variable);
  return text == nullptr ? absent : std::strtoll(text, nullptr, 10);
}

// What the environment says. Zero intervals: never.
struct Faults {
  uint64_t break_interval = static_cast<uint64_t>(number_from("BREAK_EVERY", 0));
  uint64_t refusal_interval = static_cast<uint64_t>(number_from("REFUSE_EVERY", 0));
  std::string device = std::getenv("FAULTY_DEVICE") == nullptr ? "" : std::getenv("FAULTY_DEVICE");
  int64_t lose_over = number_from("LOSE_OVER", INT64_MAX);
  uint64_t lose_from = static_cast<uint64_t>(number_from("LOSE_FROM", INT64_MAX));
  bool one_way = number_from("LOSE_ONE_WAY", 0) == 1;
  std::chrono::milliseconds retry{number_from("RETRY_MS", 500)};
  std::string refused = std::getenv("REFUSE_CONNECT") == nullptr ? "" : std::getenv("REFUSE_CONNECT");
};

const Faults& faults() {
  static const Faults faults;
  return faults;
}

bool covers(const std::string& which, const End& end) {
  return which == "both" || which == end.domain.device->name;
}

bool refuses_to_connect(const End& end) {
  if (covers(refusing, end) && end.domain.number >= refusing_from) return true;
  return !healed && covers(faults().refused, end);
}

bool is_faulty(const End& end) {
  if (healed || !covers(faults().device, end)) return false;
  return !faults().one_way || end.domain.number < 2;
}

// Whether the wire has lost this write of `end`, or one before it: a reliable connection delivers in order.
bool is_lost(End& end, const Write& write) {
  if (end.lost) return true;
  if (!is_faulty(end)) return false;
  if (static_cast<int64_t>(write.bytes) <= faults().lose_over && end.carried + 1 < faults().lose_from)
    return false;
  end.lost = std::chrono::steady_clock::now();
  return true;
}

void complete(End& end, uint64_t id, uint32_t status) {
  abi::ibv_wc completion{};
  completion.wr_id = id;
  completion.status = status;
  if (status == abi::IBV_WC_RETRY_EXC_ERR) completion.vendor_err = kVendorError;
  end.pair.send_cq->completions.push_back(completion);
}

// What has not been acknowledged fails; what is on the wire stays there, for `carry` to deliver late.
void break_down(End& end, uint32_t status) {
  end.state = abi::IBV_QPS_ERR;
  for (Write& write : end.under_way) {
    write.copy();
    complete(end, write.id, status);
    status = abi::IBV_WC_WR_FLUSH_ERR;
  }
}

bool peer_receives(const End& end) {
  auto peer = ends.find(end.destination);
  return peer != ends.end() &&
         (peer->second->state == abi::IBV_QPS_RTR || peer->second->state == abi::IBV_QPS_RTS);
}

// Whether an earlier write to the same place is still on its way over a broken connection, and may come last.
bool may_be_overwritten(const abi::ibv_send_wr& request) {
  auto region = regions.find(request.wr.rdma.rkey);
  if (region == regions.end()) return false;  // it does not arrive
  // The inbox, where announcements come in any order; they have versions.
  if (request.wr.rdma.remote_addr == region->second.start) return false;
  return std::any_of(ends.begin(), ends.end(), [&](const auto& numbered) {
    const End& end = *numbered.second;
    return end.state == abi::IBV_QPS_ERR && peer_receives(end) &&
           std::any_of(end.under_way.begin(), end.under_way.end(),
                       [&](const Write& write) { return write.target == request.wr.rdma.remote_addr; });
  });
}

// Puts a write's bytes where they belong, in their order, if the peer's end still takes them.
bool arrive(const End& end, const Write& write) {
  if (!peer_receives(end)) return false;
  auto region = regions.find(write.key);
  if (region == regions.end() || write.target < region->second.start ||
      write.target + write.bytes > region->second.start + region->second.bytes) {
    ++refused;
    return false;
  }
  auto* to = reinterpret_cast<volatile unsigned char*>(write.target);
  if (__tsan_acquire != nullptr) __tsan_acquire(write.posting);
  const volatile unsigned char* from = write.copied.empty() ? write.source : write.copied.data();
  // A NIC reads 16 aligned bytes at once. Here the second half is read first: if the flag of a wide packet is
  // new, its data is, too.
  unsigned char packet[2 * kWord];
  for (uint32_t at = 0; at < write.bytes; ++at) {
    uint32_t in_packet = at % sizeof packet;
    if (in_packet == 0) {
      uint32_t bytes = std::min<uint32_t>(sizeof packet, write.bytes - at);
      for (uint32_t half = 2; half-- > 0;) {
        for (uint32_t byte = half * kWord; byte < std::min(bytes, (half + 1) * kWord); ++byte)
          packet[byte] = from[at + byte];
        std::atomic_thread_fence(std::memory_order_acquire);
      }
    }
    if (at % kWord == 0) {
      std::atomic_thread_fence(std::memory_order_release);
      if (__tsan_release != nullptr) __tsan_release(reinterpret_cast<void*>(write.target + at));
    }
    to[at] = packet[in_packet];
  }
  return true;
}

// The first write under way does not arrive: the sender waits for an acknowledgement until it has repeated
// often enough.
void lose(End& end) {
  if (end.state != abi::IBV_QPS_ERR) {
    if (std::chrono::steady_clock::now() - *end.lost < faults().retry) return;
    break_down(end, abi::IBV_WC_RETRY_EXC_ERR);
  }
  end.under_way.clear();
}

// The wire: carries a write of a connection picked by chance, again and again.
void carry() {
  for (;;) {
    {
      Lock lock;
      for (auto& [number, end] : ends) {
        // What a broken connection has left on the way comes late: when its slot is long used again, if it
        // may.
        uint32_t patience = end->state == abi::IBV_QPS_ERR ? 400 : 3;
        if (end->under_way.empty() || chance() % patience != 0) continue;
        if (is_lost(*end, end->under_way.front())) {
          lose(*end);
          continue;
        }
        Write write = end->under_way.front();
        end->under_way.pop_front();
        bool arrived = arrive(*end, write);
        end->carried += arrived;
        if (end->state == abi::IBV_QPS_ERR) {
          late += arrived;
        } else if (!arrived) {
          complete(*end, write.id, abi::IBV_WC_RETRY_EXC_ERR);
          break_down(*end, abi::IBV_WC_WR_FLUSH_ERR);
          end->under_way.clear();
        } else if (write.signaled) {
          complete(*end, write.id, abi::IBV_WC_SUCCESS);
        }
      }
    }
    sched_yield();
  }
}

int poll(abi::ibv_cq* queue, int entries, abi::ibv_wc* completions) {
  Lock lock;
  int count = 0;
  for (; count < entries && !queue->completions.empty(); ++count) {
    completions[count] = queue->completions.front();
    queue->completions.pop_front();
  }
  return count;
}

// Both ranks have opened the same devices, and in a test a port is down for one of them.
bool reports_ports() {
  return false;
}

int post(abi::ibv_qp* pair, abi::ibv_send_wr* request, abi::ibv_send_wr** failed) {
  Lock lock;
  End& end = *ends.at(pair->qp_num);
  size_t requests = 0;
  for (abi::ibv_send_wr* one = request; one != nullptr; one = one->next) ++requests;
  if (refuse_from != 0 && requests >= refuse_from) {
    refuse_from = 0;
    ++refused_posts;
    *failed = request;
    return ENOMEM;
  }
  for (; request != nullptr; request = request->next) {
    // What was posted before stays under way: the connection itself is whole.
    if (faults().refusal_interval != 0 && chance() % faults().refusal_interval == 0) {
      ++refused_posts;
      *failed = request;
      return ENOMEM;
    }
    Write write{request->wr_id,
                request->wr.rdma.remote_addr,
                request->wr.rdma.rkey,
                (request->send_flags & abi::IBV_SEND_SIGNALED) != 0,
                reinterpret_cast<const unsigned char*>(request->sg_list->addr),
                request->sg_list->length,
                &postings[posted % kPostings],
                {}};
    if (__tsan_release != nullptr) __tsan_release(write.posting);
    if ((request->send_flags & abi::IBV_SEND_INLINE) != 0) write.copy();
    if (end.state == abi::IBV_QPS_ERR) {
      complete(end, write.id, abi::IBV_WC_WR_FLUSH_ERR);
      continue;
    }
    early += may_be_overwritten(*request);
    end.under_way.push_back(write);
  }
  if (++posted >= next_break && faults().break_interval != 0 && end.state == abi::IBV_QPS_RTS) {
    if (next_break != 0) {
      ++breaks;
      break_down(end, abi::IBV_WC_RETRY_EXC_ERR);
    }
    next_break = posted + 1 + chance() % (2 * faults().break_interval);
  }
  return 0;
}

}  // namespace

extern "C" {

// For the test: what the wire has done.
void unreliable_report(uint64_t* broken, uint64_t* not_posted, uint64_t* arrived_late,
                       uint64_t* refused_writes, uint64_t* too_early) {
  Lock lock;
  *broken = breaks;
  *not_posted = refused_posts;
  *arrived_late = late;
  *refused_writes = refused;
  *too_early = early;
}

// For the test: refuses the next chain of at least so many requests, whole.
void unreliable_refuse_chain(uint64_t at_least) {
  Lock lock;
  refuse_from = at_least;
}

// For the test: connections made over a device so far.
uint64_t unreliable_connections(const char* device) {
  Lock lock;
  return connections[device];
}

// For the test: from now on no rail is faulty.
void unreliable_heal() {
  Lock lock;
  healed = true;
}

// For the test: from now on the rails of `device` (a name, `both`, or none) cannot be connected, of ranks
// whose domains have numbers from `from` on.
void unreliable_refuse(const char* device, int from) {
  Lock lock;
  refusing = device;
  refusing_from = from;
}

// For the test: whether the port of a device is active from now on.
void unreliable_port(const char* device, bool active) {
  for (abi::ibv_device& each : devices) {
    if (std::strcmp(each.name, device) == 0) each.active = active;
  }
}

abi::ibv_mr* ibv_reg_mr(abi::ibv_pd*, void* memory, size_t bytes, int access) {
  auto* region = new abi::ibv_mr{};
  region->addr = memory;
  region->length = bytes;
  Lock lock;
  region->lkey = region->rkey = next_number++;
  if ((access & abi::IBV_ACCESS_REMOTE_WRITE) != 0)
    regions[region->rkey] = {reinterpret_cast<uintptr_t>(memory), bytes};
  return region;
}
int ibv_dereg_mr(abi::ibv_mr* region) {
  {
    Lock lock;
    regions.erase(region->rkey);
  }
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
abi::ibv_qp* ibv_create_qp(abi::ibv_pd* domain, abi::ibv_qp_init_attr* setup) {
  static std::atomic_flag started = ATOMIC_FLAG_INIT;
  if (!started.test_and_set()) std::thread(carry).detach();
  auto* end = new End;
  end->domain = *domain;
  end->pair.send_cq = setup->send_cq;
  Lock lock;
  end->pair.qp_num = next_number++;
  ends[end->pair.qp_num] = end;
  return &end->pair;
}
int ibv_modify_qp(abi::ibv_qp* pair, abi::ibv_qp_attr* attributes, int mask) {
  Lock lock;
  End& end = *ends.at(pair->qp_num);
  if (attributes->qp_state == abi::IBV_QPS_ERR) {
    if (end.state != abi::IBV_QPS_ERR) break_down(end, abi::IBV_WC_WR_FLUSH_ERR);
    return 0;
  }
  if (attributes->qp_state == abi::IBV_QPS_RTR && refuses_to_connect(end)) return ETIMEDOUT;
  end.state = static_cast<abi::ibv_qp_state>(attributes->qp_state);
  if (end.state == abi::IBV_QPS_RTS) ++connections[end.domain.device->name];
  if ((mask & abi::IBV_QP_DEST_QPN) != 0) end.destination = attributes->dest_qp_num;
  return 0;
}
int ibv_destroy_qp(abi::ibv_qp* pair) {
  End* end = nullptr;
  for (bool empty = false; !empty;
       sched_yield()) {  // as a device does: not before its packets are out of hand
    Lock lock;
    end = ends.at(pair->qp_num);
    empty = end->under_way.empty();
    if (empty) ends.erase(pair->qp_num);
  }
  delete end;
  return 0;
}

}  // extern "C"
