// Randomness of the training stream as pure functions of (seed, position). There is nothing to store or to replay: an
// iterator that can compute any position needs only that position in its checkpoint.
#ifndef DPSR_DPSR_TF_OPS_PERMUTATION_H_
#define DPSR_DPSR_TF_OPS_PERMUTATION_H_

#include <algorithm>
#include <cstdint>

namespace dpsr {

// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): a bijection
// of 64 bits that passes as random.
inline uint64_t Mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// A stream of random numbers that starts from `seed`.
class RandomStream {
 public:
  explicit RandomStream(uint64_t seed) : state_(Mix64(seed)) {}

  uint64_t Next() { return Mix64(state_++); }
  // Uniform in [0, 1).
  double Fraction() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  // Uniform in [0, n), n > 0. The bias of the multiply-shift method is below n / 2^64.
  uint64_t Uniform(uint64_t n) { return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * n) >> 64); }

 private:
  uint64_t state_;
};

// A pseudo-random permutation of [0, n), n <= 2^62, in constant memory: a Feistel network over the next power of two,
// applied until the result is below n. The expected number of applications is below two, except for the smallest n.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed) : n_(n) {
    int bits = kFewestBits;
    while (bits < 62 && (uint64_t{1} << bits) < n) ++bits;
    right_bits_ = bits - bits / 2;
    left_mask_ = (uint64_t{1} << (bits / 2)) - 1;
    right_mask_ = (uint64_t{1} << right_bits_) - 1;
    for (uint64_t& key : keys_) key = seed = Mix64(seed);
  }

  // Returns the position that `i` (< n) goes to.
  uint64_t operator()(uint64_t i) const {
    do {
      uint64_t left = i >> right_bits_, right = i & right_mask_;
      for (int k = 0; k < kRounds; k += 2) {
        left ^= Mix64(right ^ keys_[k]) & left_mask_;
        right ^= Mix64(left ^ keys_[k + 1]) & right_mask_;
      }
      i = (left << right_bits_) | right;
    } while (i >= n_);
    return i;
  }

  // Returns the position that goes to `i` (< n).
  uint64_t Inverse(uint64_t i) const {
    do {
      uint64_t left = i >> right_bits_, right = i & right_mask_;
      for (int k = kRounds; k > 0; k -= 2) {
        right ^= Mix64(left ^ keys_[k - 1]) & right_mask_;
        left ^= Mix64(right ^ keys_[k - 2]) & left_mask_;
      }
      i = (left << right_bits_) | right;
    } while (i >= n_);
    return i;
  }

 private:
  static constexpr int kRounds = 6;
  // Smaller networks reach few of the permutations; with four bits, cut down to n, all are reached well.
  static constexpr int kFewestBits = 4;

  uint64_t n_;
  int right_bits_;
  uint64_t left_mask_, right_mask_;
  uint64_t keys_[kRounds];
};

// A shuffle of [0, n) for a table that may be larger than memory. The table is cut into blocks of `block` consecutive
// rows. The blocks are permuted and, in that order, grouped into windows of `window` blocks. Then the rows of each
// window are permuted among themselves. Reading positions in order touches the pages of one window at a time. A table
// that fits into one window is shuffled as a whole. Not thread-safe: it keeps the keys of the last window.
class BlockShuffle {
 public:
  BlockShuffle(uint64_t n, uint64_t block, uint64_t window, uint64_t seed)
      : n_(n),
        block_(block),
        window_(window),
        blocks_((n + block - 1) / block),
        missing_(blocks_ * block - n),
        seed_(seed),
        order_(blocks_, Mix64(seed)),
        // The last block of the table may be short. The size of a window depends on where that block went.
        short_at_(blocks_ > window ? order_.Inverse(blocks_ - 1) : 0),
        rows_(0, 0) {}

  // Returns the row at position `i` (< n).
  uint64_t operator()(uint64_t i) {
    if (blocks_ <= window_) {
      Enter(0, n_);
      return rows_(i);
    }
    const uint64_t full = window_ * block_, short_window = short_at_ / window_;
    const uint64_t w = i < (short_window + 1) * full - missing_ ? i / full : (i + missing_) / full;
    const uint64_t slots = std::min(window_, blocks_ - w * window_);
    Enter(w, slots * block_ - (w == short_window ? missing_ : 0));
    const uint64_t row = rows_(i - (w * full - (w > short_window ? missing_ : 0)));
    uint64_t slot = row / block_;
    if (w == short_window) {  // the short block changes places with the last block of its window
      const uint64_t short_slot = short_at_ % window_;
      slot = slot == slots - 1 ? short_slot : slot == short_slot ? slots - 1 : slot;
    }
    return order_(w * window_ + slot) * block_ + row % block_;
  }

 private:
  void Enter(uint64_t window, uint64_t rows) {
    if (window == entered_) return;
    entered_ = window;
    rows_ = Permutation(rows, Mix64(seed_) ^ Mix64(window));
  }

  uint64_t n_, block_, window_, blocks_, missing_, seed_;
  Permutation order_;
  uint64_t short_at_;  // place of the table's last block in the order of blocks
  uint64_t entered_ = ~uint64_t{0};
  Permutation rows_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_PERMUTATION_H_
