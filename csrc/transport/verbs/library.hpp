// libibverbs, opened when it is first needed: the module links to none of it, and works where there is none.
#pragma once

#include <string>

#include "abi.hpp"

namespace spark::verbs {

class Library {
 public:
  // The one of this process. Throws CollectiveError with the remedy where it cannot be opened.
  static const Library& get();

  abi::Device** (*get_device_list)(int* count);
  void (*free_device_list)(abi::Device**);
  const char* (*get_device_name)(abi::Device*);
  abi::Context* (*open_device)(abi::Device*);
  int (*close_device)(abi::Context*);
  abi::ProtectionDomain* (*alloc_pd)(abi::Context*);
  int (*dealloc_pd)(abi::ProtectionDomain*);
  abi::MemoryRegion* (*reg_mr)(abi::ProtectionDomain*, void*, size_t, int access);
  int (*dereg_mr)(abi::MemoryRegion*);
  abi::CompletionQueue* (*create_cq)(abi::Context*, int entries, void* user, void* channel, int vector);
  int (*destroy_cq)(abi::CompletionQueue*);
  abi::QueuePair* (*create_qp)(abi::ProtectionDomain*, abi::QueuePairSetup*);
  int (*modify_qp)(abi::QueuePair*, abi::QueuePairAttributes*, int mask);
  int (*destroy_qp)(abi::QueuePair*);
  int (*query_port)(abi::Context*, uint8_t port, abi::PortAttributes*);
  int (*query_gid)(abi::Context*, uint32_t port, uint32_t index, abi::GidEntry*, uint32_t flags, size_t size);
  int (*get_async_event)(abi::Context*, abi::Event*);
  void (*ack_async_event)(abi::Event*);
  int (*fork_init)();
  const char* (*status_text)(uint32_t status);
  const char* (*event_text)(uint32_t type);

 private:
  Library();
  void* handle_;
};

}  // namespace spark::verbs
