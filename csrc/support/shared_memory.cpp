#include "shared_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "errors.hpp"

namespace spark {

FileDescriptor::~FileDescriptor() {
  if (value_ >= 0) close(value_);
}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(value_, other.value_);
  return *this;
}

int FileDescriptor::release() {
  return std::exchange(value_, -1);
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : descriptor_(std::move(other.descriptor_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

SharedMemory SharedMemory::create(size_t bytes) {
  SharedMemory memory;
  memory.descriptor_ = FileDescriptor(memfd_create("vllm-spark-region", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  // Sealed: memory that shrank under the other rank's hands would end it with SIGBUS.
  if (memory.descriptor_.get() < 0 || ftruncate(memory.descriptor_.get(), static_cast<off_t>(bytes)) != 0 ||
      fcntl(memory.descriptor_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    throw CollectiveError("cannot make " + std::to_string(bytes) + " bytes of shared memory (" +
                          std::strerror(errno) + "); use smaller slots or free some memory");
  }
  memory.map(bytes);
  return memory;
}

SharedMemory SharedMemory::open(pid_t process, int descriptor, size_t bytes) {
  std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(descriptor);
  SharedMemory memory;
  memory.descriptor_ = FileDescriptor(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  struct stat status{};
  if (memory.descriptor_.get() < 0 || fstat(memory.descriptor_.get(), &status) != 0) {
    throw CollectiveError(
        "cannot open the memory of process " + std::to_string(process) + " (" + std::strerror(errno) +
        "); the loopback transport joins two processes of one machine, one user and one process "
        "namespace");
  }
  if (static_cast<size_t>(status.st_size) != bytes) {
    throw CollectiveError("the memory of process " + std::to_string(process) + " has " +
                          std::to_string(status.st_size) + " bytes where " + std::to_string(bytes) +
                          " were agreed; is it on another machine?");
  }
  memory.map(bytes);
  return memory;
}

void SharedMemory::map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_.get(), 0);
  if (mapped == MAP_FAILED) {
    throw CollectiveError("cannot map " + std::to_string(bytes) + " bytes of shared memory (" +
                          std::strerror(errno) + "); free some memory");
  }
  data_ = static_cast<std::byte*>(mapped);
  size_ = bytes;
}

}  // namespace spark
