#include "endpoint.hpp"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "../support/text.hpp"

namespace spark {
namespace {

constexpr uint64_t kLargestSlot = 1 << 30;
constexpr uint32_t kLongestClearInterval = 1u << 30;
// Maximum time that another thread may take to write the reason of an abort.
constexpr auto kReasonTime = std::chrono::milliseconds(20);

Options checked(const Options& options) {
  auto refuse = [](const std::string& what) { throw UsageError(what); };
  if (options.rank < 0 || options.rank >= kWorldSize) {
    refuse("rank " + std::to_string(options.rank) + " does not exist; a pair has ranks 0 and 1");
  }
  if (options.depth == 0 || options.depth > kMaxSlots / 2 || (options.depth & (options.depth - 1)) != 0 ||
      options.sizes.slots != 2 * options.depth) {
    // A power of two, so that the slots' order is kept when the 32-bit sequence number wraps.
    refuse("depth " + std::to_string(options.depth) + " is not a power of two from 1 to " +
           std::to_string(kMaxSlots / 2));
  }
  if (options.sizes.slot_bytes < 64 || options.sizes.slot_bytes % 64 != 0) {
    refuse("slot_bytes " + std::to_string(options.sizes.slot_bytes) + " is not a positive multiple of 64");
  }
  if (options.sizes.slot_bytes > kLargestSlot) {
    refuse("slot_bytes " + std::to_string(options.sizes.slot_bytes) + " is more than " +
           std::to_string(kLargestSlot));  // kernels count in 32 bits
  }
  if (options.sizes.packet_bytes > options.sizes.slot_bytes) {
    refuse("packet_bytes " + std::to_string(options.sizes.packet_bytes) + " is more than slot_bytes " +
           std::to_string(options.sizes.slot_bytes));
  }
  if (options.clear_interval < options.sizes.slots ||
      (options.clear_interval & (options.clear_interval - 1)) != 0) {
    refuse("clear_interval " + std::to_string(options.clear_interval) +
           " is not a power of two of at least " + std::to_string(options.sizes.slots) +
           ", the number of slots");
  }
  if (options.clear_interval > kLongestClearInterval) {
    refuse("clear_interval " + std::to_string(options.clear_interval) + " is more than " +
           std::to_string(kLongestClearInterval) + ", a quarter of the sequence numbers");
  }
  if (options.timeout <= std::chrono::nanoseconds(0)) {
    refuse("a time-out of " + seconds_text(options.timeout) + " is not possible; give more than 0 s");
  }
  if (options.stripes < 1 || options.stripes > kMaxPieces || (options.stripes > 1 && !options.proxied)) {
    refuse("stripes " + std::to_string(options.stripes) + " are not possible; a proxy takes 1 to " +
           std::to_string(kMaxPieces) + ", and without one there is 1");
  }
  if (options.wire.rails.size() > verbs::kMaxRails) {
    refuse(std::to_string(options.wire.rails.size()) + " modelled rails are not possible; a link has up to " +
           std::to_string(verbs::kMaxRails));
  }
  if (!options.wire.rails.empty() && !options.proxied) {
    refuse("a modelled link needs the proxy; without one, messages take no link");
  }
  return options;
}

}  // namespace

size_t Endpoint::region_bytes(const Options& options) {
  return RegionLayout(checked(options).sizes).total();
}

Endpoint::Endpoint(const Options& options, std::shared_ptr<std::byte> memory)
    : options_(checked(options)), layout_(options.sizes), memory_(std::move(memory)), process_(getpid()) {
  if (!memory_) {
    shared_ = SharedMemory::create(layout_.total());
    memory_ = {std::shared_ptr<void>(), shared_.data()};  // `shared_` owns it
  }
  Region region = mine();
  RegionHeader& header = region.header();
  header.magic = kRegionMagic;
  header.version = kRegionVersion;
  header.sizes = options_.sizes;
  if (getrandom(header.nonce, sizeof header.nonce, 0) != sizeof header.nonce) {
    throw CollectiveError("the kernel gave no random bytes; try again");
  }
  region.doorbell().store(options_.first_sequence - 1, std::memory_order_relaxed);
  // Fresh memory is all zero, and zero is a sequence number too.
  for (uint32_t slot = 0; slot < options_.sizes.slots; ++slot) {
    region.clear_recv(options_.first_sequence + slot);
    region.clear_send(options_.first_sequence + slot);
  }
  if (options_.wire.rails.empty()) return;
  // A message may wait for as long as a collective may: these rails do not fail by themselves.
  modelled_ = std::make_unique<modelled::ModelledLink>(options_.wire, this->memory(), options_.sizes,
                                                       options_.rank, options_.timeout, options_.copy_lines);
  std::string offer = modelled_->offer();
  static_assert(sizeof(verbs::LinkState) <= sizeof header.offer);
  header.offer_bytes = static_cast<uint32_t>(offer.size());
  std::memcpy(header.offer, offer.data(), offer.size());
}

Endpoint::~Endpoint() {
  // A fork has a copy of this object, and shares the descriptors through which queue pairs would be ended.
  if (!owned_by_this_process()) {
    static_cast<void>(link_.release());
    static_cast<void>(modelled_.release());
    // To free it would call a driver that does not support forks.
    static_cast<void>(new std::shared_ptr<std::byte>(std::move(memory_)));
  }
  delete poison_.load(std::memory_order_relaxed);
}

Address Endpoint::address() const {
  if (!shares_memory()) throw UsageError("this rank's memory cannot be opened by another process; use rails");
  Address address{process_, shared_.descriptor(), {}};
  std::memcpy(address.nonce, mine().header().nonce, sizeof address.nonce);
  return address;
}

void Endpoint::connect(const Address& peer, const std::string& description) {
  int peer_rank = kWorldSize - 1 - options_.rank;
  SharedMemory opened = SharedMemory::open(peer.process, peer.descriptor, layout_.total());
  Region region(opened.data(), options_.sizes);
  const RegionHeader& header = region.header();
  if (header.magic != kRegionMagic || header.version != kRegionVersion || !(header.sizes == options_.sizes) ||
      std::memcmp(header.nonce, peer.nonce, sizeof header.nonce) != 0) {
    throw CollectiveError(
        "process " + std::to_string(peer.process) +
        " of this machine is not the peer; the loopback transport needs both ranks on one machine");
  }
  peer_memory_ = std::move(opened);
  publish_peer(peer_memory_.data(), region, Peer(peer_rank, peer.process, description));
}

void Endpoint::connect_in_process(const Endpoint& peer) {
  publish_peer(peer.memory(), peer.mine(), Peer(peer.options_.rank, process_, "this process"));
}

std::string Endpoint::open_link(const verbs::LinkOptions& options,
                                const std::vector<verbs::RailAddress>& rails) {
  if (!options_.proxied)
    throw UsageError("RDMA needs the proxy; a peer on another machine is reached by no store");
  link_ = std::make_unique<verbs::Link>(options, memory(), options_.sizes, rails, options_.rank);
  return link_->offer();
}

void Endpoint::connect_link(const std::string& peer_offer, const std::string& description) {
  if (!link_) throw UsageError("there are no rails to connect; call open_link first");
  Peer peer(kWorldSize - 1 - options_.rank, description);
  link_->connect(peer_offer, peer.name(), [this](const std::string& reason) { end_waits(reason); });
  transport_ = link_.get();
  publish_peer(std::move(peer));
}

void Endpoint::publish_peer(std::byte* base, const Region& region, Peer peer) {
  theirs_base_ = base;
  theirs_ = std::make_unique<Region>(region);
  if (modelled_) {
    const RegionHeader& header = region.header();
    size_t bytes = std::min<size_t>(header.offer_bytes, sizeof header.offer);
    modelled_->connect(base, std::string(header.offer, bytes), peer.name(),
                       [this](const std::string& reason) { end_waits(reason); });
    transport_ = modelled_.get();
  } else {
    loopback_ = std::make_unique<LoopbackTransport>(mine(), region, options_.copy_lines);
    transport_ = loopback_.get();
  }
  publish_peer(std::move(peer));
}

void Endpoint::start() {
  // Release: a thread that acquires it in check_usable sees everything that sending needs.
  started_.store(true, std::memory_order_release);
}

void Endpoint::publish_peer(Peer peer) {
  peer_ = std::move(peer);
  // Sequentially consistent: this stores connected_, then loads the poison; `abort` stores the poison, then
  // loads connected_. So at least one of them ends the peer's waits.
  connected_.store(true, std::memory_order_seq_cst);
  if (const std::string* reason = poison_.load(std::memory_order_seq_cst)) end_peer_waits(*reason);
}

std::string Endpoint::path() const {
  if (link_) return "over " + link_->path();
  return std::string("over loopback, ") + (options_.proxied ? "proxied" : "direct");
}

bool Endpoint::owned_by_this_process() const {
  return getpid() == process_;
}

void Endpoint::check_poison() const {
  // Acquire: pairs with the release in `poison`; the text behind the pointer is complete.
  if (const std::string* reason = poison_.load(std::memory_order_acquire)) {
    throw PoisonedError("this runtime stopped working earlier: " + *reason);
  }
}

void Endpoint::check_usable() {
  check_poison();
  if (closed()) throw UsageError(rank_name() + " has closed its runtime; connect a new one");
  if (!started_.load(std::memory_order_acquire))  // see `start`
    throw UsageError("the runtime is not connected; exchange addresses and call connect first");
  if (!owned_by_this_process()) {
    throw UsageError("the runtime belongs to process " + std::to_string(process_) + ", not to its fork " +
                     std::to_string(getpid()) + "; connect a new one there");
  }
  if (aborted()) {
    poison(mine().abort_reason());
    check_abort();
  }
}

uint64_t Endpoint::all_reduce_bytes(uint64_t elements, DType dtype) const {
  if (dtype == DType::kBytes)
    throw UsageError("bytes have no sum; all_reduce takes float32, float16 and bfloat16");
  uint64_t bytes = elements * size_of(dtype);
  check_size("all_reduce", bytes);
  return bytes;
}

uint64_t Endpoint::all_gather_bytes(uint64_t outer, uint64_t inner_bytes) const {
  uint64_t bytes = outer * inner_bytes;
  check_size("all_gather", bytes);
  return bytes;
}

void Endpoint::check_size(const char* collective, uint64_t bytes) const {
  if (bytes <= options_.largest_message) return;
  throw UsageError("an " + std::string(collective) + " of " + std::to_string(bytes) +
                   " bytes is over the limit of " + std::to_string(options_.largest_message) + "; split it");
}

MismatchError Endpoint::mismatch(uint32_t sequence, const Operation& mine, const Operation& theirs) const {
  return MismatchError("the ranks called different collectives at sequence " + std::to_string(sequence) +
                       ": " + rank_name() + " an " + mine.describe() + ", " + peer_.name() + " an " +
                       theirs.describe() + "; both must call the same ones in the same order");
}

TimeoutError Endpoint::timed_out(const std::string& where) const {
  return TimeoutError(wait_in(where) + ": it did not come within " + seconds_text(options_.timeout) +
                      peer_.state() +
                      "; see what it is doing, or allow more time (timeout_s, --spark-collective-timeout)");
}

std::string Endpoint::wait_in(const std::string& where) const {
  return rank_name() + " waited for " + peer_.name() + " in " + where;
}

void Endpoint::abort(const std::string& reason) {
  if (!owned_by_this_process())
    return;  // a fork shares the regions, and has no right to end the ranks' waits
  poison(reason);
  end_waits(reason);
  end_peer_waits(reason);
}

void Endpoint::end_waits(const std::string& reason) {
  if (write_abort(mine(), reason)) return;
  // The peer was first, and may have died or been stopped while it wrote: this rank's waits end all the same.
  for (auto end = Clock::now() + kReasonTime; !aborted() && Clock::now() < end;) std::this_thread::yield();
  // Release: as in `write_abort`, for whatever has been written of the reason.
  mine().abort().store(kAborted, std::memory_order_release);
}

void Endpoint::end_peer_waits(const std::string& reason) {
  if (!connected_.load(std::memory_order_seq_cst)) return;  // see publish_peer
  std::string sentence = rank_name() + " stopped: " + reason;
  if (link_) {
    link_->announce_stop(sentence);
  } else {
    write_abort(*theirs_, sentence);
  }
}

bool Endpoint::aborted() const {
  // Acquire: the reason, and whatever the aborting rank sent before, was written before the word became
  // kAborted.
  return mine().abort().load(std::memory_order_acquire) == kAborted;
}

void Endpoint::check_abort() const {
  if (aborted()) throw AbortedError(mine().abort_reason());
}

bool Endpoint::write_abort(Region region, const std::string& reason) {
  // The first reason counts: the thread that claims the word writes it.
  uint32_t none = kRunning;
  if (!region.abort().compare_exchange_strong(none, kAbortClaimed, std::memory_order_relaxed)) return false;
  size_t length = whole_characters(reason, Region::abort_reason_size() - 1);
  std::memcpy(region.abort_reason(), reason.data(), length);
  region.abort_reason()[length] = '\0';
  // Release: a thread that acquires it reads the reason.
  region.abort().store(kAborted, std::memory_order_release);
  return true;
}

void Endpoint::poison(const std::string& reason) {
  const std::string* none = nullptr;
  const std::string* mine = new std::string(reason);
  // Sequentially consistent: see publish_peer; also a release, since readers dereference the pointer. The
  // first failure is the cause of later ones.
  if (!poison_.compare_exchange_strong(none, mine, std::memory_order_seq_cst)) delete mine;
}

std::string Endpoint::poison() const {
  const std::string* reason = poison_.load(std::memory_order_acquire);  // see check_poison
  return reason == nullptr ? "" : *reason;
}

bool Endpoint::close() {
  if (closed_.exchange(true) || !owned_by_this_process()) return false;
  end_waits("the runtime was closed");
  return true;
}

}  // namespace spark
