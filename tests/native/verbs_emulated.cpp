// A libibverbs whose NICs are threads: one in each process, or one for both ranks of a process. They send
// packets through files of a folder that both ranks' processes see, and store what arrives in their own
// process, 16 bytes at once, as a NIC does; every other packet from its end to its beginning, since nothing
// defines an order within one. They check what a NIC and the kernel check: a violation is refused, or ends
// the process with a sentence.
//
// Environment:
//
//   EMULATED_NICS  the folder, in which `control` is written by tests (tests/native/emulated_nics.py)
//
// Unlike a NIC it loses packets only where a test asks for that, and its times mean nothing. Real queue pairs
// are in tests/rdma.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "verbs_devices.hpp"

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kRails = 2;
constexpr uint32_t kNumbers = 1u << 24;   // of queue pairs and of packets
constexpr uint32_t kRing = 256;           // packets under way to one queue pair
constexpr uint32_t kPacketsPerTurn = 16;  // each way: the rank's threads wait for the end of a turn
constexpr uint32_t kLargestPacket = 4096;
constexpr uint32_t kRemoteAccessError = 10;  // IBV_WC_REM_ACCESS_ERR
constexpr uint32_t kVendorError = 0x81;
constexpr uint32_t kFlipped = 1027;  // byte of a packet in which a bit is flipped
constexpr auto kAwake = std::chrono::milliseconds(2);
constexpr auto kSleep = std::chrono::microseconds(100);

// What a test does to a rail, on both machines at once.
struct RailControl {
  std::atomic<uint32_t> cut;             // not zero: nothing goes over it
  std::atomic<uint32_t> port_down;       // not zero: its ports are down, and nothing goes over it
  std::atomic<uint32_t> lose_over;       // packets of more bytes are lost, again and again; zero: none
  std::atomic<uint32_t> delay_us;        // of each packet
  std::atomic<uint32_t> refuse_connect;  // not zero: no queue pair can be connected (ETIMEDOUT)
  std::atomic<uint32_t> refuse_posts;    // so many of the next posts are refused (ENOMEM)
  std::atomic<uint32_t> fail_next;       // the next write ends with this status; zero: none does
  std::atomic<uint32_t> refuse_pinning;  // so many of the next memory regions are refused (ENOMEM)
  std::atomic<uint32_t> hang;            // not zero: the device does nothing, and reports no failure
  std::atomic<uint32_t> flip_over;       // a bit is flipped in packets of more bytes; zero: in none
  std::atomic<uint32_t> packets;         // that have arrived, modulo 2^32
};

struct Packet {
  uint32_t number;  // of 24 bits
  uint32_t key;
  uint64_t target;
  int64_t due;  // nanoseconds of the monotonic clock, which all processes share
  uint32_t bytes;
  alignas(64) unsigned char data[kLargestPacket];
};

// The packets to one queue pair. Its owner makes the file; the one peer that is connected to it writes here.
struct Ring {
  std::atomic<uint32_t> refused;  // the status with which the first packet that is not consumed was refused
  alignas(64) std::atomic<uint64_t> produced;
  alignas(64) std::atomic<uint64_t> consumed;
  Packet packets[kRing];
};

[[noreturn]] void violated(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  std::fprintf(stderr, "emulated NIC: %s\n", text);
  std::abort();
}

// Takes one of a number that another process counts down, too. False if there is none.
bool take_one(std::atomic<uint32_t>& number) {
  uint32_t left = number.load(std::memory_order_relaxed);
  while (left != 0) {
    if (number.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) return true;
  }
  return false;
}

std::string folder() {
  const char* path = std::getenv("EMULATED_NICS");
  if (path == nullptr) violated("the variable EMULATED_NICS is not set");
  return path;
}

// Maps a file of the folder; null if there is none. `flags`: of open().
void* map(const std::string& name, size_t bytes, int flags) {
  int file = open((folder() + "/" + name).c_str(), flags | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) return nullptr;
  if ((flags & O_CREAT) != 0 && ftruncate(file, static_cast<off_t>(bytes)) != 0)
    violated("no room for a ring");
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) violated("the file %s cannot be mapped", name.c_str());
  return memory;
}

RailControl& control(uint32_t rail) {
  static auto* controls = static_cast<RailControl*>(map("control", kRails * sizeof(RailControl), 0));
  if (controls == nullptr) violated("there is no file `control` in %s", folder().c_str());
  return controls[rail];
}

uint32_t rail_of(const abi::ibv_device* device) {
  return static_cast<uint32_t>(device - devices);
}

struct Region {
  abi::ibv_mr region{};
  bool remote_write = false;
  const abi::ibv_pd* domain = nullptr;

  bool holds(uint64_t address, uint64_t bytes) const {
    auto begin = reinterpret_cast<uintptr_t>(region.addr);
    return address >= begin && address + bytes <= begin + region.length;
  }
};

struct Write {
  uint64_t id;
  uint64_t index;  // of all posted to its queue pair
  bool signaled;
  uint32_t key;
  uint64_t target;
  const unsigned char* source;
  uint32_t bytes;
  std::vector<unsigned char> inlined;
  uint32_t sent = 0;         // bytes
  bool whole = false;        // its last packet was sent
  uint64_t last_packet = 0;  // how many packets had been sent with it
};

struct QueuePair {
  abi::ibv_qp pair{};
  abi::ibv_pd* domain = nullptr;
  abi::ibv_qp_cap cap{};
  abi::ibv_qp_state state = abi::IBV_QPS_RESET;
  bool may_be_written = false;
  uint32_t mtu = 0, send_number = 0, receive_number = 0;
  std::chrono::nanoseconds patience{0};     // without an acknowledgement
  std::string name;                         // of its ring's file
  Ring* ring = nullptr;                     // to it
  Ring* out = nullptr;                      // to the peer's
  std::deque<Write> writes;                 // not complete
  uint64_t posted = 0, freed = 0;           // writes; those whose place in the queue is free again
  uint64_t produced = 0, acknowledged = 0;  // packets
  Clock::time_point progress{};             // when a packet was acknowledged last, or nothing waited for that

  uint32_t rail() const { return rail_of(domain->device); }
};

}  // namespace

struct abi::ibv_cq {
  struct Entry {
    abi::ibv_wc completion;
    uint64_t index;
  };
  size_t entries;
  std::deque<Entry> completions;
};

namespace {

// Everything below is guarded by this; never destroyed, because the NIC's thread runs until the process ends.
auto& mutex = *new std::mutex;
auto& pairs = *new std::map<uint32_t, std::unique_ptr<QueuePair>>;
auto& regions = *new std::map<uint32_t, std::unique_ptr<Region>>;
uint32_t next_key = 0x100;

void complete(QueuePair& pair, const Write& write, uint32_t status) {
  abi::ibv_cq& queue = *pair.pair.send_cq;
  if (queue.completions.size() == queue.entries)
    violated("a completion queue of %zu entries is full", queue.entries);
  abi::ibv_wc completion{};
  completion.wr_id = write.id;
  completion.status = status;
  completion.qp_num = pair.pair.qp_num;
  if (status != abi::IBV_WC_SUCCESS && status != abi::IBV_WC_WR_FLUSH_ERR)
    completion.vendor_err = kVendorError;
  queue.completions.push_back({completion, write.index});
}

// The first write fails with `status`, those after it are flushed.
void fail(QueuePair& pair, uint32_t status) {
  pair.state = abi::IBV_QPS_ERR;
  for (Write& write : pair.writes) {
    complete(pair, write, status);
    status = abi::IBV_WC_WR_FLUSH_ERR;
  }
  pair.writes.clear();
}

// Copies as a NIC reads or writes memory: 16 aligned bytes at once, and less where they are not aligned.
void copy_ascending(unsigned char* to, const unsigned char* from, uint32_t bytes) {
  typedef long long Unit __attribute__((vector_size(16), may_alias));
  constexpr uint32_t kUnit = sizeof(Unit), kHalf = sizeof(uint64_t);
  auto aligned = [](const void* pointer, uint32_t unit) {
    return reinterpret_cast<uintptr_t>(pointer) % unit == 0;
  };
  uint32_t at = 0;
  while (at < bytes) {
    std::atomic_thread_fence(std::memory_order_release);
    if (bytes - at >= kUnit && aligned(to + at, kUnit) && aligned(from + at, kUnit)) {
      *reinterpret_cast<volatile Unit*>(to + at) = *reinterpret_cast<const volatile Unit*>(from + at);
      at += kUnit;
    } else if (bytes - at >= kHalf && aligned(to + at, kHalf) && aligned(from + at, kHalf)) {
      *reinterpret_cast<volatile uint64_t*>(to + at) = *reinterpret_cast<const volatile uint64_t*>(from + at);
      at += kHalf;
    } else {
      *static_cast<volatile unsigned char*>(to + at) = from[at];
      ++at;
    }
  }
  std::atomic_thread_fence(std::memory_order_release);
}

// The same from the end to the beginning, in steps of a cache line.
void copy_descending(unsigned char* to, const unsigned char* from, uint32_t bytes) {
  constexpr uint32_t kLine = 64;
  while (bytes > 0) {
    uint32_t beyond = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(to + bytes) % kLine);
    uint32_t part = std::min(bytes, beyond == 0 ? kLine : beyond);
    bytes -= part;
    copy_ascending(to + bytes, from + bytes, part);
  }
}

// Sends packets of what was posted. True if it sent one.
bool send(QueuePair& pair) {
  RailControl& rail = control(pair.rail());
  uint32_t sent = 0;
  for (Write& write : pair.writes) {
    while (!write.whole) {
      if (sent == kPacketsPerTurn ||
          pair.produced - pair.out->consumed.load(std::memory_order_acquire) == kRing)
        return sent > 0;
      uint32_t bytes = std::min(pair.mtu, write.bytes - write.sent);
      uint32_t limit = rail.lose_over.load(std::memory_order_relaxed);
      if (limit != 0 && bytes > limit) return sent > 0;
      Packet& packet = pair.out->packets[pair.produced % kRing];
      packet.number = static_cast<uint32_t>((pair.send_number + pair.produced) % kNumbers);
      packet.key = write.key;
      packet.target = write.target + write.sent;
      packet.bytes = bytes;
      packet.due = (Clock::now().time_since_epoch() +
                    std::chrono::microseconds(rail.delay_us.load(std::memory_order_relaxed)))
                       .count();
      copy_ascending(packet.data, (write.inlined.empty() ? write.source : write.inlined.data()) + write.sent,
                     bytes);
      write.sent += bytes;
      write.whole = write.sent == write.bytes;
      write.last_packet = ++pair.produced;
      pair.out->produced.store(pair.produced, std::memory_order_release);
      ++sent;
    }
  }
  return sent > 0;
}

// Completes what the peer's NIC has acknowledged; a cut wire carries no acknowledgements. True if there was
// something.
bool acknowledge(QueuePair& pair, Clock::time_point now, bool cut) {
  uint64_t consumed = cut ? pair.acknowledged : pair.out->consumed.load(std::memory_order_acquire);
  bool moved = consumed != pair.acknowledged;
  pair.acknowledged = consumed;
  if (moved || pair.writes.empty()) pair.progress = now;
  while (!pair.writes.empty() && pair.writes.front().whole && pair.writes.front().last_packet <= consumed) {
    if (uint32_t status = control(pair.rail()).fail_next.exchange(0, std::memory_order_relaxed)) {
      fail(pair, status);
      return true;
    }
    if (pair.writes.front().signaled) complete(pair, pair.writes.front(), abi::IBV_WC_SUCCESS);
    pair.writes.pop_front();
  }
  if (uint32_t status = cut ? 0 : pair.out->refused.load(std::memory_order_acquire)) {
    fail(pair, status);
  } else if (!pair.writes.empty() && now - pair.progress > pair.patience) {
    fail(pair, abi::IBV_WC_RETRY_EXC_ERR);
  }
  return moved;
}

// Stores the packets that have come to a queue pair. True if there was one.
bool receive(QueuePair& pair, Clock::time_point now) {
  Ring& ring = *pair.ring;
  uint64_t begin = ring.consumed.load(std::memory_order_relaxed);
  uint64_t end = std::min(ring.produced.load(std::memory_order_acquire), begin + kPacketsPerTurn), at = begin;
  for (; at != end && ring.packets[at % kRing].due <= now.time_since_epoch().count(); ++at) {
    const Packet& packet = ring.packets[at % kRing];
    // Of another connection, or of a peer that was told other numbers: it is dropped, and not acknowledged.
    if (packet.number != (pair.receive_number + at) % kNumbers) break;
    auto region = regions.find(packet.key);
    bool allowed = pair.may_be_written && region != regions.end() && region->second->remote_write &&
                   region->second->domain == pair.domain &&
                   region->second->holds(packet.target, packet.bytes);
    if (!allowed) {
      ring.refused.store(kRemoteAccessError, std::memory_order_release);
      fail(pair, abi::IBV_WC_WR_FLUSH_ERR);
      break;
    }
    uint32_t flip_over = control(pair.rail()).flip_over.load(std::memory_order_relaxed);
    // The exponent of a number of any type: neither a flag of a packet nor its header, which is checked.
    if (flip_over != 0 && packet.bytes > flip_over) ring.packets[at % kRing].data[kFlipped] ^= 0x40;
    (at % 2 == 0 ? copy_ascending : copy_descending)(reinterpret_cast<unsigned char*>(packet.target),
                                                     packet.data, packet.bytes);
    control(pair.rail()).packets.fetch_add(1, std::memory_order_relaxed);
    ring.consumed.store(at + 1, std::memory_order_release);
  }
  return at != begin;
}

bool turn() {
  std::lock_guard<std::mutex> lock(mutex);
  Clock::time_point now = Clock::now();
  for (uint32_t rail = 0; rail < kRails; ++rail)
    devices[rail].active = control(rail).port_down.load(std::memory_order_relaxed) == 0;
  bool moved = false;
  for (auto& [number, pair] : pairs) {
    if (control(pair->rail()).hang.load(std::memory_order_relaxed) != 0) continue;
    bool cut = control(pair->rail()).cut.load(std::memory_order_relaxed) != 0 ||
               control(pair->rail()).port_down.load(std::memory_order_relaxed) != 0;
    if (!cut && (pair->state == abi::IBV_QPS_RTR || pair->state == abi::IBV_QPS_RTS))
      moved = receive(*pair, now) || moved;
    if (pair->state != abi::IBV_QPS_RTS) continue;
    if (!cut) moved = send(*pair) || moved;
    moved = acknowledge(*pair, now, cut) || moved;
  }
  return moved;
}

void run_nic() {
  Clock::time_point moved = Clock::now();
  for (;;) {
    if (turn()) moved = Clock::now();
    if (Clock::now() - moved < kAwake) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }
}

int poll(abi::ibv_cq* queue, int entries, abi::ibv_wc* completions) {
  std::lock_guard<std::mutex> lock(mutex);
  int count = 0;
  for (; count < entries && !queue->completions.empty(); ++count) {
    const abi::ibv_cq::Entry& entry = queue->completions.front();
    completions[count] = entry.completion;
    auto pair = pairs.find(entry.completion.qp_num);
    if (pair != pairs.end()) pair->second->freed = std::max(pair->second->freed, entry.index);
    queue->completions.pop_front();
  }
  return count;
}

bool reports_ports() {
  return true;
}

int post(abi::ibv_qp* handle, abi::ibv_send_wr* request, abi::ibv_send_wr** failed) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = pairs.find(handle->qp_num);
  if (found == pairs.end())
    violated("something was posted to queue pair %u, which is destroyed", handle->qp_num);
  QueuePair& pair = *found->second;
  if (pair.state != abi::IBV_QPS_RTS && pair.state != abi::IBV_QPS_ERR)
    violated("something was posted to a queue pair in state %u", pair.state);
  RailControl& rail = control(pair.rail());
  for (; request != nullptr; request = request->next) {
    *failed = request;
    if (take_one(rail.refuse_posts)) return ENOMEM;
    if (pair.posted - pair.freed >= pair.cap.max_send_wr) return ENOMEM;
    if (request->opcode != abi::IBV_WR_RDMA_WRITE || request->num_sge != 1) return EINVAL;
    const abi::ibv_sge& entry = *request->sg_list;
    Write write{request->wr_id,
                ++pair.posted,
                (request->send_flags & abi::IBV_SEND_SIGNALED) != 0,
                request->wr.rdma.rkey,
                request->wr.rdma.remote_addr,
                reinterpret_cast<const unsigned char*>(entry.addr),
                entry.length,
                {}};
    if ((request->send_flags & abi::IBV_SEND_INLINE) != 0) {
      if (entry.length > pair.cap.max_inline_data) return EINVAL;
      write.inlined.assign(write.source, write.source + entry.length);
    } else {
      auto region = regions.find(entry.lkey);
      if (region == regions.end() || region->second->domain != pair.domain ||
          !region->second->holds(entry.addr, entry.length))
        violated("%u bytes are sent from memory that the key 0x%x does not cover", entry.length, entry.lkey);
    }
    if (pair.state == abi::IBV_QPS_ERR) {
      complete(pair, write, abi::IBV_WC_WR_FLUSH_ERR);
    } else {
      pair.writes.push_back(std::move(write));
    }
  }
  pair.progress = Clock::now();  // as soft-RoCE: each request lets it wait anew for an acknowledgement
  return 0;
}

// What must be given for each transition of a reliable connection (InfiniBand specification, 11.2.5.2).
int required_mask(abi::ibv_qp_state from, uint32_t to) {
  if (to == abi::IBV_QPS_ERR) return abi::IBV_QP_STATE;
  if (from == abi::IBV_QPS_RESET && to == abi::IBV_QPS_INIT)
    return abi::IBV_QP_STATE | abi::IBV_QP_PKEY_INDEX | abi::IBV_QP_PORT | abi::IBV_QP_ACCESS_FLAGS;
  if (from == abi::IBV_QPS_INIT && to == abi::IBV_QPS_RTR)
    return abi::IBV_QP_STATE | abi::IBV_QP_AV | abi::IBV_QP_PATH_MTU | abi::IBV_QP_DEST_QPN |
           abi::IBV_QP_RQ_PSN | abi::IBV_QP_MAX_DEST_RD_ATOMIC | abi::IBV_QP_MIN_RNR_TIMER;
  if (from == abi::IBV_QPS_RTR && to == abi::IBV_QPS_RTS)
    return abi::IBV_QP_STATE | abi::IBV_QP_TIMEOUT | abi::IBV_QP_RETRY_CNT | abi::IBV_QP_RNR_RETRY |
           abi::IBV_QP_SQ_PSN | abi::IBV_QP_MAX_QP_RD_ATOMIC;
  return 0;
}

void release(QueuePair& pair) {
  if (pair.out != nullptr) munmap(pair.out, sizeof(Ring));
  munmap(pair.ring, sizeof(Ring));
  unlink((folder() + "/" + pair.name).c_str());
}

std::string ring_name(uint32_t number) {
  return "queue-pair-" + std::to_string(number);
}

}  // namespace

extern "C" {

abi::ibv_mr* ibv_reg_mr(abi::ibv_pd* domain, void* memory, size_t bytes, int access) {
  // The specification: what others may write, its owner may, too.
  if ((access & abi::IBV_ACCESS_REMOTE_WRITE) != 0 && (access & abi::IBV_ACCESS_LOCAL_WRITE) == 0) {
    errno = EINVAL;
    return nullptr;
  }
  if (take_one(control(rail_of(domain->device)).refuse_pinning)) {
    errno = ENOMEM;
    return nullptr;
  }
  auto made = std::make_unique<Region>();
  made->region.addr = memory;
  made->region.length = bytes;
  made->remote_write = (access & abi::IBV_ACCESS_REMOTE_WRITE) != 0;
  made->domain = domain;
  std::lock_guard<std::mutex> lock(mutex);
  made->region.lkey = made->region.rkey = next_key++;
  abi::ibv_mr* region = &made->region;
  regions[region->lkey] = std::move(made);
  return region;
}

int ibv_dereg_mr(abi::ibv_mr* region) {
  std::lock_guard<std::mutex> lock(mutex);
  if (regions.erase(region->lkey) == 0) violated("a memory region was deregistered twice");
  return 0;
}

abi::ibv_cq* ibv_create_cq(abi::ibv_context*, int entries, void*, void*, int) {
  return new abi::ibv_cq{static_cast<size_t>(entries), {}};
}

int ibv_destroy_cq(abi::ibv_cq* queue) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& [number, pair] : pairs) {
    if (pair->pair.send_cq == queue)
      violated("a completion queue was destroyed before queue pair %u", number);
  }
  delete queue;
  return 0;
}

abi::ibv_qp* ibv_create_qp(abi::ibv_pd* domain, abi::ibv_qp_init_attr* setup) {
  static std::once_flag started;
  std::call_once(started, [] { std::thread(run_nic).detach(); });
  auto made = std::make_unique<QueuePair>();
  made->domain = domain;
  made->cap = setup->cap;
  made->pair.send_cq = setup->send_cq;
  std::random_device random;
  for (void* ring = nullptr; ring == nullptr;) {
    made->pair.qp_num = 1 + static_cast<uint32_t>(random()) % (kNumbers - 1);
    made->name = ring_name(made->pair.qp_num);
    ring = map(made->name, sizeof(Ring), O_CREAT | O_EXCL);
    if (ring == nullptr && errno != EEXIST)
      violated("%s cannot be made in %s", made->name.c_str(), folder().c_str());
    made->ring = static_cast<Ring*>(ring);
  }
  std::lock_guard<std::mutex> lock(mutex);
  abi::ibv_qp* pair = &made->pair;
  pairs[pair->qp_num] = std::move(made);
  return pair;
}

int ibv_modify_qp(abi::ibv_qp* handle, abi::ibv_qp_attr* attributes, int mask) {
  std::lock_guard<std::mutex> lock(mutex);
  QueuePair& pair = *pairs.at(handle->qp_num);
  int required = required_mask(pair.state, attributes->qp_state);
  if (required == 0 || (mask & required) != required) return EINVAL;
  switch (attributes->qp_state) {
    case abi::IBV_QPS_ERR:
      if (pair.state != abi::IBV_QPS_ERR) fail(pair, abi::IBV_WC_WR_FLUSH_ERR);
      return 0;
    case abi::IBV_QPS_INIT:
      if (attributes->port_num != 1) return EINVAL;
      pair.may_be_written = (attributes->qp_access_flags & abi::IBV_ACCESS_REMOTE_WRITE) != 0;
      break;
    case abi::IBV_QPS_RTR: {
      if (control(pair.rail()).refuse_connect.load(std::memory_order_relaxed) != 0) return ETIMEDOUT;
      if (attributes->path_mtu < 1 || attributes->path_mtu > 5 || attributes->ah_attr.is_global == 0 ||
          attributes->ah_attr.port_num != 1 || attributes->rq_psn >= kNumbers)
        return EINVAL;
      pair.out = static_cast<Ring*>(map(ring_name(attributes->dest_qp_num), sizeof(Ring), 0));
      if (pair.out == nullptr) return ETIMEDOUT;
      pair.mtu = 128u << attributes->path_mtu;
      pair.receive_number = attributes->rq_psn;
      break;
    }
    case abi::IBV_QPS_RTS:
      if (attributes->sq_psn >= kNumbers || attributes->retry_cnt > 7) return EINVAL;
      pair.send_number = attributes->sq_psn;
      pair.patience =
          (attributes->retry_cnt + 1) * std::chrono::nanoseconds(int64_t{4096} << attributes->timeout);
      pair.progress = Clock::now();
      break;
    default:
      return EINVAL;
  }
  pair.state = static_cast<abi::ibv_qp_state>(attributes->qp_state);
  return 0;
}

int ibv_destroy_qp(abi::ibv_qp* handle) {
  std::lock_guard<std::mutex> lock(mutex);
  auto pair = pairs.find(handle->qp_num);
  if (pair == pairs.end()) violated("queue pair %u was destroyed twice", handle->qp_num);
  release(*pair->second);
  pairs.erase(pair);
  return 0;
}

}  // extern "C"
