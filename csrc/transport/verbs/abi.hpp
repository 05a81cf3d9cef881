// What libibverbs' binary interface looks like, as far as it is used here (version IBVERBS_1.1, unchanged
// since 2006). Declared here so that a machine without RDMA's headers builds the same module; where the
// headers are, tests/native/verbs_abi.cpp compares every size, offset and number with them.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>

namespace spark::verbs::abi {

struct Device;
struct ProtectionDomain;
struct CompletionQueue;

struct Context;
struct SendRequest;
struct QueuePair;
struct Completion;

// Calls that libibverbs makes through the context and not by a symbol, by their place in its table.
constexpr int kOperations = 32;
constexpr int kPollCompletions = 11;
constexpr int kPostSend = 25;

struct Context {
  Device* device;
  void* operations[kOperations];
  int command_fd;
  int event_fd;
  int completion_vectors;
  pthread_mutex_t mutex;
  void* compatibility;
};

using PollCompletions = int (*)(CompletionQueue*, int entries, Completion*);
using PostSend = int (*)(QueuePair*, SendRequest*, SendRequest** failed);

struct MemoryRegion {
  Context* context;
  ProtectionDomain* domain;
  void* address;
  size_t length;
  uint32_t handle;
  uint32_t local_key;
  uint32_t remote_key;
};

struct QueuePair {
  Context* context;
  void* user;
  ProtectionDomain* domain;
  CompletionQueue* send_completions;
  CompletionQueue* receive_completions;
  void* shared_receive_queue;
  uint32_t handle;
  uint32_t number;
  uint32_t state;
  uint32_t type;
  pthread_mutex_t mutex;
  pthread_cond_t condition;
  uint32_t events_completed;
};

struct Piece {  // of local memory: a scatter/gather element
  uint64_t address;
  uint32_t length;
  uint32_t local_key;
};

enum SendOpcode : uint32_t { kRdmaWrite = 0 };
enum SendFlag : uint32_t { kSignaled = 1 << 1, kInline = 1 << 3 };

struct SendRequest {
  uint64_t id;
  SendRequest* next;
  Piece* pieces;
  int piece_count;
  uint32_t opcode;
  uint32_t flags;
  uint32_t immediate;
  uint64_t remote_address;
  uint32_t remote_key;
  uint32_t pad;
  uint64_t other_operations[9];  // atomics, datagrams, windows, segmentation: not used here
};

enum Status : uint32_t { kSuccess = 0, kFlushed = 5 };

struct Completion {
  uint64_t id;
  uint32_t status;
  uint32_t opcode;
  uint32_t vendor_error;
  uint32_t byte_length;
  uint32_t immediate;
  uint32_t queue_pair;
  uint32_t source_queue_pair;
  uint32_t flags;
  uint16_t partition_index;
  uint16_t source_lid;
  uint8_t service_level;
  uint8_t destination_path_bits;
};

struct Capacities {
  uint32_t send_requests;
  uint32_t receive_requests;
  uint32_t send_pieces;
  uint32_t receive_pieces;
  uint32_t inline_bytes;
};

enum QueuePairType : uint32_t { kReliableConnection = 2 };

struct QueuePairSetup {
  void* user;
  CompletionQueue* send_completions;
  CompletionQueue* receive_completions;
  void* shared_receive_queue;
  Capacities capacities;
  uint32_t type;
  int signal_all;
};

struct Gid {
  uint8_t raw[16];
};

struct GlobalRoute {
  alignas(8) Gid destination;
  uint32_t flow_label;
  uint8_t source_index;
  uint8_t hop_limit;
  uint8_t traffic_class;
};

struct AddressHandle {
  GlobalRoute route;
  uint16_t destination_lid;
  uint8_t service_level;
  uint8_t source_path_bits;
  uint8_t static_rate;
  uint8_t is_global;
  uint8_t port;
};

enum QueuePairState : uint32_t { kReset = 0, kInit = 1, kReadyToReceive = 2, kReadyToSend = 3, kError = 6 };

enum AttributeMask : int {
  kState = 1 << 0,
  kAccessFlags = 1 << 3,
  kPartitionIndex = 1 << 4,
  kPort = 1 << 5,
  kAddress = 1 << 7,
  kPathMtu = 1 << 8,
  kTimeout = 1 << 9,
  kRetryCount = 1 << 10,
  kReceiverRetry = 1 << 11,
  kReceivePacketNumber = 1 << 12,
  kMaxReads = 1 << 13,
  kReceiverTimer = 1 << 15,
  kSendPacketNumber = 1 << 16,
  kMaxDestinationReads = 1 << 17,
  kDestinationQueuePair = 1 << 20,
};

struct QueuePairAttributes {
  uint32_t state;
  uint32_t current_state;
  uint32_t path_mtu;  // 1: 256 bytes, doubling up to 5: 4096
  uint32_t migration_state;
  uint32_t datagram_key;
  uint32_t receive_packet_number;
  uint32_t send_packet_number;
  uint32_t destination_queue_pair;
  uint32_t access_flags;
  Capacities capacities;
  AddressHandle address;
  AddressHandle alternative_address;
  uint16_t partition_index;
  uint16_t alternative_partition_index;
  uint8_t drained_notification;
  uint8_t draining;
  uint8_t max_reads;
  uint8_t max_destination_reads;
  uint8_t receiver_timer;
  uint8_t port;
  uint8_t timeout;
  uint8_t retry_count;
  uint8_t receiver_retry;
  uint8_t alternative_port;
  uint8_t alternative_timeout;
  uint32_t rate_limit;
};

enum Access : uint32_t { kLocalWrite = 1, kRemoteWrite = 1 << 1 };

enum PortState : uint32_t { kPortActive = 4 };
enum LinkLayer : uint8_t { kEthernet = 2 };

struct PortAttributes {
  uint32_t state;
  uint32_t max_mtu;
  uint32_t active_mtu;
  int gid_count;
  uint32_t capabilities;
  uint32_t max_message;
  uint32_t bad_keys;
  uint32_t violations;
  uint16_t partition_count;
  uint16_t lid;
  uint16_t manager_lid;
  uint8_t lid_mask;
  uint8_t max_lanes;
  uint8_t manager_service_level;
  uint8_t subnet_timeout;
  uint8_t init_type;
  uint8_t active_width;
  uint8_t active_speed;
  uint8_t physical_state;
  uint8_t link_layer;
  uint8_t flags;
  uint16_t capabilities2;
};

enum GidType : uint32_t { kRoceV2 = 2 };

struct GidEntry {
  alignas(8) Gid gid;
  uint32_t index;
  uint32_t port;
  uint32_t type;
  uint32_t interface_index;
};

enum EventType : uint32_t {
  kQueuePairFatal = 1,
  kQueuePairRequestError = 2,
  kQueuePairAccessError = 3,
  kDeviceFatal = 8,
  kPortActiveEvent = 9,
  kPortError = 10,
};

struct Event {
  union {
    void* object;
    int port;
  };
  uint32_t type;
};

}  // namespace spark::verbs::abi
