// Randomness of the training stream as pure functions of (seed, position): nothing to store, nothing to replay. An
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

// A pseudo-random permutation of [0, n), n <= 2^62: a Feistel network over the next power of two, walked until it lands
// inside (fewer than two steps expected, but for the smallest n). Constant memory whatever n.
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

  // Where position `i` (< n) goes.
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

  // The position that goes to `i` (< n).
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
  // The smallest networks reach few of the permutations; four bits walked down to n reach them well.
  static constexpr int kFewestBits = 4;

  uint64_t n_;
  int right_bits_;
  uint64_t left_mask_, right_mask_;
  uint64_t keys_[kRounds];
};

// A shuffle of [0, n) for a table that may be larger than memory. The table is cut into blocks of `block` consecutive
// rows; the blocks are permuted, and cut in that order into windows of `window` blocks; the rows of a window are permuted
// among themselves. Whoever reads positions in order touches the pages of one window at a time, and a table that fits
// into one window is shuffled as a whole. Not thread-safe: it keeps the keys of the window it was asked last.
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
        // The last block of the table may be short; all that is known of a window's size depends on where it went.
        short_at_(blocks_ > window ? order_.Inverse(blocks_ - 1) : 0),
        rows_(0, 0) {}

  // The row at position `i` (< n).
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
    if (w == short_window) {  // the short block comes last in its window, in exchange with the one that does
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
