#include "nic.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <string>

#include "../../support/backoff.hpp"
#include "../../support/device_order.hpp"
#include "../../support/errors.hpp"
#include "../packet_copy.hpp"

namespace spark::modelled {
namespace {

using namespace verbs::abi;
using Time = WireModel::Time;

constexpr uint32_t kMtu = 4096;  // of RDMA, the largest; WireModel knows no packets
constexpr uint32_t kMtuCode = 5;

struct Context : ibv_context {
  Nic* nic;
  size_t rail;
};

struct Completion {
  Time ready;
  uint64_t request;
  uint32_t status;
};

// Of one queue pair.
struct CompletionQueue {
  Nic* nic;
  std::deque<Completion> completions;
};

std::atomic<uint64_t>* words(const std::byte* memory) {
  return reinterpret_cast<std::atomic<uint64_t>*>(const_cast<std::byte*>(memory));
}

}  // namespace

struct QueuePair : ibv_qp {
  struct Write {
    Time due;
    std::atomic<uint64_t>* target;  // null: a payload, which its reader takes from the sender's slot
    uint64_t first[kFirstWords];
    size_t words;                       // of `first`: one if it is a flag
    const std::atomic<uint64_t>* rest;  // what follows them, and is still to be copied; else null
    size_t all_words;
    uint64_t request;
    bool signaled;
  };

  CompletionQueue& completions() { return *reinterpret_cast<CompletionQueue*>(send_cq); }
  void fail_request(Time now) { completions().completions.push_back({now, 0, IBV_WC_WR_FLUSH_ERR}); }

  Nic* nic;
  size_t rail;
  std::deque<Write> on_their_way;
  size_t to_copy = 0;  // writes on their way whose rest is to be copied

  void copy(Write& write, bool whole_lines) {
    copy_all_but_first(write.rest, write.target, write.all_words, whole_lines);
    write.rest = nullptr;
    --to_copy;
  }
};

Time SteadyNicClock::now() {
  return Clock::now().time_since_epoch();
}

void SteadyNicClock::busy(Time) {
  cpu_relax();
}

// In the place of libibverbs. A protection domain is its context. Objects are destroyed by another thread,
// which touches nothing else.
struct Functions {
  static ibv_pd* domain(Context* context) { return reinterpret_cast<ibv_pd*>(context); }
  static Context& context(ibv_pd* domain) { return *reinterpret_cast<Context*>(domain); }

  static int poll_cq(ibv_cq* queue, int entries, ibv_wc* found) {
    auto& [nic, completions] = *reinterpret_cast<CompletionQueue*>(queue);
    nic->deliver_due();
    if (completions.empty()) return 0;
    Time now = nic->clock_.now();
    int count = 0;
    for (; count < entries && !completions.empty(); ++count, completions.pop_front()) {
      if (completions.front().ready > now) break;
      found[count] = {};
      found[count].wr_id = completions.front().request;
      found[count].status = completions.front().status;
    }
    return count;
  }
  static int post_send(ibv_qp* pair, ibv_send_wr* first, ibv_send_wr** failed) {
    auto& mine = *static_cast<QueuePair*>(pair);
    return mine.nic->post(mine, first, failed);
  }

  static ibv_context* open(Nic& nic, size_t rail) {
    auto* context = new Context{};
    context->ops[kPollCq] = reinterpret_cast<void*>(&poll_cq);
    context->ops[kPostSend] = reinterpret_cast<void*>(&post_send);
    // Nothing is ever written there: this device has no events.
    context->async_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    context->nic = &nic;
    context->rail = rail;
    return context;
  }
  static int close_device(ibv_context* context) {
    if (context->async_fd >= 0) close(context->async_fd);
    delete static_cast<Context*>(context);
    return 0;
  }
  static ibv_pd* alloc_pd(ibv_context* context) { return domain(static_cast<Context*>(context)); }
  static int dealloc_pd(ibv_pd*) { return 0; }

  // The peer's addresses are offsets in the region: it is mapped elsewhere in the other process.
  static ibv_mr* reg_mr(ibv_pd* domain, void* memory, size_t bytes, int) {
    auto* region = new ibv_mr{};
    region->addr = reinterpret_cast<void*>(static_cast<std::byte*>(memory) - context(domain).nic->memory_);
    region->length = bytes;
    return region;
  }
  static int dereg_mr(ibv_mr* region) {
    delete region;
    return 0;
  }
  static ibv_cq* create_cq(ibv_context* context, int, void*, void*, int) {
    return reinterpret_cast<ibv_cq*>(new CompletionQueue{static_cast<Context*>(context)->nic, {}});
  }
  static int destroy_cq(ibv_cq* queue) {
    delete reinterpret_cast<CompletionQueue*>(queue);
    return 0;
  }
  static ibv_qp* create_qp(ibv_pd* domain, ibv_qp_init_attr* setup) {
    auto* pair = new QueuePair{};
    pair->send_cq = setup->send_cq;
    pair->nic = context(domain).nic;
    pair->rail = context(domain).rail;
    pair->qp_num = static_cast<uint32_t>(pair->rail) + 1;
    return pair;
  }
  static int modify_qp(ibv_qp* base, ibv_qp_attr* attributes, int) {
    auto& pair = *static_cast<QueuePair*>(base);
    QueuePair*& sending = pair.nic->pairs_[pair.rail];
    pair.state = attributes->qp_state;
    if (pair.state == IBV_QPS_RTS) sending = &pair;
    if (pair.state != IBV_QPS_ERR) return 0;
    if (sending == &pair) sending = nullptr;
    // What is on its way is not delivered any more, and what was delivered and not acknowledged is not known
    // to have arrived.
    Time now = pair.nic->clock_.now();
    auto& completions = pair.completions().completions;
    bool unfinished = !pair.on_their_way.empty();
    pair.on_their_way.clear();
    pair.to_copy = 0;
    for (; !completions.empty() && completions.back().ready > now; completions.pop_back()) unfinished = true;
    if (unfinished) pair.fail_request(now);
    return 0;
  }
  static int destroy_qp(ibv_qp* pair) {
    delete static_cast<QueuePair*>(pair);
    return 0;
  }
  static int query_port(ibv_context* context, uint8_t port, ibv_port_attr* attributes) {
    if (port != static_cast<Context*>(context)->rail + 1) return EINVAL;
    attributes->state = IBV_PORT_ACTIVE;
    attributes->active_mtu = kMtuCode;
    attributes->gid_tbl_len = 1;
    attributes->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
  }
  static int query_gid(ibv_context*, uint32_t port, uint32_t index, ibv_gid_entry* entry, uint32_t, size_t) {
    *entry = {{}, index, port, IBV_GID_TYPE_ROCE_V2, 0};
    return 0;
  }
  static int get_async_event(ibv_context*, ibv_async_event*) {
    errno = EAGAIN;
    return -1;
  }
  static const char* status_text(uint32_t) { return "the connection has been ended"; }

  // Without the functions that look for devices, which Nic::open does, and those of events, which never come.
  static const verbs::Library& library() {
    static const verbs::Library functions = [] {
      verbs::Library made{};
      made.close_device = &close_device;
      made.alloc_pd = &alloc_pd;
      made.dealloc_pd = &dealloc_pd;
      made.reg_mr = &reg_mr;
      made.dereg_mr = &dereg_mr;
      made.create_cq = &create_cq;
      made.destroy_cq = &destroy_cq;
      made.create_qp = &create_qp;
      made.modify_qp = &modify_qp;
      made.destroy_qp = &destroy_qp;
      made.query_port = &query_port;
      made.query_gid = &query_gid;
      made.get_async_event = &get_async_event;
      made.status_text = &status_text;
      return made;
    }();
    return functions;
  }
};

Nic::Nic(const WireFigures& figures, std::byte* memory, const RegionLayout& layout, NicClock& clock,
         bool copy_lines)
    : model_(figures),
      memory_(memory),
      layout_(layout),
      clock_(clock),
      copy_lines_(copy_lines),
      pairs_(model_.rails()) {}

std::vector<verbs::RailAddress> Nic::rails() const {
  std::vector<verbs::RailAddress> addresses;
  for (size_t rail = 0; rail < model_.rails(); ++rail) {
    addresses.push_back({"model" + std::to_string(rail), static_cast<uint8_t>(rail + 1), {}, kMtu});
  }
  return addresses;
}

std::shared_ptr<const verbs::Device> Nic::open(const verbs::RailAddress& rail) {
  return std::make_shared<const verbs::Device>(rail.device, Functions::library(),
                                               Functions::open(*this, rail.port - 1u));
}

int Nic::post(QueuePair& pair, ibv_send_wr* first, ibv_send_wr** failed) {
  Time now = clock_.now();
  if (pair.state == IBV_QPS_ERR) {
    pair.fail_request(now);
    return 0;
  }
  size_t writes = 0;
  for (ibv_send_wr* request = first; request != nullptr; request = request->next, ++writes) {
    uint64_t offset = request->wr.rdma.remote_addr;
    const ibv_sge& source = *request->sg_list;
    bool payload = offset >= layout_.recv_payload();
    // As a memory key has it: the peer's receiving part. And no bytes beside whole words, as no message has.
    if (offset < layout_.inbox() || offset + source.length > layout_.outbox() || source.length == 0 ||
        (!payload && (offset % sizeof(uint64_t) != 0 || source.length % sizeof(uint64_t) != 0))) {
      *failed = request;
      return EINVAL;
    }
    Time due = model_.write(pair.rail, now, source.length, request == first);
    bool signaled = (request->send_flags & IBV_SEND_SIGNALED) != 0;
    if (payload) {
      pair.on_their_way.push_back({due, nullptr, {}, 0, nullptr, 0, request->wr_id, signaled});
      continue;
    }
    const auto* from = words(reinterpret_cast<const std::byte*>(source.addr));
    std::atomic<uint64_t>* to = words(peer_memory_ + offset);
    size_t words = source.length / sizeof(uint64_t);
    QueuePair::Write write{due,
                           to,
                           {},
                           std::min(words, kFirstWords),
                           words > kFirstWords ? from : nullptr,
                           words,
                           request->wr_id,
                           signaled};
    // The flag of a wide packet, in the second word, is loaded before its data: see packet_copy.hpp.
    for (size_t word = write.words; word-- > 0;) write.first[word] = load_from_device(from[word]);
    if (write.rest != nullptr) ++pair.to_copy;
    pair.on_their_way.push_back(write);
  }
  // This thread is busy for as long as posting takes; the NIC is not.
  for (Time end = now + model_.posting_time(writes); clock_.now() < end; clock_.busy(end)) deliver_due();
  return 0;
}

bool Nic::deliver() {
  bool more = deliver_due();
  // One at a time: another may be due meanwhile.
  for (QueuePair* pair : pairs_) {
    if (pair == nullptr || pair->to_copy == 0) continue;
    for (QueuePair::Write& write : pair->on_their_way) {
      if (write.rest == nullptr) continue;
      pair->copy(write, copy_lines_);
      return true;
    }
  }
  return more;
}

bool Nic::deliver_due() {
  Time now = clock_.now();
  bool more = false;
  for (QueuePair* pair : pairs_) more |= pair != nullptr && deliver_due(*pair, now);
  return more;
}

bool Nic::deliver_due(QueuePair& pair, Time now) {
  Time back(static_cast<int64_t>(model_.latency(pair.rail, 0)));
  for (; !pair.on_their_way.empty() && pair.on_their_way.front().due <= now; pair.on_their_way.pop_front()) {
    QueuePair::Write& write = pair.on_their_way.front();
    if (write.rest != nullptr) pair.copy(write, copy_lines_);
    // Release: who acquires a flag must see the payload before it, which this thread has acquired with the
    // staged message. The header of packets also tells the peer which of its slots were read (see
    // CpuRank::send), and the flag of a wide packet is in its second word. An announcement has a checksum.
    for (size_t word = 0; word < write.words; ++word)
      write.target[word].store(write.first[word], std::memory_order_release);
    // The acknowledgement takes as long as the smallest write.
    if (write.signaled)
      pair.completions().completions.push_back({write.due + back, write.request, IBV_WC_SUCCESS});
  }
  return !pair.on_their_way.empty();
}

std::optional<Time> Nic::next_due() const {
  std::optional<Time> next;
  for (const QueuePair* pair : pairs_) {
    if (pair == nullptr || pair->on_their_way.empty()) continue;
    Time due = pair->on_their_way.front().due;
    next = next ? std::min(*next, due) : due;
  }
  return next;
}

}  // namespace spark::modelled
