// A libcuda without a GPU: memory is the process's own, and kernels are launched but not run. For what the
// host does around kernels, and for calls that block, as real ones do while the GPU is behind.
//
// One call can be held (`cuda_hold`): it blocks until it is released, or fails after HOLD_SECONDS.
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "trace.hpp"

namespace {

constexpr int kLaunchTimeout = 702;  // CUDA_ERROR_LAUNCH_TIMEOUT
constexpr auto kHoldSeconds = std::chrono::seconds(10);

std::mutex mutex;
std::condition_variable changed;
std::string held;  // the call that blocks; empty: none
int waiting = 0, expired = 0;

int pass(const char* call) {
  std::unique_lock<std::mutex> lock(mutex);
  if (held != call) return 0;
  ++waiting;
  bool released = changed.wait_for(lock, kHoldSeconds, [call] { return held != call; });
  --waiting;
  if (released) return 0;
  ++expired;
  return kLaunchTimeout;
}

}  // namespace

extern "C" {

// For the test. `cuda_waiting`: calls that block now; `cuda_expired`: calls that were not released in time.
void cuda_hold(const char* call) {
  std::lock_guard<std::mutex> lock(mutex);
  held = call;
}
void cuda_release() {
  std::lock_guard<std::mutex> lock(mutex);
  held.clear();
  changed.notify_all();
}
int cuda_waiting() {
  std::lock_guard<std::mutex> lock(mutex);
  return waiting;
}
int cuda_expired() {
  std::lock_guard<std::mutex> lock(mutex);
  return expired;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == kLaunchTimeout ? "CUDA_ERROR_LAUNCH_TIMEOUT" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = &mutex;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  // Compute capability 9.0, 132 multiprocessors, and a display if the environment says so.
  bool display = attribute == 17 && std::getenv("DISPLAY_ON_GPU") != nullptr;
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : display;
  return 0;
}
int cuCtxPushCurrent_v2(void*) {
  return 0;
}
int cuCtxPopCurrent_v2(void**) {
  return 0;
}
int cuCtxSynchronize() {
  return pass("synchronize");
}
int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  trace("cuda-register", memory, bytes);
  return pass("register");
}
int cuMemHostUnregister(void* memory) {
  trace("cuda-unregister", memory, 0);
  return 0;
}
int cuMemHostGetDevicePointer_v2(unsigned long long* pointer, void* memory, unsigned) {
  *pointer = reinterpret_cast<uintptr_t>(memory);
  return 0;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  trace("cuda-alloc", *memory, bytes);
  return 0;
}
int cuMemFreeHost(void* memory) {
  std::free(memory);
  return 0;
}
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  *pointer = reinterpret_cast<uintptr_t>(std::malloc(bytes));
  return 0;
}
int cuMemFree_v2(unsigned long long pointer) {
  std::free(reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)));
  return 0;
}
int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(static_cast<uintptr_t>(to)), from, bytes);
  return 0;
}
int cuLibraryLoadData(void** library, const void*, void*, void*, unsigned, void*, void*, unsigned) {
  *library = &mutex;
  return pass("load");
}
int cuLibraryUnload(void*) {
  return 0;
}
int cuLibraryGetKernel(void** kernel, void*, const char*) {
  *kernel = &mutex;
  return 0;
}
int cuKernelGetFunction(void** function, void*) {
  *function = &mutex;
  return 0;
}
int cuLaunchKernelEx(const void*, void*, void**, void**) {
  return pass("launch");
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = 1;
  return 0;
}

}  // extern "C"
