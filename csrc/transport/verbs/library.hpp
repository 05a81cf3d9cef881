// The functions of libibverbs that are used here. libibverbs itself is opened when it is first needed: the
// module links to none of it, and works where there is none. A model of a device has the same functions
// (csrc/transport/modelled/nic.hpp).
#pragma once

#include <string>

#include "abi.hpp"

namespace spark::verbs {

struct Library {
  // libibverbs. Throws CollectiveError with the remedy where it cannot be opened.
  static const Library& get();

  abi::ibv_device** (*get_device_list)(int* count);
  void (*free_device_list)(abi::ibv_device**);
  const char* (*get_device_name)(abi::ibv_device*);
  abi::ibv_context* (*open_device)(abi::ibv_device*);
  int (*close_device)(abi::ibv_context*);
  abi::ibv_pd* (*alloc_pd)(abi::ibv_context*);
  int (*dealloc_pd)(abi::ibv_pd*);
  abi::ibv_mr* (*reg_mr)(abi::ibv_pd*, void*, size_t, int access);
  int (*dereg_mr)(abi::ibv_mr*);
  abi::ibv_cq* (*create_cq)(abi::ibv_context*, int entries, void* user, void* channel, int vector);
  int (*destroy_cq)(abi::ibv_cq*);
  abi::ibv_qp* (*create_qp)(abi::ibv_pd*, abi::ibv_qp_init_attr*);
  int (*modify_qp)(abi::ibv_qp*, abi::ibv_qp_attr*, int mask);
  int (*destroy_qp)(abi::ibv_qp*);
  int (*query_port)(abi::ibv_context*, uint8_t port, abi::ibv_port_attr*);
  int (*query_gid)(abi::ibv_context*, uint32_t port, uint32_t index, abi::ibv_gid_entry*, uint32_t flags,
                   size_t size);
  int (*get_async_event)(abi::ibv_context*, abi::ibv_async_event*);
  void (*ack_async_event)(abi::ibv_async_event*);
  int (*fork_init)();
  const char* (*status_text)(uint32_t status);
  const char* (*event_text)(uint32_t type);
};

}  // namespace spark::verbs
