// Puts the results of a search in an order in which neighbours differ.
#ifndef DPSR_SERVING_LISTS_DIVERSITY_H_
#define DPSR_SERVING_LISTS_DIVERSITY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dpsr::serving {

// A result has a value in an attribute, such as the brand 17. Values of different attributes are different numbers.
struct ResultValue {
  size_t result = 0;     // place in the list
  size_t attribute = 0;  // number of the attribute, from 0
  int64_t value = 0;
};

// Maximal marginal relevance. Takes, place by place, the result with the largest
//
//     gains[result] - cost * (number of attributes in which it has a value of one of the last `window` results)
//
// and of equal ones the first. Returns the results in their new order. Every `result` must be below gains.size(), every
// `attribute` below `attributes`.
std::vector<size_t> MaximalMarginalRelevance(const std::vector<double>& gains, const std::vector<ResultValue>& values,
                                             size_t attributes, size_t window, double cost);

// Takes, place by place, the first of `results` results with which no value occurs more than `most` times among
// `window` neighbours, at least 1; the first of all if there is none. Returns the results in their new order.
std::vector<size_t> SlidingWindow(size_t results, const std::vector<ResultValue>& values, size_t window, size_t most);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_LISTS_DIVERSITY_H_
