#include "dpsr_tf/ops/product_quantizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <thread>
#include <vector>

namespace dpsr {
namespace {

std::vector<float> Random(int64_t size, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> result(size);
  for (float& x : result) x = normal(random);
  return result;
}

std::vector<int32_t> Codes(const std::vector<float>& x, const std::vector<float>& codebooks,
                           const CodebookShape& shape, bool may_use_bytes = true) {
  const int64_t n = x.size() / shape.dim();
  std::vector<int32_t> codes(n * shape.parts, -99);
  PackedCodebooks(codebooks.data(), shape, may_use_bytes).NearestCodes(x.data(), n, codes.data());
  return codes;
}

struct Case {
  int64_t n;
  CodebookShape shape;
};

class EverySize : public testing::TestWithParam<Case> {};

TEST_P(EverySize, CodesAreThoseOfPlainLoops) {
  const auto& [n, shape] = GetParam();
  const std::vector<float> x = Random(n * shape.dim(), 1), codebooks = Random(shape.size * shape.dim(), 2);
  const std::vector<int32_t> codes = Codes(x, codebooks, shape);
  for (int64_t i = 0; i < n * shape.parts; ++i) {
    const auto distance = [&](int64_t code) {
      const float* centroid = codebooks.data() + (i % shape.parts * shape.size + code) * shape.width;
      double sum = 0;
      for (int64_t k = 0; k < shape.width; ++k) {
        sum += (x[i * shape.width + k] - double{centroid[k]}) * (x[i * shape.width + k] - double{centroid[k]});
      }
      return sum;
    };
    double least = std::numeric_limits<double>::infinity();
    for (int64_t code = 0; code < shape.size; ++code) least = std::min(least, distance(code));
    ASSERT_GE(codes[i], 0);
    ASSERT_LT(codes[i], shape.size);
    ASSERT_NEAR(distance(codes[i]), least, 1e-4 * (1 + least)) << i;
  }
}

TEST_P(EverySize, LookUpAndItsGradientAreThoseOfPlainLoops) {
  const auto& [n, shape] = GetParam();
  const std::vector<float> codebooks = Random(shape.size * shape.dim(), 1), upstream = Random(n * shape.dim(), 2);
  std::mt19937 random(3);
  std::vector<int32_t> codes(n * shape.parts);
  for (int32_t& code : codes) code = random() % shape.size;
  std::vector<float> vectors(n * shape.dim(), NAN), gradient(codebooks.size(), NAN);
  LookUpCodes(codes.data(), n, codebooks.data(), shape, vectors.data());
  LookUpCodesGradient(codes.data(), n, upstream.data(), shape, 0, GradientUnits(shape), gradient.data());
  std::vector<float> expected(codebooks.size());
  for (int64_t i = 0; i < n * shape.dim(); ++i) {
    const int64_t part = i / shape.width % shape.parts, code = codes[i / shape.width];
    const int64_t place = (part * shape.size + code) * shape.width + i % shape.width;
    ASSERT_EQ(vectors[i], codebooks[place]);
    expected[place] += upstream[i];
  }
  ASSERT_EQ(gradient, expected);
}

INSTANTIATE_TEST_SUITE_P(Sizes, EverySize,
                         testing::Values(Case{0, {2, 4, 3}}, Case{1, {1, 1, 1}}, Case{5, {3, 16, 1}},
                                         Case{66, {2, 33, 7}}, Case{130, {4, 256, 8}}, Case{70, {1, 100, 70}},
                                         Case{9, {1, 1000, 256}}, Case{67, {2, 130, 64}}, Case{70, {1, 3000, 80}}));

// Where the CPU cannot multiply bytes, both are the same code.
TEST(ProductQuantizerTest, BytesFindWhatFloatsFind) {
  const CodebookShape shape{2, 700, 96};
  const int64_t n = 500;
  std::vector<float> codebooks = Random(shape.size * shape.dim(), 1), x = Random(n * shape.dim(), 2);
  // Centroids that are nearly the same, so that their rounded scores are in another order than the exact ones.
  for (int64_t i = shape.width; i < shape.size * shape.width; ++i) {
    codebooks[i] = codebooks[i % shape.width] + 1e-2f * codebooks[i];
  }
  // Lengths that bytes round coarsely, no length, and numbers that are not finite.
  for (int64_t k = 0; k < shape.dim(); ++k) {
    x[k] = 0;
    x[shape.dim() + k] *= 1e-20f;
    x[2 * shape.dim() + k] *= 1e15f;
  }
  x[5 * shape.dim()] = 1e4f;
  x[6 * shape.dim()] = NAN;
  x[7 * shape.dim() + 100] = std::numeric_limits<float>::infinity();
  const std::vector<int32_t> bytes = Codes(x, codebooks, shape), floats = Codes(x, codebooks, shape, false);
  const auto distance = [&](int64_t i, int32_t code) {
    double sum = 0;
    for (int64_t k = 0; k < shape.width; ++k) {
      const double centroid = codebooks[(i % shape.parts * shape.size + code) * shape.width + k];
      sum += centroid * centroid - 2 * x[i * shape.width + k] * centroid;
    }
    return sum;
  };
  int64_t same = 0;
  for (int64_t i = 0; i < n * shape.parts; ++i) {
    same += bytes[i] == floats[i];
    if (!std::isfinite(distance(i, 0)) || i / shape.parts == 2) continue;
    ASSERT_NEAR(distance(i, bytes[i]), distance(i, floats[i]), 1e-3 * (1 + std::abs(distance(i, floats[i])))) << i;
  }
  EXPECT_EQ(bytes[6 * shape.parts], 0);
  EXPECT_GE(same, n * shape.parts * 99 / 100);
  codebooks[300 * shape.width] = NAN;  // then floats are compared
  EXPECT_EQ(Codes(x, codebooks, shape), Codes(x, codebooks, shape, false));
}

TEST(ProductQuantizerTest, OfEquallyNearCentroidsTheLowestNumberIsTaken) {
  const CodebookShape shape{1, 200, 5};
  const std::vector<float> three = Random(3 * 5, 1), x = Random(50 * 5, 2);
  std::vector<float> codebooks;
  for (int64_t k = 0; k < 200; ++k) {
    codebooks.insert(codebooks.end(), three.begin() + k % 3 * 5, three.begin() + (k % 3 + 1) * 5);
  }
  for (const int32_t code : Codes(x, codebooks, shape)) EXPECT_LT(code, 3);
}

TEST(ProductQuantizerTest, WhatIsNoNumberHasACodeInRange) {
  const CodebookShape shape{2, 40, 3};
  std::vector<float> codebooks = Random(2 * 40 * 3, 1), x = Random(4 * 6, 2);
  const std::vector<int32_t> sound = Codes(x, codebooks, shape);
  x[0] = NAN;
  x[7] = std::numeric_limits<float>::infinity();
  const std::vector<int32_t> codes = Codes(x, codebooks, shape);
  EXPECT_EQ(codes[0], 0);
  for (const int32_t code : codes) EXPECT_TRUE(code >= 0 && code < 40);
  for (size_t i = 4; i < codes.size(); ++i) EXPECT_EQ(codes[i], sound[i]);
  for (float& value : codebooks) value = NAN;
  EXPECT_EQ(Codes(x, codebooks, shape), std::vector<int32_t>(8, 0));
}

TEST(ProductQuantizerTest, ACentroidThatIsNoNumberIsNotTaken) {
  const CodebookShape shape{1, 40, 3};
  std::vector<float> codebooks = Random(40 * 3, 1);
  const std::vector<float> x = codebooks;
  codebooks[5 * 3] = NAN;
  const std::vector<int32_t> codes = Codes(x, codebooks, shape);
  for (int32_t i = 0; i < 40; ++i) EXPECT_EQ(codes[i] == i, i != 5);
}

TEST(ProductQuantizerTest, ThreadsThatShareTheWorkWriteTheSameBits) {
  const CodebookShape shape{4, 100, 70};
  const int64_t n = 300;
  const std::vector<float> x = Random(n * shape.dim(), 1), codebooks = Random(shape.size * shape.dim(), 2);
  const PackedCodebooks packed(codebooks.data(), shape);
  std::vector<int32_t> alone(n * shape.parts), shared(n * shape.parts);
  packed.NearestCodes(x.data(), n, alone.data());
  std::vector<float> of_alone(codebooks.size()), of_shared(codebooks.size());
  LookUpCodesGradient(alone.data(), n, x.data(), shape, 0, GradientUnits(shape), of_alone.data());
  std::vector<std::thread> threads;
  const int64_t bounds[] = {0, 1, 123, n};
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      packed.NearestCodes(x.data() + bounds[t] * shape.dim(), bounds[t + 1] - bounds[t],
                          shared.data() + bounds[t] * shape.parts);
    });
  }
  for (int64_t unit = 0; unit < GradientUnits(shape); ++unit) {
    threads.emplace_back([&, unit] {
      LookUpCodesGradient(alone.data(), n, x.data(), shape, unit, unit + 1, of_shared.data());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(shared, alone);
  EXPECT_EQ(of_shared, of_alone);
}

}  // namespace
}  // namespace dpsr
