#include "rank.hpp"

#include <tuple>
#include <utility>

#include "../support/errors.hpp"

namespace spark {

Rank::~Rank() {
  if (endpoint_.owned_by_this_process()) return;
  // A fork has a copy of this object, but not its thread.
  static_cast<void>(proxy_.release());
  static_cast<void>(source_.release());
}

void Rank::connect(const Address& peer, const std::string& description) {
  endpoint_.connect(peer, description);
  prepare();
  start();
}

void Rank::connect_in_process(const Rank& peer) {
  endpoint_.connect_in_process(peer.endpoint_);
  prepare();
  start();
}

void Rank::connect_link(const std::string& peer_offer, const std::string& description) {
  endpoint_.connect_link(peer_offer, description);
  prepare();
}

void Rank::start() {
  if (started_) throw UsageError("this runtime has been started already; make another one");
  started_ = true;
  if (endpoint_.options().proxied) {
    source_ = make_source();
    proxy_ = std::make_unique<ProxyThread>(*source_, endpoint_.transport());
  }
  endpoint_.start();
}

void Rank::start_recording(size_t capacity) {
  operations_.start(capacity);
  if (source_) source_->recording().start(capacity);
}

RankRecords Rank::stop_recording() {
  RankRecords records;
  std::tie(records.operations, records.lost) = operations_.stop();
  if (source_) {
    auto [posts, lost] = source_->recording().stop();
    records.posts = std::move(posts);
    records.lost += lost;
  }
  return records;
}

void Rank::close() {
  if (!endpoint_.close()) return;
  wait_until_idle();
  if (proxy_) proxy_->stop();
  endpoint_.end_peer_waits("it closed its runtime");
}

}  // namespace spark
