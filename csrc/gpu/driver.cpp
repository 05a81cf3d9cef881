#include "driver.hpp"

#include <dlfcn.h>

#include <cstring>

#include "../support/errors.hpp"

namespace spark::device {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) {
    throw UsageError(std::string("this machine's CUDA driver has no ") + name +
                     "; install driver 525 or later");
  }
  static_assert(sizeof symbol == sizeof function);
  std::memcpy(&function, &symbol, sizeof function);
}

// What to do about an error of the driver's.
const char* remedy(Result error) {
  constexpr Result kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
  if (error == kOutOfMemory) return "free some memory, or use smaller slots";
  return "start this process anew, and if that does not help see nvidia-smi and the kernel's log";
}

Driver load() {
  // Never closed: torch uses the same library, and kernels may run until the process ends.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw UsageError(
        "there is no CUDA driver on this machine (libcuda.so.1); install NVIDIA's, 525 or later");
  }
  Driver driver;
  find(library, "cuGetErrorName", driver.get_error_name);
  find(library, "cuCtxGetCurrent", driver.context_current);
  find(library, "cuCtxGetDevice", driver.context_device);
  find(library, "cuDeviceGetAttribute", driver.device_attribute);
  find(library, "cuCtxPushCurrent_v2", driver.context_push);
  find(library, "cuCtxPopCurrent_v2", driver.context_pop);
  find(library, "cuCtxSynchronize", driver.context_synchronize);
  find(library, "cuMemHostRegister_v2", driver.host_register);
  find(library, "cuMemHostUnregister", driver.host_unregister);
  find(library, "cuMemHostGetDevicePointer_v2", driver.host_device_pointer);
  find(library, "cuMemHostAlloc", driver.host_alloc);
  find(library, "cuMemFreeHost", driver.host_free);
  find(library, "cuMemAlloc_v2", driver.allocate);
  find(library, "cuMemFree_v2", driver.release);
  find(library, "cuMemcpyHtoD_v2", driver.copy_to_device);
  find(library, "cuLibraryLoadData", driver.load_library);
  find(library, "cuLibraryUnload", driver.unload_library);
  find(library, "cuLibraryGetKernel", driver.find_kernel);
  find(library, "cuKernelGetFunction", driver.load_kernel);
  find(library, "cuLaunchKernelEx", driver.launch);
  find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", driver.blocks_per_multiprocessor);
  return driver;
}

int device_attribute(int attribute, const char* what) {
  const Driver& driver = Driver::get();
  Device device = 0;
  int value = 0;
  driver.check(driver.context_device(&device), "name the GPU in use");
  driver.check(driver.device_attribute(&value, attribute, device), what);
  return value;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load();
  return driver;
}

void Driver::check(Result result, const std::string& what) const {
  if (result == 0) return;
  const char* name = nullptr;
  get_error_name(result, &name);
  throw CollectiveError("the CUDA driver could not " + what + " (" +
                        (name == nullptr ? std::to_string(result) : name) + "); " + remedy(result));
}

void* current_context() {
  void* context = nullptr;
  Driver::get().check(Driver::get().context_current(&context), "name the current context");
  if (context == nullptr)
    throw UsageError("no GPU is in use by this thread; call torch.cuda.set_device first");
  return context;
}

int compute_capability() {
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  const char* what = "tell the GPU's compute capability";
  return 10 * device_attribute(kMajor, what) + device_attribute(kMinor, what);
}

bool limits_kernel_time() {
  constexpr int kKernelExecTimeout = 17;  // CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT
  return device_attribute(kKernelExecTimeout, "tell whether the time of kernels is limited") != 0;
}

int multiprocessors() {
  constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
  return device_attribute(kMultiprocessors, "tell how many multiprocessors the GPU has");
}

unsigned char* device_pointer(void* memory) {
  DevicePointer pointer = 0;
  Driver::get().check(Driver::get().host_device_pointer(&pointer, memory, 0), "map host memory into the GPU");
  return reinterpret_cast<unsigned char*>(pointer);
}

CurrentContext::CurrentContext(void* context) : pushed_(Driver::get().context_push(context) == 0) {}

CurrentContext::~CurrentContext() {
  if (!pushed_) return;
  void* context = nullptr;
  Driver::get().context_pop(&context);
}

RegisteredMemory::RegisteredMemory(void* memory, size_t bytes) : memory_(memory) {
  const Driver& driver = Driver::get();
  driver.check(driver.host_register(memory, bytes, kHostPortable | kHostMapped),
               "pin " + std::to_string(bytes) + " bytes of shared memory");
  try {
    on_device_ = device_pointer(memory);
  } catch (...) {
    driver.host_unregister(memory);
    throw;
  }
}

RegisteredMemory::~RegisteredMemory() {
  Driver::get().host_unregister(memory_);
}

MappedMemory::MappedMemory(size_t bytes) {
  const Driver& driver = Driver::get();
  driver.check(driver.host_alloc(&on_host_, bytes, kHostPortable | kHostMapped),
               "allocate " + std::to_string(bytes) + " bytes of pinned memory");
  std::memset(on_host_, 0, bytes);
  try {
    on_device_ = device_pointer(on_host_);
  } catch (...) {
    driver.host_free(on_host_);
    throw;
  }
}

MappedMemory::~MappedMemory() {
  Driver::get().host_free(on_host_);
}

DeviceMemory::DeviceMemory(const void* content, size_t bytes) {
  const Driver& driver = Driver::get();
  driver.check(driver.allocate(&pointer_, bytes), "allocate " + std::to_string(bytes) + " bytes on the GPU");
  try {
    driver.check(driver.copy_to_device(pointer_, content, bytes), "write to the GPU's memory");
  } catch (...) {
    driver.release(pointer_);
    throw;
  }
}

DeviceMemory::~DeviceMemory() {
  Driver::get().release(pointer_);
}

}  // namespace spark::device
