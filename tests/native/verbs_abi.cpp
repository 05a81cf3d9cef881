// Compiles only if csrc/transport/verbs/abi.hpp describes what libibverbs' own header does.
#include <infiniband/verbs.h>

#include "../../csrc/transport/verbs/abi.hpp"

namespace abi = spark::verbs::abi;

#define SAME_SIZE(ours, theirs) static_assert(sizeof(abi::ours) == sizeof(theirs), #ours)
#define SAME_PLACE(ours, our_member, theirs, their_member)                           \
  static_assert(offsetof(abi::ours, our_member) == offsetof(theirs, their_member) && \
                    sizeof(abi::ours::our_member) == sizeof(theirs::their_member),   \
                #ours "::" #our_member)
#define SAME_NUMBER(ours, theirs) \
  static_assert(static_cast<int>(abi::ours) == static_cast<int>(theirs), #ours)

static_assert(sizeof(abi::Context::operations) == sizeof(ibv_context_ops), "operations");
static_assert(abi::kPollCompletions * sizeof(void*) == offsetof(ibv_context_ops, poll_cq), "poll_cq");
static_assert(abi::kPostSend * sizeof(void*) == offsetof(ibv_context_ops, post_send), "post_send");
SAME_SIZE(Context, ibv_context);
SAME_PLACE(Context, event_fd, ibv_context, async_fd);

SAME_SIZE(MemoryRegion, ibv_mr);
SAME_PLACE(MemoryRegion, local_key, ibv_mr, lkey);
SAME_PLACE(MemoryRegion, remote_key, ibv_mr, rkey);

SAME_SIZE(QueuePair, ibv_qp);
SAME_PLACE(QueuePair, number, ibv_qp, qp_num);

SAME_SIZE(Piece, ibv_sge);
SAME_PLACE(Piece, length, ibv_sge, length);
SAME_PLACE(Piece, local_key, ibv_sge, lkey);

SAME_SIZE(SendRequest, ibv_send_wr);
SAME_PLACE(SendRequest, next, ibv_send_wr, next);
SAME_PLACE(SendRequest, pieces, ibv_send_wr, sg_list);
SAME_PLACE(SendRequest, piece_count, ibv_send_wr, num_sge);
SAME_PLACE(SendRequest, opcode, ibv_send_wr, opcode);
SAME_PLACE(SendRequest, flags, ibv_send_wr, send_flags);
SAME_PLACE(SendRequest, remote_address, ibv_send_wr, wr.rdma.remote_addr);
SAME_PLACE(SendRequest, remote_key, ibv_send_wr, wr.rdma.rkey);
SAME_NUMBER(kRdmaWrite, IBV_WR_RDMA_WRITE);
SAME_NUMBER(kSignaled, IBV_SEND_SIGNALED);
SAME_NUMBER(kInline, IBV_SEND_INLINE);

SAME_SIZE(Completion, ibv_wc);
SAME_PLACE(Completion, status, ibv_wc, status);
SAME_PLACE(Completion, vendor_error, ibv_wc, vendor_err);
SAME_NUMBER(kSuccess, IBV_WC_SUCCESS);
SAME_NUMBER(kFlushed, IBV_WC_WR_FLUSH_ERR);

SAME_SIZE(Capacities, ibv_qp_cap);
SAME_PLACE(Capacities, inline_bytes, ibv_qp_cap, max_inline_data);
SAME_SIZE(QueuePairSetup, ibv_qp_init_attr);
SAME_PLACE(QueuePairSetup, capacities, ibv_qp_init_attr, cap);
SAME_PLACE(QueuePairSetup, type, ibv_qp_init_attr, qp_type);
SAME_PLACE(QueuePairSetup, signal_all, ibv_qp_init_attr, sq_sig_all);
SAME_NUMBER(kReliableConnection, IBV_QPT_RC);

SAME_SIZE(Gid, ibv_gid);
SAME_SIZE(GlobalRoute, ibv_global_route);
SAME_PLACE(GlobalRoute, source_index, ibv_global_route, sgid_index);
SAME_PLACE(GlobalRoute, traffic_class, ibv_global_route, traffic_class);
SAME_SIZE(AddressHandle, ibv_ah_attr);
SAME_PLACE(AddressHandle, is_global, ibv_ah_attr, is_global);
SAME_PLACE(AddressHandle, port, ibv_ah_attr, port_num);

SAME_SIZE(QueuePairAttributes, ibv_qp_attr);
SAME_PLACE(QueuePairAttributes, path_mtu, ibv_qp_attr, path_mtu);
SAME_PLACE(QueuePairAttributes, receive_packet_number, ibv_qp_attr, rq_psn);
SAME_PLACE(QueuePairAttributes, send_packet_number, ibv_qp_attr, sq_psn);
SAME_PLACE(QueuePairAttributes, destination_queue_pair, ibv_qp_attr, dest_qp_num);
SAME_PLACE(QueuePairAttributes, access_flags, ibv_qp_attr, qp_access_flags);
SAME_PLACE(QueuePairAttributes, address, ibv_qp_attr, ah_attr);
SAME_PLACE(QueuePairAttributes, partition_index, ibv_qp_attr, pkey_index);
SAME_PLACE(QueuePairAttributes, max_reads, ibv_qp_attr, max_rd_atomic);
SAME_PLACE(QueuePairAttributes, max_destination_reads, ibv_qp_attr, max_dest_rd_atomic);
SAME_PLACE(QueuePairAttributes, receiver_timer, ibv_qp_attr, min_rnr_timer);
SAME_PLACE(QueuePairAttributes, port, ibv_qp_attr, port_num);
SAME_PLACE(QueuePairAttributes, timeout, ibv_qp_attr, timeout);
SAME_PLACE(QueuePairAttributes, retry_count, ibv_qp_attr, retry_cnt);
SAME_PLACE(QueuePairAttributes, receiver_retry, ibv_qp_attr, rnr_retry);
SAME_NUMBER(kInit, IBV_QPS_INIT);
SAME_NUMBER(kReadyToReceive, IBV_QPS_RTR);
SAME_NUMBER(kReadyToSend, IBV_QPS_RTS);
SAME_NUMBER(kError, IBV_QPS_ERR);
SAME_NUMBER(kState, IBV_QP_STATE);
SAME_NUMBER(kAccessFlags, IBV_QP_ACCESS_FLAGS);
SAME_NUMBER(kPartitionIndex, IBV_QP_PKEY_INDEX);
SAME_NUMBER(kPort, IBV_QP_PORT);
SAME_NUMBER(kAddress, IBV_QP_AV);
SAME_NUMBER(kPathMtu, IBV_QP_PATH_MTU);
SAME_NUMBER(kTimeout, IBV_QP_TIMEOUT);
SAME_NUMBER(kRetryCount, IBV_QP_RETRY_CNT);
SAME_NUMBER(kReceiverRetry, IBV_QP_RNR_RETRY);
SAME_NUMBER(kReceivePacketNumber, IBV_QP_RQ_PSN);
SAME_NUMBER(kMaxReads, IBV_QP_MAX_QP_RD_ATOMIC);
SAME_NUMBER(kReceiverTimer, IBV_QP_MIN_RNR_TIMER);
SAME_NUMBER(kSendPacketNumber, IBV_QP_SQ_PSN);
SAME_NUMBER(kMaxDestinationReads, IBV_QP_MAX_DEST_RD_ATOMIC);
SAME_NUMBER(kDestinationQueuePair, IBV_QP_DEST_QPN);

SAME_NUMBER(kLocalWrite, IBV_ACCESS_LOCAL_WRITE);
SAME_NUMBER(kRemoteWrite, IBV_ACCESS_REMOTE_WRITE);

SAME_SIZE(PortAttributes, ibv_port_attr);
SAME_PLACE(PortAttributes, active_mtu, ibv_port_attr, active_mtu);
SAME_PLACE(PortAttributes, gid_count, ibv_port_attr, gid_tbl_len);
SAME_PLACE(PortAttributes, link_layer, ibv_port_attr, link_layer);
SAME_NUMBER(kPortActive, IBV_PORT_ACTIVE);
SAME_NUMBER(kEthernet, IBV_LINK_LAYER_ETHERNET);

SAME_SIZE(GidEntry, ibv_gid_entry);
SAME_PLACE(GidEntry, index, ibv_gid_entry, gid_index);
SAME_PLACE(GidEntry, type, ibv_gid_entry, gid_type);
SAME_PLACE(GidEntry, interface_index, ibv_gid_entry, ndev_ifindex);
SAME_NUMBER(kRoceV2, IBV_GID_TYPE_ROCE_V2);

SAME_SIZE(Event, ibv_async_event);
SAME_PLACE(Event, type, ibv_async_event, event_type);
SAME_NUMBER(kQueuePairFatal, IBV_EVENT_QP_FATAL);
SAME_NUMBER(kQueuePairRequestError, IBV_EVENT_QP_REQ_ERR);
SAME_NUMBER(kQueuePairAccessError, IBV_EVENT_QP_ACCESS_ERR);
SAME_NUMBER(kDeviceFatal, IBV_EVENT_DEVICE_FATAL);
SAME_NUMBER(kPortActiveEvent, IBV_EVENT_PORT_ACTIVE);
SAME_NUMBER(kPortError, IBV_EVENT_PORT_ERR);
