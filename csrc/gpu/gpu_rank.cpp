#include "gpu_rank.hpp"

#include <algorithm>
#include <atomic>

#include "../support/errors.hpp"

namespace spark::device {
namespace {

// From this compute capability on, kernels wait for the one before them (csrc/kernels/progress.cuh), and
// setup.py leaves no such GPU with code that does not.
constexpr int kFirstWithDependentLaunch = 90;

template <typename T>
T load_acquire(const T& word) {
  static_assert(std::atomic<T>::is_always_lock_free && sizeof(std::atomic<T>) == sizeof(T));
  return reinterpret_cast<const std::atomic<T>&>(word).load(std::memory_order_acquire);
}

Progress first_progress(const Options& options) {
  Progress progress{};
  std::fill_n(progress.sequences, kMaxPieces, options.first_sequence - 1);
  progress.totals.sequence = options.first_sequence - 1;
  return progress;
}

void check_aligned(const Operation& operation, const void* tensor) {
  uintptr_t beyond = reinterpret_cast<uintptr_t>(tensor) % kVector;
  if (beyond == 0) return;
  throw UsageError("an " + operation.describe() + " on a GPU takes no tensor that begins " +
                   std::to_string(beyond) + " bytes beyond a multiple of " + std::to_string(kVector) +
                   "; clone it");
}

// A peer's GPU polls what this rank's proxy copies.
Options polled_by_gpus(Options options) {
  options.copy_lines = true;
  return options;
}

}  // namespace

DeviceRuntime::DeviceRuntime(const Options& options, const LaunchShape& shape, const std::string& image)
    : endpoint_(polled_by_gpus(options)), context_(current_context()), shape_(shape), gpu_([&] {
        Progress progress = first_progress(options);
        return new Lent{Kernels(image), nullptr, nullptr, MappedMemory(sizeof(Report)),
                        DeviceMemory(&progress, sizeof progress)};
      }()) {
  if (compute_capability() < kFirstWithDependentLaunch) shape_.dependent_launch = false;
  // A message goes when all of its pieces are there, and a block ends with its last message: one that waited
  // for another to end would keep all from going.
  uint32_t threads = 2 * shape_.payload_threads + kPayloadSideThreads;
  uint32_t at_once = gpu_->kernels.payload_blocks_at_once(threads);
  if (shape_.payload_blocks > at_once) {
    throw UsageError("payload_blocks " + std::to_string(shape_.payload_blocks) +
                     " is too many for this GPU, which runs " + std::to_string(at_once) + " blocks of " +
                     std::to_string(threads) + " threads at once; use fewer");
  }
  static_cast<Report*>(gpu_->report.on_host())->totals.sequence = options.first_sequence - 1;
}

DeviceRuntime::~DeviceRuntime() {
  if (!endpoint_.owned_by_this_process()) {
    // A fork has a copy of this object, but neither its threads nor its context; the eventfd is shared.
    static_cast<void>(peer_watch_.release());
    static_cast<void>(proxy_.release());
    static_cast<void>(scanner_.release());
    static_cast<void>(gpu_.release());
    return;
  }
  close();
  // The last reference may go on a thread without a context. And a graph may have been replayed after
  // `close`: nothing is freed before that is through.
  CurrentContext current(context_);
  Driver::get().context_synchronize();
  gpu_.reset();
}

void DeviceRuntime::connect(const Address& peer, const std::string& description) {
  endpoint_.connect(peer, description);
  pin();
  gpu_->theirs = std::make_unique<RegisteredMemory>(endpoint_.peer_memory(), endpoint_.layout().total());
  start();
  peer_watch_ = std::make_unique<PeerWatch>(endpoint_.peer(), [this] {
    // Whatever it sent before it ended has arrived: kernels look once more after they see the abort word.
    endpoint_.end_waits(endpoint_.peer().name() + ": " + kProcessEnded);
  });
}

void DeviceRuntime::connect_link(const std::string& peer_offer, const std::string& description) {
  endpoint_.connect_link(peer_offer, description);
  // Here and not in `start`: if it fails, the peer is told before either rank begins.
  pin();
}

void DeviceRuntime::pin() {
  gpu_->mine = std::make_unique<RegisteredMemory>(endpoint_.memory(), endpoint_.layout().total());
}

void DeviceRuntime::start() {
  const Options& options = endpoint_.options();
  const RegionLayout& layout = endpoint_.layout();
  rank_.in = receive_lane(gpu_->mine->on_device());
  rank_.out = options.proxied ? send_lane(gpu_->mine->on_device()) : receive_lane(gpu_->theirs->on_device());
  rank_.abort = reinterpret_cast<const uint32_t*>(gpu_->mine->on_device() + layout.control() +
                                                  offsetof(Control, abort));
  rank_.progress = reinterpret_cast<Progress*>(gpu_->progress.on_device());
  rank_.report = reinterpret_cast<Report*>(gpu_->report.on_device());
  rank_.timeout_ns = static_cast<uint64_t>(options.timeout.count());
  rank_.slots = options.sizes.slots;
  rank_.depth = options.depth;
  rank_.packet_area = static_cast<uint32_t>(layout.packet_area());
  rank_.payload_area = static_cast<uint32_t>(layout.payload_area());
  rank_.clear_interval = options.clear_interval;
  rank_.index = static_cast<uint32_t>(options.rank);
  if (options.proxied) {
    scanner_ = std::make_unique<SlotScanner>(endpoint_.mine(), options.first_sequence - 1);
    proxy_ = std::make_unique<ProxyThread>(*scanner_, endpoint_.transport());
  }
  endpoint_.start();
}

Lane DeviceRuntime::receive_lane(unsigned char* base) const {
  const RegionLayout& layout = endpoint_.layout();
  return {base + layout.recv_flags(), base + layout.recv_packets(), base + layout.recv_payload()};
}

Lane DeviceRuntime::send_lane(unsigned char* base) const {
  const RegionLayout& layout = endpoint_.layout();
  return {base + layout.send_flags(), base + layout.send_packets(), base + layout.send_payload()};
}

void DeviceRuntime::all_reduce(const void* in, void* out, uint64_t elements, DType dtype, Stream stream) {
  uint64_t bytes = endpoint_.all_reduce_bytes(elements, dtype);
  Call call{static_cast<const unsigned char*>(in), static_cast<unsigned char*>(out), bytes, 0, 0, 0};
  launch({Kind::kAllReduce, dtype, elements}, call, stream);
}

void DeviceRuntime::all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes,
                               Stream stream) {
  uint64_t bytes = endpoint_.all_gather_bytes(outer, inner_bytes);
  if (inner_bytes % kVector != 0) {
    throw UsageError("an all_gather of rows of " + std::to_string(inner_bytes) +
                     " bytes is not possible on a GPU; they must be a multiple of " +
                     std::to_string(kVector));
  }
  Call call{static_cast<const unsigned char*>(in),
            static_cast<unsigned char*>(out),
            bytes,
            static_cast<uint32_t>(inner_bytes),
            0,
            0};
  launch({Kind::kAllGather, DType::kBytes, bytes}, call, stream);
}

void DeviceRuntime::launch(const Operation& operation, const Call& arguments, Stream stream) {
  std::lock_guard<std::mutex> launching(launching_);
  endpoint_.check_usable();
  check();
  if (arguments.bytes == 0) return;  // nothing to wait for
  check_aligned(operation, arguments.in);
  check_aligned(operation, arguments.out);
  const LaunchPlan launch = plan(arguments.bytes, shape_, endpoint_.options().sizes);
  Call call = arguments;
  call.tag = operation.tag();
  call.chunk = launch.message_bytes;
  void* parameters[] = {&rank_, &call};
  LaunchAttribute dependent{kProgrammaticStreamSerialization, 0, {}};
  dependent.value.allowed = 1;
  LaunchConfig config{
      launch.blocks, 1, 1, launch.threads, 1, 1, 0, stream, &dependent, shape_.dependent_launch ? 1u : 0u};
  const Driver& driver = Driver::get();
  driver.check(driver.launch(&config, gpu_->kernels.get(launch.protocol, operation.kind, operation.dtype),
                             parameters, nullptr),
               "launch an " + operation.describe());
}

void DeviceRuntime::check() {
  const Failure& failure = report().failure;
  // Acquire: pairs with the kernel's release of the code after the other words.
  uint32_t code = load_acquire(failure.code);
  endpoint_.check_poison();
  if (code == kNoFailure) return;
  Operation mine = Operation::from_tag(failure.expected_tag);
  std::string where = "an " + mine.describe() + ", sequence " + std::to_string(failure.sequence);
  auto fail = [&](auto error) {
    endpoint_.poison(error.what());
    endpoint_.tell_peer(error.what());
    throw error;
  };
  switch (code) {
    case kMismatch:
      fail(endpoint_.mismatch(failure.sequence, mine, Operation::from_tag(failure.seen_tag)));
      break;
    case kConcurrent:
      fail(UsageError("collectives were launched on two streams at the same time (" + where +
                      "); the ranks' order would be lost, so use one stream, or let one wait for the other"));
      break;
    case kAbortSeen:
      endpoint_.poison(endpoint_.mine().abort_reason());
      throw AbortedError(endpoint_.mine().abort_reason());
    default:
      fail(endpoint_.overdue(where + ", " + endpoint_.path() + ", on the GPU"));
  }
}

void DeviceRuntime::close() {
  if (!endpoint_.close()) return;
  std::lock_guard<std::mutex> launching(launching_);
  CurrentContext current(context_);
  // What still runs sees the abort word and ends: only then may its memory go.
  Driver::get().context_synchronize();
  if (proxy_) proxy_->stop();  // delivers what was sent
  endpoint_.tell_peer("it closed its runtime");
}

Totals DeviceRuntime::totals() const {
  // Relaxed words of different moments: these are for people.
  return report().totals;
}

void DeviceRuntime::hold_proxy(bool held) {
  if (proxy_) proxy_->hold(held);
}

}  // namespace spark::device
