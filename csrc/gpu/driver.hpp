// The CUDA driver, opened at run time: a build without CUDA has the same module, and nothing links to
// libcuda.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace spark::device {

// The driver's types as its ABI has them.
using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using Stream = void*;
using Library = void*;
using Kernel = void*;
using Function = void*;

// CUlaunchAttribute and CUlaunchConfig, of which only this much is used.
struct LaunchAttribute {
  int id;
  int padding;
  union {
    char bytes[64];
    int allowed;
  } value;
};
constexpr int kProgrammaticStreamSerialization = 6;

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  Result (*get_error_name)(Result, const char**);
  Result (*context_current)(void**);
  Result (*context_device)(Device*);
  Result (*device_attribute)(int*, int, Device);
  Result (*context_push)(void*);
  Result (*context_pop)(void**);
  Result (*context_synchronize)();
  Result (*host_register)(void*, size_t, unsigned);
  Result (*host_unregister)(void*);
  Result (*host_device_pointer)(DevicePointer*, void*, unsigned);
  Result (*host_alloc)(void**, size_t, unsigned);
  Result (*host_free)(void*);
  Result (*allocate)(DevicePointer*, size_t);
  Result (*release)(DevicePointer);
  Result (*copy_to_device)(DevicePointer, const void*, size_t);
  Result (*load_library)(Library*, const void*, void*, void*, unsigned, void*, void*, unsigned);
  Result (*unload_library)(Library);
  Result (*find_kernel)(Kernel*, Library, const char*);
  Result (*load_kernel)(Function*, Kernel);
  Result (*launch)(const LaunchConfig*, Function, void**, void**);
  Result (*blocks_per_multiprocessor)(int*, Function, int, size_t);

  // The process's driver. Throws UsageError where there is none.
  static const Driver& get();

  // Throws CollectiveError with `what` and the driver's name for the error, unless `result` is success.
  void check(Result result, const std::string& what) const;
};

// Makes a context current for the life of this object, on any thread.
class CurrentContext {
 public:
  explicit CurrentContext(void* context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_;
};

// The calling thread's context. Throws UsageError if it has none.
void* current_context();

// Of the calling thread's GPU; they throw CollectiveError.
int compute_capability();  // 90 for 9.0
// From this one on, kernels wait for the one before them (csrc/kernels/progress.cuh), and setup.py leaves no
// such GPU with code that does not.
constexpr int kFirstWithDependentLaunch = 90;
int multiprocessors();
// Whether the driver ends kernels that run for some seconds, since a display uses the GPU.
bool limits_kernel_time();

constexpr unsigned kHostPortable = 1, kHostMapped = 2;

// The GPU's address of host memory that the driver has registered or allocated. Throws CollectiveError.
unsigned char* device_pointer(void* memory);

// Host memory that the GPU reads and writes, registered for the life of this object. Does not own the memory.
class RegisteredMemory {
 public:
  RegisteredMemory(void* memory, size_t bytes);
  ~RegisteredMemory();
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

  unsigned char* on_device() const { return on_device_; }

 private:
  void* memory_;
  unsigned char* on_device_ = nullptr;
};

// Zeroed host memory of this process that the GPU reads and writes.
class MappedMemory {
 public:
  explicit MappedMemory(size_t bytes);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  void* on_host() const { return on_host_; }
  unsigned char* on_device() const { return on_device_; }

 private:
  void* on_host_ = nullptr;
  unsigned char* on_device_ = nullptr;
};

// Device memory with given content.
class DeviceMemory {
 public:
  DeviceMemory(const void* content, size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  unsigned char* on_device() const { return reinterpret_cast<unsigned char*>(pointer_); }

 private:
  DevicePointer pointer_ = 0;
};

}  // namespace spark::device
