// Rings a proxy with two rails for messages of one kind, over tests/native/verbs_in_memory.cpp. Run under
// callgrind: what is counted is Doorbell::post_staged, in which all of them are posted.
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "../../csrc/proxy/doorbell.hpp"
#include "../../csrc/proxy/proxy_thread.hpp"
#include "../../csrc/rank/endpoint.hpp"

int main(int argc, char** argv) {
  bool packets = argc > 1 && std::string(argv[1]) == "packets";
  auto messages = static_cast<uint32_t>(argc > 2 ? std::atoi(argv[2]) : 1000);
  spark::Options options;
  options.proxied = true;
  spark::Options other = options;
  other.rank = 1;
  spark::Endpoint left(options), right(other);
  std::vector<spark::verbs::RailAddress> rails{{"memory0", 1, {}, 4096}, {"memory1", 1, {}, 4096}};
  std::string left_offer = left.open_link({}, rails), right_offer = right.open_link({}, rails);
  left.connect_link(right_offer, "right");
  right.connect_link(left_offer, "left");
  spark::Doorbell doorbell(left.mine(), 0, {}), peer_doorbell(right.mine(), 0, {});
  spark::ProxyThread proxy(doorbell, left.transport());
  spark::ProxyThread peer(peer_doorbell, right.transport());  // proves its end of the rails
  for (uint32_t sequence = 1; sequence <= messages; ++sequence) {
    left.mine().descriptor(sequence) = {packets ? spark::Protocol::kPackets : spark::Protocol::kPayload, 7,
                                        packets ? 144u : 4096u};
    left.mine().send_packets(sequence)[0].store(spark::packet_half(7, sequence), std::memory_order_relaxed);
    doorbell.ring(sequence);
    auto arrived = [&] {
      return packets ? spark::half_arrived(right.mine().recv_packets(sequence)[0].load(), sequence)
                     : spark::flag_sequence(right.mine().recv_flag(sequence).load()) == sequence;
    };
    while (!arrived()) std::this_thread::yield();
  }
  proxy.stop();
  peer.stop();
}
