#include "wire_model.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "../support/errors.hpp"
#include "../support/text.hpp"

namespace spark {
namespace {

[[noreturn]] void refuse(const std::string& what, double value, const std::string& rule) {
  throw UsageError("the modelled wire's " + what + " of " + number_text(value) + " is invalid: must be " +
                   rule);
}

void check_number(const std::string& what, double value) {
  if (!(value >= 0 && std::isfinite(value))) refuse(what, value, "0 or more");
}

void check_rail(size_t index, const RailFigures& rail) {
  std::string name = "rail " + std::to_string(index);
  check_number(name + ": rate (bytes per nanosecond)", rail.bytes_per_ns);
  if (rail.latency.empty()) {
    throw UsageError("the modelled wire's " + name + " has no latency; give one for at least one size");
  }
  const LatencyPoint* before = nullptr;
  for (const LatencyPoint& point : rail.latency) {
    std::string what = name + ": latency (ns) at " + std::to_string(point.bytes) + " bytes";
    check_number(what, point.ns);
    if (before != nullptr && point.bytes <= before->bytes) {
      throw UsageError("the sizes of the latencies of the modelled wire's " + name +
                       " are not in ascending order: " + std::to_string(before->bytes) + ", " +
                       std::to_string(point.bytes));
    }
    if (before != nullptr && point.ns < before->ns) refuse(what, point.ns, "no less than of fewer bytes");
    before = &point;
  }
}

}  // namespace

WireModel::WireModel(const WireFigures& figures)
    : doorbell_ns_(figures.doorbell_ns), work_request_ns_(figures.work_request_ns) {
  if (figures.rails.empty()) throw UsageError("the modelled wire has no rail; give at least one");
  check_number("rate of all rails (bytes per nanosecond)", figures.bytes_per_ns);
  check_number("doorbell (ns)", figures.doorbell_ns);
  check_number("work request (ns)", figures.work_request_ns);
  double sum = 0;
  for (size_t index = 0; index < figures.rails.size(); ++index) {
    check_rail(index, figures.rails[index]);
    sum += figures.rails[index].bytes_per_ns;
  }
  bool unlimited = std::any_of(figures.rails.begin(), figures.rails.end(),
                               [](const RailFigures& rail) { return rail.bytes_per_ns == 0; });
  if (unlimited && figures.bytes_per_ns > 0) {
    throw UsageError("the modelled wire's rails are limited together, and one of them has no rate; give one");
  }
  double share = figures.bytes_per_ns > 0 ? std::min(1.0, figures.bytes_per_ns / sum) : 1.0;
  for (const RailFigures& rail : figures.rails) {
    rails_.push_back({rail, rail.bytes_per_ns > 0 ? 1 / (share * rail.bytes_per_ns) : 0});
  }
}

double WireModel::latency(size_t rail, uint64_t bytes) const {
  const std::vector<LatencyPoint>& curve = rails_[rail].figures.latency;
  auto above = std::upper_bound(curve.begin(), curve.end(), bytes,
                                [](uint64_t size, const LatencyPoint& point) { return size < point.bytes; });
  if (above == curve.begin()) return above->ns;
  const LatencyPoint& below = *std::prev(above);
  auto beyond = static_cast<double>(bytes - below.bytes);
  if (above == curve.end()) return below.ns + beyond * rails_[rail].ns_per_byte;
  return below.ns + beyond / static_cast<double>(above->bytes - below.bytes) * (above->ns - below.ns);
}

WireModel::Time WireModel::posting_time(size_t writes) const {
  return Time(std::llround(doorbell_ns_ + static_cast<double>(writes) * work_request_ns_));
}

WireModel::Time WireModel::write(size_t index, Time now, uint64_t bytes, bool first) {
  if (!begun_) origin_ = now;
  begun_ = true;
  Rail& rail = rails_[index];
  // The latency of a single write contains its own work request and doorbell. The device sees a further write
  // of the chain later, by the time of its work request.
  rail.chain_ns = first ? 0 : rail.chain_ns + work_request_ns_;
  double start = std::max(static_cast<double>((now - origin_).count()) + rail.chain_ns, rail.free_ns);
  double on_wire = static_cast<double>(bytes) * rail.ns_per_byte, alone = latency(index, bytes);
  rail.free_ns = start + on_wire;
  // In order, and not at once: a flag of 8 bytes, whose latency alone is less than that of the payload before
  // it, arrives after the payload. The smaller of both, because a single large write may take less than its
  // share of the rate allows.
  rail.delivered_ns = std::max(start + alone, rail.delivered_ns + std::min(on_wire, alone));
  return origin_ + Time(std::llround(rail.delivered_ns));
}

}  // namespace spark
