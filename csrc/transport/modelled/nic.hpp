// A model of the RDMA devices of one machine, for two ranks of one machine: it offers the functions of
// libibverbs that verbs::Device and verbs::Connection call, so the code above them is the same as with a NIC.
// When a write is delivered is computed by WireModel; the store into the peer's memory is a CPU's.
//
// What a NIC would copy costs the posting thread nothing: a payload is not copied, its reader takes it from
// the sender's slot (Endpoint::received_payload). Everything else is small. Its first 16 bytes are stored
// when the write is due: a flag, the first of some packets, the version of an announcement. So a message
// arrives when the last word does that its receiver waits for. The rest is copied before, once the posting
// thread has nothing to post.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "../../region/region_layout.hpp"
#include "../verbs/connection.hpp"
#include "../wire_model.hpp"

namespace spark::modelled {

// The time of a modelled NIC.
class NicClock {
 public:
  virtual ~NicClock() = default;
  virtual WireModel::Time now() = 0;
  // Called while the posting thread is busy until `end`, until `now` has reached that.
  virtual void busy(WireModel::Time end) = 0;
};

// The machine's steady clock.
class SteadyNicClock final : public NicClock {
 public:
  WireModel::Time now() override;
  void busy(WireModel::Time end) override;
};

struct QueuePair;

// All but the release of what has ended (background_release.hpp) for one thread at a time: the proxy's, once
// it runs.
class Nic {
 public:
  // Throws UsageError for figures that describe no link. `memory` is this rank's region. `clock` must outlive
  // it, and it must outlive its devices. `copy_lines`: the peer polls packets from a GPU (packet_copy.hpp).
  Nic(const WireFigures& figures, std::byte* memory, const RegionLayout& layout, NicClock& clock,
      bool copy_lines);
  Nic(const Nic&) = delete;
  Nic& operator=(const Nic&) = delete;

  // Where writes go: the peer's region in this process. Before anything is posted.
  void set_peer(std::byte* peer_memory) { peer_memory_ = peer_memory; }
  // A rail for each of the model's.
  std::vector<verbs::RailAddress> rails() const;
  // Opens the device of one of `rails`. Throws CollectiveError.
  std::shared_ptr<const verbs::Device> open(const verbs::RailAddress& rail);

  // Delivers what is due, and copies some of what is on its way. Returns true while something is.
  bool deliver();
  // When the next write is due, if one is on its way: for simulated clocks.
  std::optional<WireModel::Time> next_due() const;

 private:
  friend struct Functions;  // of libibverbs

  int post(QueuePair& pair, verbs::abi::ibv_send_wr* first, verbs::abi::ibv_send_wr** failed);
  bool deliver_due();
  bool deliver_due(QueuePair& pair, WireModel::Time now);

  WireModel model_;
  std::byte* memory_;
  std::byte* peer_memory_ = nullptr;
  RegionLayout layout_;
  NicClock& clock_;
  bool copy_lines_;
  std::vector<QueuePair*> pairs_;  // by rail; null while it has none that sends
};

}  // namespace spark::modelled
