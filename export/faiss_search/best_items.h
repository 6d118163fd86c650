// The k best of the items that a search scores, and the bits of a mask.
#ifndef DPSR_EXPORT_FAISS_SEARCH_BEST_ITEMS_H_
#define DPSR_EXPORT_FAISS_SEARCH_BEST_ITEMS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace dpsr {

inline constexpr int64_t kBits = 64;  // of a word of a mask

// Calls use(slot) for each bit in [begin, end) that is 1.
template <typename Use>
void ForEachBit(const uint64_t* words, int64_t begin, int64_t end, const Use& use) {
  if (begin >= end) return;
  for (int64_t word = begin / kBits; word <= (end - 1) / kBits; ++word) {
    uint64_t bits = words[word];
    if (word == begin / kBits) bits &= ~uint64_t{0} << (begin % kBits);
    if (word == (end - 1) / kBits) bits &= ~uint64_t{0} >> (kBits - 1 - (end - 1) % kBits);
    for (; bits != 0; bits &= bits - 1) use(word * kBits + __builtin_ctzll(bits));
  }
}

// Collects the k best of the items that are added. When its buffer of 2k items is full, the worse half is dropped.
class BestItems {
 public:
  explicit BestItems(int64_t k) : k_(static_cast<size_t>(k)), most_(std::max<size_t>(2 * k_, 64)) {
    found_.reserve(most_);
  }

  int64_t k() const { return static_cast<int64_t>(k_); }
  // Returns whether there are k items already.
  bool is_full() const { return found_.size() >= k_; }

  // Adds an item, unless its score is NaN. The items between two calls of EndPortion are a portion.
  void Add(float score, int64_t slot) {
    if (!(score > floor_)) return;
    found_.push_back({score, portion_, slot});
    if (found_.size() == most_) Halve();
  }

  // Ends a portion. Returns how many of the k best so far come from it and the one before.
  int64_t EndPortion() {
    if (found_.size() > k_) Halve();
    const int32_t before = portion_++ - 1;
    return std::count_if(found_.begin(), found_.end(), [before](const Found& found) { return found.portion >= before; });
  }

  // Writes scores and positions of the best items in descending order, and pads them to k.
  void Write(const std::vector<int32_t>& order, int64_t k, float* scores, int64_t* positions) {
    if (found_.size() > k_) Halve();
    std::sort(found_.begin(), found_.end(), Higher);
    for (int64_t i = 0; i < k; ++i) {
      const bool there = i < static_cast<int64_t>(found_.size());
      scores[i] = there ? found_[i].score : -std::numeric_limits<float>::infinity();
      positions[i] = !there ? -1 : order.empty() ? found_[i].slot : order[found_[i].slot];
    }
  }

 private:
  struct Found {
    float score;
    int32_t portion;
    int64_t slot;
  };
  static bool Higher(const Found& a, const Found& b) { return a.score > b.score; }
  void Halve() {
    std::nth_element(found_.begin(), found_.begin() + (k_ - 1), found_.end(), Higher);
    found_.resize(k_);
    floor_ = found_.back().score;
  }

  size_t k_;
  size_t most_;
  std::vector<Found> found_;
  int32_t portion_ = 0;
  float floor_ = -std::numeric_limits<float>::infinity();
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_BEST_ITEMS_H_
