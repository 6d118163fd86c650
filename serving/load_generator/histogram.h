// Counts durations in buckets whose width is at most 0.1 % of their values, like HdrHistogram.
#ifndef DPSR_SERVING_LOAD_GENERATOR_HISTOGRAM_H_
#define DPSR_SERVING_LOAD_GENERATOR_HISTOGRAM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dpsr::serving {

class Histogram {
 public:
  Histogram() : counts_(size_t{kNumSub} * (kMaxBits - kSubBits + 2), 0) {}

  // Counts a duration in nanoseconds, from 0 to 2^47 (39 hours). A longer one counts as the limit.
  void Add(int64_t nanoseconds) {
    const int64_t value = std::clamp<int64_t>(nanoseconds, 0, (int64_t{1} << kMaxBits) - 1);
    ++counts_[Bucket(value)];
    ++count_;
    sum_ += static_cast<double>(value);
    max_ = std::max(max_, value);
  }

  void Add(const Histogram& other) {
    for (size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
    count_ += other.count_;
    sum_ += other.sum_;
    max_ = std::max(max_, other.max_);
  }

  int64_t count() const { return count_; }
  int64_t max() const { return max_; }
  double mean() const { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }

  // Returns the smallest value that is at least as large as a share `q` of all values, up to the width of its bucket; 0
  // if there are no values.
  int64_t Quantile(double q) const {
    const auto rank = static_cast<int64_t>(std::ceil(q * static_cast<double>(count_)));
    int64_t seen = 0;
    for (size_t i = 0; i < counts_.size(); ++i) {
      seen += counts_[i];
      if (counts_[i] > 0 && seen >= rank) return std::min(Last(i), max_);
    }
    return max_;
  }

 private:
  static constexpr int kSubBits = 10;  // 1024 buckets between two powers of two
  static constexpr int kMaxBits = 47;
  static constexpr int64_t kNumSub = int64_t{1} << kSubBits;

  // Returns the bucket of a value, which depends on its highest bits and how far they are shifted.
  static size_t Bucket(int64_t value) {
    int shift = 0;
    while ((value >> shift) >= 2 * kNumSub) ++shift;
    return static_cast<size_t>(shift * kNumSub + (value >> shift));
  }
  // Returns the largest value of a bucket.
  static int64_t Last(size_t bucket) {
    const int64_t index = static_cast<int64_t>(bucket);
    if (index < 2 * kNumSub) return index;
    const int64_t shift = index / kNumSub - 1;
    return ((index - shift * kNumSub + 1) << shift) - 1;
  }

  std::vector<int64_t> counts_;
  int64_t count_ = 0;
  int64_t max_ = 0;
  double sum_ = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_LOAD_GENERATOR_HISTOGRAM_H_
