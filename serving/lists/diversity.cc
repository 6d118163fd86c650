#include "serving/lists/diversity.h"

#include <algorithm>

namespace dpsr::serving {
namespace {

// The values of results as small numbers, both ways.
struct Values {
  struct Held {
    size_t value = 0, attribute = 0;
  };

  Values(size_t results, const std::vector<ResultValue>& given) : of_result(results) {
    std::vector<int64_t> known;
    known.reserve(given.size());
    for (const ResultValue& one : given) known.push_back(one.value);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    holders.resize(known.size());
    for (const ResultValue& one : given) {
      const auto found = std::lower_bound(known.begin(), known.end(), one.value);
      const auto number = static_cast<size_t>(found - known.begin());
      of_result[one.result].push_back({number, one.attribute});
      holders[number].push_back(one.result);
    }
  }

  std::vector<std::vector<Held>> of_result;
  std::vector<std::vector<size_t>> holders;  // value -> the results that have it, as often as they have it
};

}  // namespace

std::vector<size_t> MaximalMarginalRelevance(const std::vector<double>& gains, const std::vector<ResultValue>& given,
                                             size_t attributes, size_t window, double cost) {
  const size_t results = gains.size();
  const Values values(results, given);
  std::vector<size_t> recent(values.holders.size(), 0);     // how often the last results have a value
  std::vector<size_t> near(results * attributes, 0);        // recent values of a result in an attribute
  std::vector<size_t> common(results, 0);                   // attributes in which a result has a recent value
  std::vector<size_t> left(results), order;
  for (size_t i = 0; i < results; ++i) left[i] = i;
  order.reserve(results);
  while (!left.empty()) {
    size_t best = 0;
    double most = 0;
    for (size_t at = 0; at < left.size(); ++at) {
      const double gain = gains[left[at]] - cost * static_cast<double>(common[left[at]]);
      if (at == 0 || gain > most) {
        best = at;
        most = gain;
      }
    }
    const size_t taken = left[best];
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
    order.push_back(taken);
    for (const Values::Held& held : values.of_result[taken]) {
      if (recent[held.value]++ != 0) continue;
      for (const size_t result : values.holders[held.value]) {
        if (near[result * attributes + held.attribute]++ == 0) ++common[result];
      }
    }
    if (order.size() <= window) continue;
    for (const Values::Held& held : values.of_result[order[order.size() - 1 - window]]) {
      if (--recent[held.value] != 0) continue;
      for (const size_t result : values.holders[held.value]) {
        if (--near[result * attributes + held.attribute] == 0) --common[result];
      }
    }
  }
  return order;
}

std::vector<size_t> SlidingWindow(size_t results, const std::vector<ResultValue>& given, size_t window, size_t most) {
  const Values values(results, given);
  std::vector<size_t> recent(values.holders.size(), 0);  // how often the last window - 1 results have a value
  std::vector<size_t> left(results), order;
  for (size_t i = 0; i < results; ++i) left[i] = i;
  order.reserve(results);
  while (!left.empty()) {
    auto taken = std::find_if(left.begin(), left.end(), [&](size_t result) {
      const auto& held = values.of_result[result];
      return std::all_of(held.begin(), held.end(),
                         [&](const Values::Held& one) { return recent[one.value] < most; });
    });
    if (taken == left.end()) taken = left.begin();
    order.push_back(*taken);
    left.erase(taken);
    for (const Values::Held& held : values.of_result[order.back()]) ++recent[held.value];
    if (order.size() < window) continue;
    for (const Values::Held& held : values.of_result[order[order.size() - window]]) --recent[held.value];
  }
  return order;
}

}  // namespace dpsr::serving
