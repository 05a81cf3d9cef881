#include "modelled_link.hpp"

#include <utility>

namespace spark::modelled {
namespace {

verbs::LinkOptions link_options(Nic& nic, std::chrono::nanoseconds timeout) {
  verbs::LinkOptions options;
  options.timeout = timeout;
  options.path_options.rail_timeout = timeout;  // as long as a message may take
  options.open_device = [&nic](const verbs::RailAddress& rail) { return nic.open(rail); };
  return options;
}

}  // namespace

ModelledLink::ModelledLink(const WireFigures& figures, std::byte* memory, const RegionSizes& sizes, int rank,
                           std::chrono::nanoseconds timeout, bool copy_lines)
    : nic_(figures, memory, RegionLayout(sizes), clock_, copy_lines),
      link_(link_options(nic_, timeout), memory, sizes, nic_.rails(), rank) {}

void ModelledLink::connect(std::byte* peer_memory, const std::string& peer_offer,
                           const std::string& peer_name, std::function<void(const std::string&)> stop) {
  nic_.set_peer(peer_memory);
  link_.connect(peer_offer, peer_name, std::move(stop));
}

bool ModelledLink::progress() {
  bool queued = link_.progress();
  // A write that is on its way needs this thread to be delivered: it must not sleep.
  return nic_.deliver() || queued;
}

}  // namespace spark::modelled
