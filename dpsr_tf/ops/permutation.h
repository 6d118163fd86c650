// Randomness of the training stream as pure functions of (seed, position): nothing to store, nothing to replay. An
// iterator that can compute any position needs only that position in its checkpoint.
#ifndef DPSR_DPSR_TF_OPS_PERMUTATION_H_
#define DPSR_DPSR_TF_OPS_PERMUTATION_H_

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
  // Uniform in [0, n), n > 0. The bias of the multiply-shift method is below n / 2^64.
  uint64_t Uniform(uint64_t n) { return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * n) >> 64); }

 private:
  uint64_t state_;
};

// A pseudo-random permutation of [0, n): a Feistel network over the next even power of two, walked until it lands
// inside (fewer than four steps expected). Constant memory whatever n, so a log of any length is shuffled as a whole.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed) : n_(n) {
    while (half_bits_ < 31 && (1ULL << (2 * half_bits_)) < n) ++half_bits_;
    for (uint64_t& key : keys_) key = seed = Mix64(seed);
  }

  // Where position `i` (< n) goes.
  uint64_t operator()(uint64_t i) const {
    do {
      i = Encrypt(i);
    } while (i >= n_);
    return i;
  }

 private:
  static constexpr int kRounds = 6;

  uint64_t Encrypt(uint64_t x) const {
    const uint64_t mask = (1ULL << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t key : keys_) {
      const uint64_t next = left ^ (Mix64(right ^ key) & mask);
      left = right;
      right = next;
    }
    return (left << half_bits_) | right;
  }

  uint64_t n_;
  int half_bits_ = 1;
  uint64_t keys_[kRounds];
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_PERMUTATION_H_
