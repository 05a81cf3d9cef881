// Has a proxy with two rails post messages of one kind, over tests/native/verbs_in_memory.cpp. Run under
// callgrind, which counts what the proxy does to post what is staged.
//
//     proxy_cost doorbell-packets|doorbell-payload|packets|payload MESSAGES
//
// The first two are a CPU rank's messages, which ring its proxy's doorbell: 144 bytes as packets, 4096 as
// payload. The others are a GPU rank's, which its proxy finds in the slots: 10 KiB as packets, 480 KiB as
// payload in eight pieces. They are staged while nothing scans, so that one turn posts all of a message.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>

#include "../../csrc/proxy/doorbell.hpp"
#include "../../csrc/proxy/proxy_thread.hpp"
#include "../../csrc/proxy/slot_scanner.hpp"
#include "../../csrc/rank/endpoint.hpp"
#include "wide_message.hpp"

namespace {

constexpr uint32_t kTag = 7, kRails = 2;
constexpr uint64_t kPacketBytes = 10 << 10;
constexpr uint32_t kPayloadBytes = 480 << 10, kPieces = 8;

// Rings the doorbell of a proxy's thread for one message after the other.
void ring(spark::Endpoint& left, spark::Endpoint& right, bool packets, uint32_t messages) {
  spark::Doorbell doorbell(left.mine(), 0, {});
  spark::ProxyThread proxy(doorbell, left.transport());
  for (uint32_t sequence = 1; sequence <= messages; ++sequence) {
    left.mine().descriptor(sequence) = {packets ? spark::Protocol::kPackets : spark::Protocol::kPayload, kTag,
                                        packets ? 144u : 4096u};
    left.mine().send_packets(sequence)[0].store(spark::packet_half(kTag, sequence),
                                                std::memory_order_relaxed);
    doorbell.ring(sequence);
    auto arrived = [&] {
      return packets ? spark::half_arrived(right.mine().recv_packets(sequence)[0].load(), sequence)
                     : spark::flag_sequence(right.mine().recv_flag(sequence).load()) == sequence;
    };
    while (!arrived()) std::this_thread::yield();
  }
}

// As kernels do it, for a message in eight pieces.
void stage_pieces(const spark::Region& region, uint32_t sequence) {
  for (uint32_t piece = kPieces; piece-- > 0;) {
    spark::Flag& flag = region.send_flag(sequence, piece);
    flag.bytes = kPayloadBytes / kPieces;
    flag.offset = piece * flag.bytes;
    flag.pieces = kPieces;
    region.send_flag_value(sequence, piece)
        .store(spark::payload_flag(sequence, kTag), std::memory_order_release);
  }
}

// Stages one message after the other, and lets this thread find and post each.
void scan(spark::Endpoint& left, spark::Endpoint& right, bool packets, uint32_t messages) {
  spark::SlotScanner scanner(left.mine(), 0, kRails);
  spark::Transport& transport = left.transport();
  auto drive_until = [&](const std::function<bool()>& done) {
    while (!done()) {
      transport.progress();
      transport.maintain();
      std::this_thread::yield();
    }
  };
  // While no rail is open a message stays queued, and with one of them open it is not parted.
  drive_until([&] { return left.link()->counters().rails_up == kRails; });
  for (uint32_t sequence = 1; sequence <= messages; ++sequence) {
    if (packets) {
      spark::testing::WideMessage{kTag, kPacketBytes / sizeof(uint32_t), sequence}.stage(
          left.mine().send_packets(sequence), sequence);
    } else {
      stage_pieces(left.mine(), sequence);
    }
    if (!scanner.post_staged(transport)) std::abort();
    drive_until([&] {
      if (packets) {
        auto last = 2 * spark::wide_packet_count(kPacketBytes) - 1;
        return spark::packet_flag(right.mine().recv_packets(sequence)[last].load()) == sequence;
      }
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        if (spark::flag_sequence(right.mine().recv_flag(sequence, piece).load()) != sequence) return false;
      }
      return true;
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string kind = argc > 1 ? argv[1] : "packets";
  auto messages = static_cast<uint32_t>(argc > 2 ? std::atoi(argv[2]) : 1000);
  bool doorbell = kind.rfind("doorbell-", 0) == 0;
  bool packets = kind.find("packets") != std::string::npos;
  spark::Options options;
  options.proxied = true;
  options.copy_lines = !doorbell;
  options.sizes.packet_bytes = 16 << 10;
  spark::Options other = options;
  other.rank = 1;
  spark::Endpoint left(options), right(other);
  std::vector<spark::verbs::RailAddress> rails{{"memory0", 1, {}, 4096}, {"memory1", 1, {}, 4096}};
  std::string left_offer = left.open_link({}, rails), right_offer = right.open_link({}, rails);
  left.connect_link(right_offer, "right");
  right.connect_link(left_offer, "left");
  spark::Doorbell peer_doorbell(right.mine(), 0, {});
  spark::ProxyThread peer(peer_doorbell, right.transport());  // proves its end of the rails
  (doorbell ? ring : scan)(left, right, packets, messages);
  peer.stop();
}
