// Compiles only if csrc/transport/verbs/abi.hpp describes what libibverbs' own header does.
#include <infiniband/verbs.h>

#include "../../csrc/transport/verbs/abi.hpp"

namespace abi = spark::verbs::abi;

#define SAME_SIZE(type) static_assert(sizeof(abi::type) == sizeof(::type), #type)
#define SAME_MEMBER(type, member)                                          \
  static_assert(offsetof(abi::type, member) == offsetof(::type, member) && \
                    sizeof(abi::type::member) == sizeof(::type::member),   \
                #type "::" #member)
#define SAME_NUMBER(name) static_assert(static_cast<int>(abi::name) == static_cast<int>(::name), #name)

static_assert(sizeof(abi::ibv_context::ops) == sizeof(::ibv_context_ops), "ops");
static_assert(abi::kPollCq * sizeof(void*) == offsetof(::ibv_context_ops, poll_cq), "poll_cq");
static_assert(abi::kPostSend * sizeof(void*) == offsetof(::ibv_context_ops, post_send), "post_send");
static_assert(offsetof(abi::ibv_send_wr, wr.rdma.remote_addr) == offsetof(::ibv_send_wr, wr.rdma.remote_addr),
              "remote_addr");
static_assert(offsetof(abi::ibv_send_wr, wr.rdma.rkey) == offsetof(::ibv_send_wr, wr.rdma.rkey), "rkey");

SAME_SIZE(ibv_context);
SAME_MEMBER(ibv_context, device);
SAME_MEMBER(ibv_context, ops);
SAME_MEMBER(ibv_context, cmd_fd);
SAME_MEMBER(ibv_context, async_fd);
SAME_MEMBER(ibv_context, num_comp_vectors);
SAME_MEMBER(ibv_context, mutex);
SAME_MEMBER(ibv_context, abi_compat);

SAME_SIZE(ibv_mr);
SAME_MEMBER(ibv_mr, context);
SAME_MEMBER(ibv_mr, pd);
SAME_MEMBER(ibv_mr, addr);
SAME_MEMBER(ibv_mr, length);
SAME_MEMBER(ibv_mr, handle);
SAME_MEMBER(ibv_mr, lkey);
SAME_MEMBER(ibv_mr, rkey);

SAME_SIZE(ibv_qp);
SAME_MEMBER(ibv_qp, context);
SAME_MEMBER(ibv_qp, qp_context);
SAME_MEMBER(ibv_qp, pd);
SAME_MEMBER(ibv_qp, send_cq);
SAME_MEMBER(ibv_qp, recv_cq);
SAME_MEMBER(ibv_qp, srq);
SAME_MEMBER(ibv_qp, handle);
SAME_MEMBER(ibv_qp, qp_num);
SAME_MEMBER(ibv_qp, state);
SAME_MEMBER(ibv_qp, qp_type);
SAME_MEMBER(ibv_qp, mutex);
SAME_MEMBER(ibv_qp, cond);
SAME_MEMBER(ibv_qp, events_completed);

SAME_SIZE(ibv_sge);
SAME_MEMBER(ibv_sge, addr);
SAME_MEMBER(ibv_sge, length);
SAME_MEMBER(ibv_sge, lkey);

SAME_NUMBER(IBV_WR_RDMA_WRITE);
SAME_NUMBER(IBV_SEND_SIGNALED);
SAME_NUMBER(IBV_SEND_INLINE);

SAME_NUMBER(IBV_WC_SUCCESS);
SAME_NUMBER(IBV_WC_WR_FLUSH_ERR);
SAME_NUMBER(IBV_WC_RETRY_EXC_ERR);

SAME_SIZE(ibv_qp_cap);
SAME_MEMBER(ibv_qp_cap, max_send_wr);
SAME_MEMBER(ibv_qp_cap, max_recv_wr);
SAME_MEMBER(ibv_qp_cap, max_send_sge);
SAME_MEMBER(ibv_qp_cap, max_recv_sge);
SAME_MEMBER(ibv_qp_cap, max_inline_data);

SAME_NUMBER(IBV_QPT_RC);

SAME_SIZE(ibv_gid);
SAME_MEMBER(ibv_gid, raw);

SAME_SIZE(ibv_global_route);
SAME_MEMBER(ibv_global_route, dgid);
SAME_MEMBER(ibv_global_route, flow_label);
SAME_MEMBER(ibv_global_route, sgid_index);
SAME_MEMBER(ibv_global_route, hop_limit);
SAME_MEMBER(ibv_global_route, traffic_class);

SAME_SIZE(ibv_ah_attr);
SAME_MEMBER(ibv_ah_attr, grh);
SAME_MEMBER(ibv_ah_attr, dlid);
SAME_MEMBER(ibv_ah_attr, sl);
SAME_MEMBER(ibv_ah_attr, src_path_bits);
SAME_MEMBER(ibv_ah_attr, static_rate);
SAME_MEMBER(ibv_ah_attr, is_global);
SAME_MEMBER(ibv_ah_attr, port_num);

SAME_NUMBER(IBV_QPS_RESET);
SAME_NUMBER(IBV_QPS_INIT);
SAME_NUMBER(IBV_QPS_RTR);
SAME_NUMBER(IBV_QPS_RTS);
SAME_NUMBER(IBV_QPS_ERR);

SAME_NUMBER(IBV_QP_STATE);
SAME_NUMBER(IBV_QP_ACCESS_FLAGS);
SAME_NUMBER(IBV_QP_PKEY_INDEX);
SAME_NUMBER(IBV_QP_PORT);
SAME_NUMBER(IBV_QP_AV);
SAME_NUMBER(IBV_QP_PATH_MTU);
SAME_NUMBER(IBV_QP_TIMEOUT);
SAME_NUMBER(IBV_QP_RETRY_CNT);
SAME_NUMBER(IBV_QP_RNR_RETRY);
SAME_NUMBER(IBV_QP_RQ_PSN);
SAME_NUMBER(IBV_QP_MAX_QP_RD_ATOMIC);
SAME_NUMBER(IBV_QP_MIN_RNR_TIMER);
SAME_NUMBER(IBV_QP_SQ_PSN);
SAME_NUMBER(IBV_QP_MAX_DEST_RD_ATOMIC);
SAME_NUMBER(IBV_QP_DEST_QPN);

SAME_SIZE(ibv_qp_attr);
SAME_MEMBER(ibv_qp_attr, qp_state);
SAME_MEMBER(ibv_qp_attr, cur_qp_state);
SAME_MEMBER(ibv_qp_attr, path_mtu);
SAME_MEMBER(ibv_qp_attr, path_mig_state);
SAME_MEMBER(ibv_qp_attr, qkey);
SAME_MEMBER(ibv_qp_attr, rq_psn);
SAME_MEMBER(ibv_qp_attr, sq_psn);
SAME_MEMBER(ibv_qp_attr, dest_qp_num);
SAME_MEMBER(ibv_qp_attr, qp_access_flags);
SAME_MEMBER(ibv_qp_attr, cap);
SAME_MEMBER(ibv_qp_attr, ah_attr);
SAME_MEMBER(ibv_qp_attr, alt_ah_attr);
SAME_MEMBER(ibv_qp_attr, pkey_index);
SAME_MEMBER(ibv_qp_attr, alt_pkey_index);
SAME_MEMBER(ibv_qp_attr, en_sqd_async_notify);
SAME_MEMBER(ibv_qp_attr, sq_draining);
SAME_MEMBER(ibv_qp_attr, max_rd_atomic);
SAME_MEMBER(ibv_qp_attr, max_dest_rd_atomic);
SAME_MEMBER(ibv_qp_attr, min_rnr_timer);
SAME_MEMBER(ibv_qp_attr, port_num);
SAME_MEMBER(ibv_qp_attr, timeout);
SAME_MEMBER(ibv_qp_attr, retry_cnt);
SAME_MEMBER(ibv_qp_attr, rnr_retry);
SAME_MEMBER(ibv_qp_attr, alt_port_num);
SAME_MEMBER(ibv_qp_attr, alt_timeout);
SAME_MEMBER(ibv_qp_attr, rate_limit);

SAME_NUMBER(IBV_ACCESS_LOCAL_WRITE);
SAME_NUMBER(IBV_ACCESS_REMOTE_WRITE);
SAME_NUMBER(IBV_PORT_DOWN);
SAME_NUMBER(IBV_PORT_ACTIVE);
SAME_NUMBER(IBV_LINK_LAYER_ETHERNET);

SAME_NUMBER(IBV_GID_TYPE_ROCE_V2);

SAME_NUMBER(IBV_EVENT_QP_FATAL);
SAME_NUMBER(IBV_EVENT_QP_REQ_ERR);
SAME_NUMBER(IBV_EVENT_QP_ACCESS_ERR);
SAME_NUMBER(IBV_EVENT_DEVICE_FATAL);
SAME_NUMBER(IBV_EVENT_PORT_ACTIVE);
SAME_NUMBER(IBV_EVENT_PORT_ERR);

SAME_SIZE(ibv_async_event);
SAME_MEMBER(ibv_async_event, element);
SAME_MEMBER(ibv_async_event, event_type);
