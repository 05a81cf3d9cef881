#include "gpu_rank.hpp"

#include <algorithm>
#include <atomic>

#include "../proxy/slot_scanner.hpp"
#include "../support/device_order.hpp"
#include "../support/errors.hpp"

namespace spark::device {
namespace {

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

// Memory of the GPU's driver for a region: freed with the context current, by whichever thread drops it last.
std::shared_ptr<std::byte> driver_memory(const Options& options) {
  struct Owner {
    void* context;
    std::unique_ptr<MappedMemory> memory;

    Owner(void* context, size_t bytes) : context(context), memory(std::make_unique<MappedMemory>(bytes)) {}
    ~Owner() {
      CurrentContext current(context);
      memory.reset();
    }
  };
  auto owner = std::make_shared<Owner>(current_context(), Endpoint::region_bytes(options));
  return {owner, static_cast<std::byte*>(owner->memory->on_host())};
}

// The peer's GPU polls what this rank's proxy copies.
Options polled_by_gpu(Options options) {
  options.copy_lines = true;
  return options;
}

}  // namespace

GpuRank::GpuRank(const Options& options, const LaunchShape& shape, const std::string& image,
                 bool uses_driver_memory)
    : Rank(polled_by_gpu(options), uses_driver_memory ? driver_memory(options) : nullptr),
      context_(current_context()),
      shape_(shape),
      gpu_([&] {
        Progress progress = first_progress(options);
        return new DriverResources{Kernels(image), nullptr, nullptr, MappedMemory(sizeof(Report)),
                                   DeviceMemory(&progress, sizeof progress)};
      }()) {
  if (compute_capability() < kFirstWithDependentLaunch) shape_.dependent_launch = false;
  // A message is complete when all of its pieces are sent, and a block ends with its last message: a block
  // that starts only when another one has ended would block all of them.
  uint32_t threads = 2 * shape_.payload_threads + kPayloadSideThreads;
  uint32_t at_once = gpu_->kernels.payload_blocks_at_once(threads);
  if (shape_.payload_blocks > at_once) {
    throw UsageError("payload_blocks " + std::to_string(shape_.payload_blocks) +
                     " is too many for this GPU, which runs " + std::to_string(at_once) + " blocks of " +
                     std::to_string(threads) + " threads at once; use fewer");
  }
  static_cast<Report*>(gpu_->report.on_host())->totals.sequence = options.first_sequence - 1;
}

GpuRank::~GpuRank() {
  if (!endpoint_.owned_by_this_process()) {
    // A fork has a copy of this object, but neither its threads nor its context; the eventfd is shared.
    static_cast<void>(peer_watch_.release());
    static_cast<void>(gpu_.release());
    return;
  }
  close();
  // The last reference may be dropped on a thread without a context. And a graph may have been replayed after
  // `close`: its kernels must end before their memory is freed.
  CurrentContext current(context_);
  Driver::get().context_synchronize();
  gpu_.reset();
}

// Registers a region in shared memory with the GPU only here, after the NIC has registered it: the kernel
// moves pages out of memory that must stay movable when they are pinned first, and cannot once the GPU's
// driver holds them.
void GpuRank::prepare() {
  const Options& options = endpoint_.options();
  const RegionLayout& layout = endpoint_.layout();
  if (endpoint_.shares_memory())
    gpu_->mine = std::make_unique<RegisteredMemory>(endpoint_.memory(), layout.total());
  unsigned char* mine = device_pointer(endpoint_.memory());
  parameters_.in = receive_slots(mine);
  parameters_.out = send_slots(mine);
  if (endpoint_.peer_memory() != nullptr) {
    gpu_->theirs = std::make_unique<RegisteredMemory>(endpoint_.peer_memory(), layout.total());
    if (!options.proxied) parameters_.out = receive_slots(gpu_->theirs->on_device());
    if (endpoint_.reads_send_slots()) {
      parameters_.in.payload = send_slots(gpu_->theirs->on_device()).payload;
    }
    peer_watch_ = std::make_unique<PeerWatch>(endpoint_.peer(), [this] {
      // Whatever it sent before it ended has arrived: kernels load once more after they see the abort word.
      endpoint_.end_waits(endpoint_.peer().name() + ": " + kProcessEnded);
    });
  }
  parameters_.abort = reinterpret_cast<const uint32_t*>(mine + layout.control() + offsetof(Control, abort));
  parameters_.progress = reinterpret_cast<Progress*>(gpu_->progress.on_device());
  parameters_.report = reinterpret_cast<Report*>(gpu_->report.on_device());
  parameters_.timeout_ns = static_cast<uint64_t>(options.timeout.count());
  parameters_.slots = options.sizes.slots;
  parameters_.depth = options.depth;
  parameters_.packet_area = static_cast<uint32_t>(layout.packet_area());
  parameters_.payload_area = static_cast<uint32_t>(layout.payload_area());
  parameters_.clear_interval = options.clear_interval;
  parameters_.index = static_cast<uint32_t>(options.rank);
}

std::unique_ptr<MessageSource> GpuRank::make_source() {
  return std::make_unique<SlotScanner>(endpoint_.mine(), endpoint_.options().first_sequence - 1,
                                       endpoint_.options().stripes);
}

Slots GpuRank::receive_slots(unsigned char* base) const {
  const RegionLayout& layout = endpoint_.layout();
  return {base + layout.recv_flags(), base + layout.recv_packets(), base + layout.recv_payload()};
}

Slots GpuRank::send_slots(unsigned char* base) const {
  const RegionLayout& layout = endpoint_.layout();
  return {base + layout.send_flags(), base + layout.send_packets(), base + layout.send_payload()};
}

void GpuRank::all_reduce(const void* in, void* out, uint64_t elements, DType dtype, Stream stream) {
  uint64_t bytes = endpoint_.all_reduce_bytes(elements, dtype);
  Call call{static_cast<const unsigned char*>(in), static_cast<unsigned char*>(out), bytes, 0, 0, 0};
  launch({Kind::kAllReduce, dtype, elements}, call, stream);
}

void GpuRank::all_gather(const void* in, void* out, uint64_t outer, uint64_t inner_bytes, Stream stream) {
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

void GpuRank::launch(const Operation& operation, const Call& arguments, Stream stream) {
  std::lock_guard<std::mutex> launching(launching_);
  endpoint_.check_usable();
  check();
  if (arguments.bytes == 0) return;  // needs no message
  check_aligned(operation, arguments.in);
  check_aligned(operation, arguments.out);
  const LaunchPlan launch = plan(arguments.bytes, shape_, endpoint_.options().sizes);
  Call call = arguments;
  call.tag = operation.tag();
  call.chunk = launch.message_bytes;
  void* parameters[] = {&parameters_, &call};
  LaunchAttribute dependent{kProgrammaticStreamSerialization, 0, {}};
  dependent.value.allowed = 1;
  LaunchConfig config{
      launch.blocks, 1, 1, launch.threads, 1, 1, 0, stream, &dependent, shape_.dependent_launch ? 1u : 0u};
  wake_proxy();  // a graph's replay does not come here
  const Driver& driver = Driver::get();
  driver.check(driver.launch(&config, gpu_->kernels.get(launch.protocol, operation.kind, operation.dtype),
                             parameters, nullptr),
               "launch an " + operation.describe());
}

void GpuRank::check() {
  const Failure& failure = report().failure;
  // Pairs with the kernel's release of the code after the other words.
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof failure.code);
  uint32_t code = load_from_device(reinterpret_cast<const std::atomic<uint32_t>&>(failure.code));
  endpoint_.check_poison();
  if (code == kNoFailure) return;
  Operation mine = Operation::from_tag(failure.expected_tag);
  std::string where = "an " + mine.describe() + ", sequence " + std::to_string(failure.sequence);
  auto fail = [&](auto error) {
    endpoint_.poison(error.what());
    endpoint_.end_peer_waits(error.what());
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
      fail(endpoint_.timed_out(where + ", " + endpoint_.path() + ", on the GPU"));
  }
}

void GpuRank::wait_until_idle() {
  // A launch that holds it comes first; every later one finds the rank closed.
  std::lock_guard<std::mutex> launching(launching_);
  CurrentContext current(context_);
  // Kernels that still run see the abort word and end: only then may their memory be released.
  Driver::get().context_synchronize();
}

CollectiveCounters GpuRank::counters() const {
  // Each word is whole, but of another moment.
  const Totals totals = report().totals;
  return {totals.all_reduces,
          totals.all_reduce_bytes,
          totals.all_gathers,
          totals.all_gather_bytes,
          totals.packet_messages,
          totals.payload_messages,
          totals.chunked_operations,
          0.0,
          static_cast<uint32_t>(totals.sequence)};
}

}  // namespace spark::device
