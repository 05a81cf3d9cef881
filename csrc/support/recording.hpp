// A bounded list of what one thread does, kept only while someone has started it.
//
// While it is off, the writer pays one relaxed load and a branch. The writer, and whoever starts and stops
// the recording, may be different threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace spark {

template <typename Record>
class Recording {
 public:
  // Relaxed: it orders nothing, the lock does. A writer may see a start or stop one record late.
  bool on() const { return on_.load(std::memory_order_relaxed); }

  // Keeps the next `capacity` records, in memory that is allocated here. An earlier recording is dropped.
  void start(size_t capacity) {
    std::vector<Record> room;
    room.reserve(capacity);
    std::lock_guard<std::mutex> lock(mutex_);
    records_.swap(room);
    capacity_ = capacity;
    lost_ = 0;
    on_.store(true, std::memory_order_relaxed);
  }

  void add(const Record& record) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!on_.load(std::memory_order_relaxed)) return;  // stopped since the caller looked
    if (records_.size() < capacity_) {
      records_.push_back(record);
    } else {
      ++lost_;
    }
  }

  // The records, and how many more found no room. Empty if it was not started.
  std::pair<std::vector<Record>, uint64_t> stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    on_.store(false, std::memory_order_relaxed);
    std::pair<std::vector<Record>, uint64_t> result(std::move(records_), lost_);
    records_.clear();
    lost_ = 0;
    return result;
  }

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::vector<Record> records_;
  size_t capacity_ = 0;
  uint64_t lost_ = 0;
};

}  // namespace spark
