#include "dpsr_tf/ops/givens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <queue>

#include "dpsr_tf/ops/for_each_cpu.h"
#include "dpsr_tf/ops/permutation.h"

namespace dpsr {
namespace {

float Slope(const float* product, int64_t d, int64_t i, int64_t j) { return product[j * d + i] - product[i * d + j]; }

// Writes |A|.
DPSR_FOR_EACH_CPU void Steepness(const float* product, int64_t d, float* steepness) {
  constexpr int64_t kTile = 16;
  for (int64_t i = 0; i < d; i += kTile) {
    for (int64_t j = 0; j < d; j += kTile) {
      for (int64_t row = i; row < std::min(i + kTile, d); ++row) {
        for (int64_t column = j; column < std::min(j + kTile, d); ++column) {
          steepness[row * d + column] = std::fabs(product[column * d + row] - product[row * d + column]);
        }
      }
    }
  }
}

// A row of |A| and its steepest partner above it.
struct Best {
  float steepness;
  int64_t row, partner;

  // A priority queue has the largest on top.
  bool operator<(const Best& other) const {
    if (steepness != other.steepness) return steepness < other.steepness;
    return row > other.row;
  }
};

// Returns the steepest partner after `row` whose `taken` is 0, not -infinity; steepness 0 if there is none.
DPSR_FOR_EACH_CPU Best BestPartner(const float* steepness, const float* taken, int64_t row, int64_t d) {
  const float* of_row = steepness + row * d;
  float lanes[kLanes] = {};
  int64_t j = row + 1;
  for (; j + kLanes <= d; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = of_row[j + lane] + taken[j + lane];
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  }
  for (; j < d; ++j) {
    const float value = of_row[j] + taken[j];
    lanes[0] = value > lanes[0] ? value : lanes[0];
  }
  const float most = *std::max_element(lanes, lanes + kLanes);
  if (!(most > 0)) return {0, row, row};
  int64_t partner = row + 1;
  while (of_row[partner] + taken[partner] != most) ++partner;
  return {most, row, partner};
}

DPSR_FOR_EACH_CPU void ProjectOnColumns(const float* __restrict rotation, int64_t column, int64_t d,
                                        float* __restrict products) {
  std::fill(products, products + d, 0.f);
  for (int64_t row = 0; row < d; ++row) {
    const float* __restrict of_row = rotation + row * d;
    const float weight = of_row[column];
    for (int64_t k = 0; k < d; ++k) products[k] += weight * of_row[k];
  }
}

DPSR_FOR_EACH_CPU void SubtractColumns(const float* __restrict products, int64_t column, int64_t d,
                                       float* __restrict rotation) {
  for (int64_t row = 0; row < d; ++row) {
    float* __restrict of_row = rotation + row * d;
    float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += products[k + lane] * of_row[k + lane];
    }
    for (; k < d; ++k) lanes[k % kLanes] += products[k] * of_row[k];
    of_row[column] -= Total(lanes);
  }
}

}  // namespace

std::vector<AxisPair> SteepestPairs(const float* product, int64_t d) {
  const std::unique_ptr<float[]> steepness(new float[d * d]);
  Steepness(product, d, steepness.get());
  std::vector<float> taken(d, 0.f);
  std::vector<Best> all;
  all.reserve(d);
  for (int64_t row = 0; row < d; ++row) {
    const Best best = BestPartner(steepness.get(), taken.data(), row, d);
    if (best.steepness > 0) all.push_back(best);
  }
  // The best of a row may be taken by then. What is left of the row is not steeper, so the queue stays in order.
  std::priority_queue<Best> queue(std::less<Best>(), std::move(all));
  std::vector<AxisPair> pairs;
  constexpr float kTaken = -std::numeric_limits<float>::infinity();
  while (!queue.empty()) {
    const Best best = queue.top();
    queue.pop();
    if (taken[best.row] != 0) continue;
    if (taken[best.partner] != 0) {
      const Best next = BestPartner(steepness.get(), taken.data(), best.row, d);
      if (next.steepness > 0) queue.push(next);
      continue;
    }
    taken[best.row] = taken[best.partner] = kTaken;
    pairs.push_back({best.row, best.partner, Slope(product, d, best.row, best.partner)});
  }
  return pairs;
}

std::vector<AxisPair> RandomPairs(const float* product, int64_t d, uint64_t seed) {
  const Permutation order(d, seed);
  std::vector<AxisPair> pairs;
  for (int64_t k = 0; k + 1 < d; k += 2) {
    const int64_t a = order(k), b = order(k + 1), i = std::min(a, b), j = std::max(a, b);
    pairs.push_back({i, j, Slope(product, d, i, j)});
  }
  return pairs;
}

void RotatePairs(const std::vector<AxisPair>& pairs, float learning_rate, int64_t d, float* rotation) {
  // Doubles: the float that is nearest to the cosine of a small angle is 1, and vectors would grow at each step.
  struct Turn {
    int64_t first, second;
    double cosine, sine;
  };
  std::vector<Turn> turns;
  for (const AxisPair& pair : pairs) {
    const double angle = -double{learning_rate} * pair.slope;
    turns.push_back({pair.first, pair.second, std::cos(angle), std::sin(angle)});
  }
  for (int64_t row = 0; row < d; ++row, rotation += d) {
    for (const Turn& turn : turns) {
      const double x = rotation[turn.first], y = rotation[turn.second];
      rotation[turn.first] = static_cast<float>(turn.cosine * x + turn.sine * y);
      rotation[turn.second] = static_cast<float>(turn.cosine * y - turn.sine * x);
    }
  }
}

void OrthogonalizeColumn(int64_t column, int64_t d, float* rotation) {
  std::vector<float> products(d);
  ProjectOnColumns(rotation, column, d, products.data());
  // To first order, half of the excess of the squared length is the excess of the length.
  products[column] = (products[column] - 1) / 2;
  SubtractColumns(products.data(), column, d, rotation);
}

}  // namespace dpsr
