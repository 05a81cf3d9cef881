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

}  // namespace

const Library& Library::get() {
  static const Library library;
  return library;
}

Library::Library() : handle_(dlopen(kName, RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    throw CollectiveError(std::string("RDMA needs ") + kName + ", which cannot be opened (" + dlerror() +
                          "); install it (apt install libibverbs1 ibverbs-providers)");
  }
  find(handle_, get_device_list, "ibv_get_device_list");
  find(handle_, free_device_list, "ibv_free_device_list");
  find(handle_, get_device_name, "ibv_get_device_name");
  find(handle_, open_device, "ibv_open_device");
  find(handle_, close_device, "ibv_close_device");
  find(handle_, alloc_pd, "ibv_alloc_pd");
  find(handle_, dealloc_pd, "ibv_dealloc_pd");
  find(handle_, reg_mr, "ibv_reg_mr");
  find(handle_, dereg_mr, "ibv_dereg_mr");
  find(handle_, create_cq, "ibv_create_cq");
  find(handle_, destroy_cq, "ibv_destroy_cq");
  find(handle_, create_qp, "ibv_create_qp");
  find(handle_, modify_qp, "ibv_modify_qp");
  find(handle_, destroy_qp, "ibv_destroy_qp");
  find(handle_, query_port, "ibv_query_port");
  find(handle_, query_gid, "_ibv_query_gid_ex", "IBVERBS_1.11");
  find(handle_, get_async_event, "ibv_get_async_event");
  find(handle_, ack_async_event, "ibv_ack_async_event");
  find(handle_, status_text, "ibv_wc_status_str");
  find(handle_, event_text, "ibv_event_type_str");
  find(handle_, fork_init, "ibv_fork_init");
  // Before all else: compilers that vLLM forks must not move the pages of queues away from under the NIC.
  // Kernels since 5.12 see to that by themselves, and then this does nothing.
  fork_init();
}

}  // namespace spark::verbs
