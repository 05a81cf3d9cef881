// The loopback transport with a modelled link: the code of the verbs transport (link/link.hpp) over a model
// of its devices.
#pragma once

#include <functional>
#include <string>

#include "../link/link.hpp"
#include "nic.hpp"

namespace spark::modelled {

class ModelledLink final : public Transport {
 public:
  // `memory` is this rank's region. `timeout`: without an open rail. Throws UsageError for figures that are
  // no model, and CollectiveError.
  ModelledLink(const WireFigures& figures, std::byte* memory, const RegionSizes& sizes, int rank,
               std::chrono::nanoseconds timeout, bool copy_lines);

  // What the peer must know to connect.
  std::string offer() { return link_.offer(); }
  // As Link::connect, to a peer whose region is mapped at `peer_memory`.
  void connect(std::byte* peer_memory, const std::string& peer_offer, const std::string& peer_name,
               std::function<void(const std::string&)> stop);
  verbs::Link& link() { return link_; }

  void post(uint32_t sequence, const SendDescriptor& descriptor) override {
    link_.post(sequence, descriptor);
  }
  void flush() override { link_.flush(); }
  bool progress() override;
  void maintain() override { link_.maintain(); }
  void finish() override { link_.finish(); }

 private:
  SteadyNicClock clock_;
  Nic nic_;  // before the link, whose devices it is the model of
  verbs::Link link_;
};

}  // namespace spark::modelled
