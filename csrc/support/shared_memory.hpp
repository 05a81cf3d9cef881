// Memory that two processes of one machine share, with no name that could outlive them.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

namespace spark {

class FileDescriptor {
 public:
  explicit FileDescriptor(int value = -1) : value_(value) {}
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept : value_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  int get() const { return value_; }
  int release();

 private:
  int value_;
};

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Fresh zeroed memory of this process. Throws CollectiveError.
  static SharedMemory create(size_t bytes);
  // Another process's memory, by its process id and descriptor. Throws CollectiveError, with what loopback
  // needs.
  static SharedMemory open(pid_t process, int descriptor, size_t bytes);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int descriptor() const { return descriptor_.get(); }

 private:
  void map(size_t bytes);

  FileDescriptor descriptor_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace spark
