// The binary interface of libibverbs, as far as it is used here (version IBVERBS_1.1, unchanged
// since 2006), under the names of infiniband/verbs.h. Declared here so that a machine without RDMA's headers
// builds the same module; where the headers are, tests/native/verbs_abi.cpp compares every member and number
// with them.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>

namespace spark::verbs::abi {

struct ibv_device;
struct ibv_pd;
struct ibv_cq;

struct ibv_context;
struct ibv_send_wr;
struct ibv_qp;
struct ibv_wc;

// Calls that libibverbs makes through the context and not by a symbol, by their place in ibv_context_ops.
constexpr int kOperations = 32;
constexpr int kPollCq = 11;
constexpr int kPostSend = 25;

struct ibv_context {
  ibv_device* device;
  void* ops[kOperations];
  int cmd_fd;
  int async_fd;
  int num_comp_vectors;
  pthread_mutex_t mutex;
  void* abi_compat;
};

using PollCq = int (*)(ibv_cq*, int entries, ibv_wc*);
using PostSend = int (*)(ibv_qp*, ibv_send_wr*, ibv_send_wr** failed);

struct ibv_mr {
  ibv_context* context;
  ibv_pd* pd;
  void* addr;
  size_t length;
  uint32_t handle;
  uint32_t lkey;
  uint32_t rkey;
};

struct ibv_qp {
  ibv_context* context;
  void* qp_context;
  ibv_pd* pd;
  ibv_cq* send_cq;
  ibv_cq* recv_cq;
  void* srq;
  uint32_t handle;
  uint32_t qp_num;
  uint32_t state;
  uint32_t qp_type;
  pthread_mutex_t mutex;
  pthread_cond_t cond;
  uint32_t events_completed;
};

struct ibv_sge {
  uint64_t addr;
  uint32_t length;
  uint32_t lkey;
};

enum ibv_wr_opcode : uint32_t { IBV_WR_RDMA_WRITE = 0 };
enum ibv_send_flags : uint32_t { IBV_SEND_SIGNALED = 1 << 1, IBV_SEND_INLINE = 1 << 3 };

struct ibv_send_wr {
  uint64_t wr_id;
  ibv_send_wr* next;
  ibv_sge* sg_list;
  int num_sge;
  uint32_t opcode;
  uint32_t send_flags;
  uint32_t imm_data;
  struct {
    struct {
      uint64_t remote_addr;
      uint32_t rkey;
    } rdma;
    uint64_t larger[2];  // verbs has a union here, of which atomics are the largest
  } wr;
  uint64_t unused[7];  // extended connections, windows, segmentation
};

enum ibv_wc_status : uint32_t { IBV_WC_SUCCESS = 0, IBV_WC_WR_FLUSH_ERR = 5, IBV_WC_RETRY_EXC_ERR = 12 };

struct ibv_wc {
  uint64_t wr_id;
  uint32_t status;
  uint32_t opcode;
  uint32_t vendor_err;
  uint32_t byte_len;
  uint32_t imm_data;
  uint32_t qp_num;
  uint32_t src_qp;
  uint32_t wc_flags;
  uint16_t pkey_index;
  uint16_t slid;
  uint8_t sl;
  uint8_t dlid_path_bits;
};

struct ibv_qp_cap {
  uint32_t max_send_wr;
  uint32_t max_recv_wr;
  uint32_t max_send_sge;
  uint32_t max_recv_sge;
  uint32_t max_inline_data;
};

enum ibv_qp_type : uint32_t { IBV_QPT_RC = 2 };

struct ibv_qp_init_attr {
  void* qp_context;
  ibv_cq* send_cq;
  ibv_cq* recv_cq;
  void* srq;
  ibv_qp_cap cap;
  uint32_t qp_type;
  int sq_sig_all;
};

struct ibv_gid {
  uint8_t raw[16];
};

struct ibv_global_route {
  alignas(8) ibv_gid dgid;
  uint32_t flow_label;
  uint8_t sgid_index;
  uint8_t hop_limit;
  uint8_t traffic_class;
};

struct ibv_ah_attr {
  ibv_global_route grh;
  uint16_t dlid;
  uint8_t sl;
  uint8_t src_path_bits;
  uint8_t static_rate;
  uint8_t is_global;
  uint8_t port_num;
};

enum ibv_qp_state : uint32_t {
  IBV_QPS_RESET = 0,
  IBV_QPS_INIT = 1,
  IBV_QPS_RTR = 2,
  IBV_QPS_RTS = 3,
  IBV_QPS_ERR = 6,
};

enum ibv_qp_attr_mask : int {
  IBV_QP_STATE = 1 << 0,
  IBV_QP_ACCESS_FLAGS = 1 << 3,
  IBV_QP_PKEY_INDEX = 1 << 4,
  IBV_QP_PORT = 1 << 5,
  IBV_QP_AV = 1 << 7,
  IBV_QP_PATH_MTU = 1 << 8,
  IBV_QP_TIMEOUT = 1 << 9,
  IBV_QP_RETRY_CNT = 1 << 10,
  IBV_QP_RNR_RETRY = 1 << 11,
  IBV_QP_RQ_PSN = 1 << 12,
  IBV_QP_MAX_QP_RD_ATOMIC = 1 << 13,
  IBV_QP_MIN_RNR_TIMER = 1 << 15,
  IBV_QP_SQ_PSN = 1 << 16,
  IBV_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
  IBV_QP_DEST_QPN = 1 << 20,
};

struct ibv_qp_attr {
  uint32_t qp_state;
  uint32_t cur_qp_state;
  uint32_t path_mtu;  // 1: 256 bytes, doubling up to 5: 4096
  uint32_t path_mig_state;
  uint32_t qkey;
  uint32_t rq_psn;
  uint32_t sq_psn;
  uint32_t dest_qp_num;
  uint32_t qp_access_flags;
  ibv_qp_cap cap;
  ibv_ah_attr ah_attr;
  ibv_ah_attr alt_ah_attr;
  uint16_t pkey_index;
  uint16_t alt_pkey_index;
  uint8_t en_sqd_async_notify;
  uint8_t sq_draining;
  uint8_t max_rd_atomic;
  uint8_t max_dest_rd_atomic;
  uint8_t min_rnr_timer;
  uint8_t port_num;
  uint8_t timeout;
  uint8_t retry_cnt;
  uint8_t rnr_retry;
  uint8_t alt_port_num;
  uint8_t alt_timeout;
  uint32_t rate_limit;
};

enum ibv_access_flags : uint32_t { IBV_ACCESS_LOCAL_WRITE = 1, IBV_ACCESS_REMOTE_WRITE = 1 << 1 };

enum ibv_port_state : uint32_t { IBV_PORT_DOWN = 1, IBV_PORT_ACTIVE = 4 };
enum : uint8_t { IBV_LINK_LAYER_ETHERNET = 2 };

struct ibv_port_attr {
  uint32_t state;
  uint32_t max_mtu;
  uint32_t active_mtu;
  int gid_tbl_len;
  uint32_t port_cap_flags;
  uint32_t max_msg_sz;
  uint32_t bad_pkey_cntr;
  uint32_t qkey_viol_cntr;
  uint16_t pkey_tbl_len;
  uint16_t lid;
  uint16_t sm_lid;
  uint8_t lmc;
  uint8_t max_vl_num;
  uint8_t sm_sl;
  uint8_t subnet_timeout;
  uint8_t init_type_reply;
  uint8_t active_width;
  uint8_t active_speed;
  uint8_t phys_state;
  uint8_t link_layer;
  uint8_t flags;
  uint16_t port_cap_flags2;
};

enum ibv_gid_type : uint32_t { IBV_GID_TYPE_ROCE_V2 = 2 };

struct ibv_gid_entry {
  alignas(8) ibv_gid gid;
  uint32_t gid_index;
  uint32_t port_num;
  uint32_t gid_type;
  uint32_t ndev_ifindex;
};

enum ibv_event_type : uint32_t {
  IBV_EVENT_QP_FATAL = 1,
  IBV_EVENT_QP_REQ_ERR = 2,
  IBV_EVENT_QP_ACCESS_ERR = 3,
  IBV_EVENT_DEVICE_FATAL = 8,
  IBV_EVENT_PORT_ACTIVE = 9,
  IBV_EVENT_PORT_ERR = 10,
};

struct ibv_async_event {
  union {
    ibv_qp* qp;
    int port_num;
  } element;
  uint32_t event_type;
};

}  // namespace spark::verbs::abi
