// The layers of a ranker for the items of one request, on one thread. TensorFlow's own ops would spend more time between
// the layers than in them. dpsr_tf/models/ranker.py is the model; a test compares the scores.
#ifndef DPSR_EXPORT_RANK_FEATURES_RANK_LAYERS_H_
#define DPSR_EXPORT_RANK_FEATURES_RANK_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/span.h"

namespace dpsr {

// How a number is scaled (Number in dpsr_tf/models/features.py): (sign(x) log(1 + |x| / unit) - mean) / std, cut at
// -cut and cut. A missing one becomes 0.
struct NumberScale {
  float unit, mean, std;
};

// How a ranker reads some numbers: scaled, then 1 or 0 for each of `may_miss`: whether this number is missing.
struct Scales {
  std::vector<NumberScale> numbers;
  std::vector<int32_t> may_miss;  // places in `numbers`
  float cut = 0;

  size_t width() const { return numbers.size() + may_miss.size(); }
  // Writes [width()]; NaN is missing. Returns the end of what it has written.
  float* Apply(const float* values, float* out) const;
};

// What the first layer reads of a pair of request and item, in this order:
//
//   numbers             as `scales` says
//   products            offered * wanted, element by element
//   text                inner product of the item's text with the query's
//   pooled fields       inner product of each field of the item's vector with that of the history's mean
//   matches             of each code, how many events of the history have the same: the logarithm of 1 + their number,
//                       then the share of all codes, then the sums with weights that halve every few events back
//
// Parts whose spans are empty are left out.
struct PairLayout {
  Scales scales;
  std::vector<int32_t> fields;  // widths of the parts of an item's vector
};

// The events of a history whose items have one code.
struct CodeMatch {
  float code;
  float count, recent;  // their number, and the sum of their weights
};

// What of a request the items are compared with.
struct RankedRequest {
  Span<const float> wanted;  // products; may be empty
  Span<const float> text;    // may be empty
  Span<const float> pooled;  // of the width of an item's vector; may be empty
  size_t events = 0;
  std::vector<std::vector<CodeMatch>> matches;  // of each code; empty leaves matches out

  // Fills `events` and `matches` from the codes of a history, [events, codes], oldest first. 0 matches nothing.
  void SetHistory(const float* history, size_t num_events, size_t codes, float half_life);
  // The number of inputs that PairInputs writes.
  size_t Width(const PairLayout& layout) const {
    return layout.scales.width() + wanted.size() + (text.empty() ? 0 : 1) + (pooled.empty() ? 0 : layout.fields.size()) +
           3 * matches.size();
  }
};

// Writes the inputs of one pair, [request.Width(layout)].
//
// Args: numbers [scales], NaN is missing; vector, at least the sum of layout.fields, of which the text comes first;
// offered [request.wanted]; codes [request.matches].
void PairInputs(const PairLayout& layout, const RankedRequest& request, const float* numbers, const float* vector,
                const float* offered, const float* codes, float* out);

// Writes to common [k] the value that more than half of the rows of x [n, k] have in a column, and subtracts it. For
// other columns it writes 0 or one of their values. DenseLayer skips the zeros that result. There are many, because most
// items of a request were never clicked for its query, and so have the same counts.
void MoveCommonInputs(size_t n, size_t k, float* x, float* common);

// A dense layer, [inputs] to [outputs]. It owns nothing.
struct DenseLayer {
  const float* kernel;  // [inputs, outputs]
  const float* bias;    // [outputs]
  size_t inputs, outputs;
  bool relu;  // whether outputs below 0 become 0

  // Writes the outputs for x [n, inputs] to y [n, outputs]. `start`, if not null, has a row of [outputs] for each row of x
  // that is added before the ReLU. Inputs that are 0 take no time if they are 0 in the rows beside them, too. Weights are
  // finite.
  void Apply(const float* x, const float* const* start, size_t n, float* y) const;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_RANK_FEATURES_RANK_LAYERS_H_
