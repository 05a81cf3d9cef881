#include "library.hpp"

#include <dlfcn.h>

#include "../../support/errors.hpp"

namespace spark::verbs {
namespace {

constexpr const char* kName = "libibverbs.so.1";

template <typename Function>
void find(void* handle, Function& function, const char* name, const char* version = "IBVERBS_1.1") {
  // By version: some of these have an older form under the same name.
  void* found = dlvsym(handle, name, version);
  if (found == nullptr) found = dlsym(handle, name);
  if (found == nullptr) {
    throw CollectiveError(std::string(kName) + " has no " + name + "; install rdma-core 32 or later");
  }
  function = reinterpret_cast<Function>(found);
}

Library load() {
  void* handle = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw CollectiveError(std::string("RDMA needs ") + kName + ", which cannot be opened (" + dlerror() +
                          "); install it (apt install libibverbs1 ibverbs-providers)");
  }
  Library library{};
  find(handle, library.get_device_list, "ibv_get_device_list");
  find(handle, library.free_device_list, "ibv_free_device_list");
  find(handle, library.get_device_name, "ibv_get_device_name");
  find(handle, library.open_device, "ibv_open_device");
  find(handle, library.close_device, "ibv_close_device");
  find(handle, library.alloc_pd, "ibv_alloc_pd");
  find(handle, library.dealloc_pd, "ibv_dealloc_pd");
  find(handle, library.reg_mr, "ibv_reg_mr");
  find(handle, library.dereg_mr, "ibv_dereg_mr");
  find(handle, library.create_cq, "ibv_create_cq");
  find(handle, library.destroy_cq, "ibv_destroy_cq");
  find(handle, library.create_qp, "ibv_create_qp");
  find(handle, library.modify_qp, "ibv_modify_qp");
  find(handle, library.destroy_qp, "ibv_destroy_qp");
  find(handle, library.query_port, "ibv_query_port");
  find(handle, library.query_gid, "_ibv_query_gid_ex", "IBVERBS_1.11");
  find(handle, library.get_async_event, "ibv_get_async_event");
  find(handle, library.ack_async_event, "ibv_ack_async_event");
  find(handle, library.status_text, "ibv_wc_status_str");
  find(handle, library.event_text, "ibv_event_type_str");
  find(handle, library.fork_init, "ibv_fork_init");
  // Before all else: compilers that vLLM forks must not move the pages of queues away from under the NIC.
  // Kernels since 5.12 see to that by themselves, and then this does nothing.
  library.fork_init();
  return library;
}

}  // namespace

const Library& Library::get() {
  static const Library library = load();
  return library;
}

}  // namespace spark::verbs
