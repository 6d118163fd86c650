#include "serving/model_server/batch_tensors.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <string>

#include "tensorflow/core/framework/types.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::tstring;

Tensor Floats(const TensorShape& shape, float first = 1) {
  Tensor tensor(tensorflow::DT_FLOAT, shape);
  float* values = tensor.flat<float>().data();
  std::iota(values, values + tensor.NumElements(), first);
  return tensor;
}

std::vector<float> Values(const Tensor& tensor) {
  const float* values = tensor.flat<float>().data();
  return {values, values + tensor.NumElements()};
}

Tensor Strings(const std::vector<std::string>& texts, const TensorShape& shape) {
  Tensor tensor(tensorflow::DT_STRING, shape);
  for (size_t i = 0; i < texts.size(); ++i) tensor.flat<tstring>()(i) = texts[i];
  return tensor;
}

std::vector<std::string> Texts(const Tensor& tensor) {
  std::vector<std::string> texts;
  for (int64_t i = 0; i < tensor.NumElements(); ++i) texts.emplace_back(tensor.flat<tstring>()(i));
  return texts;
}

Rows All(const Tensor& tensor) { return {&tensor, 0, tensor.dim_size(0)}; }

TEST(ConcatRows, LaysPartsBelowEachOther) {
  const Tensor a = Floats({2, 2}), b = Floats({1, 2}, 10);
  const Tensor joined = ConcatRows({All(a), All(b)}, 3);
  EXPECT_EQ(joined.shape(), TensorShape({3, 2}));
  EXPECT_EQ(Values(joined), (std::vector<float>{1, 2, 3, 4, 10, 11}));
}

TEST(ConcatRows, TakesRowsOutOfTheMiddle) {
  const Tensor a = Floats({5}), b = Floats({5}, 10);
  EXPECT_EQ(Values(ConcatRows({{&a, 1, 2}, {&b, 4, 1}}, 3)), (std::vector<float>{2, 3, 14}));
}

TEST(ConcatRows, RepeatsTheFirstRow) {
  const Tensor a = Floats({1, 2}), b = Floats({1, 2}, 10);
  EXPECT_EQ(Values(ConcatRows({All(a), All(b)}, 4)), (std::vector<float>{1, 2, 10, 11, 1, 2, 1, 2}));
}

TEST(ConcatRows, Strings) {
  const Tensor a = Strings({"x", std::string(100, 'y')}, {2}), b = Strings({""}, {1});
  EXPECT_EQ(Texts(ConcatRows({All(a), All(b)}, 4)), (std::vector<std::string>{"x", std::string(100, 'y'), "", "x"}));
}

TEST(ConcatRows, FillsSmallerPartsWithTheirFirstElement) {
  const Tensor a = Floats({1, 1, 2}), b = Floats({1, 2, 1}, 10);
  const Tensor joined = ConcatRows({All(a), All(b)}, 2);
  EXPECT_EQ(joined.shape(), TensorShape({2, 2, 2}));
  EXPECT_EQ(Values(joined), (std::vector<float>{1, 2, 1, 1, 10, 10, 11, 10}));

  const Tensor c = Strings({"p", "q"}, {2, 1}), d = Strings({"r", "s"}, {1, 2});
  EXPECT_EQ(Texts(ConcatRows({All(c), All(d)}, 4)), (std::vector<std::string>{"p", "p", "q", "p", "r", "s", "p", "p"}));
}

TEST(ConcatRows, FillsPartsWithoutElements) {
  const Tensor a = Floats({2, 0}), b = Floats({1, 2});
  EXPECT_EQ(Values(ConcatRows({All(a), All(b)}, 3)), (std::vector<float>{0, 0, 0, 0, 1, 2}));
  const Tensor c = Strings({}, {1, 0}), d = Strings({"x"}, {1, 1});
  EXPECT_EQ(Texts(ConcatRows({All(c), All(d)}, 2)), (std::vector<std::string>{"", "x"}));
  EXPECT_EQ(ConcatRows({All(a), All(a)}, 4).shape(), TensorShape({4, 0}));
}

// Against the definition, element by element.
TEST(ConcatRows, PadsAsDefined) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<Tensor> tensors;
    int64_t largest[3] = {0, 0, 0}, num_rows = 0;
    for (int i = 0; i < 3; ++i) {
      int64_t dims[4] = {static_cast<int64_t>(1 + random() % 3)};
      num_rows += dims[0];
      for (int d = 0; d < 3; ++d) {
        dims[d + 1] = static_cast<int64_t>(1 + random() % 3);
        largest[d] = std::max(largest[d], dims[d + 1]);
      }
      tensors.push_back(Floats({dims[0], dims[1], dims[2], dims[3]}, 100.f * i));
    }
    const Tensor joined = ConcatRows({All(tensors[0]), All(tensors[1]), All(tensors[2])}, num_rows + 1);
    ASSERT_EQ(joined.shape(), TensorShape({num_rows + 1, largest[0], largest[1], largest[2]}));
    const auto found = joined.tensor<float, 4>();
    int64_t row = 0;
    for (const Tensor& tensor : tensors) {
      const auto part = tensor.tensor<float, 4>();
      for (int64_t i = 0; i < tensor.dim_size(0); ++i, ++row) {
        for (int64_t j = 0; j < largest[0]; ++j) {
          for (int64_t k = 0; k < largest[1]; ++k) {
            for (int64_t l = 0; l < largest[2]; ++l) {
              const bool inside = j < tensor.dim_size(1) && k < tensor.dim_size(2) && l < tensor.dim_size(3);
              ASSERT_EQ(found(row, j, k, l), inside ? part(i, j, k, l) : part(0, 0, 0, 0));
            }
          }
        }
      }
    }
    ASSERT_EQ(found(num_rows, 0, 0, 0), 0.f);
  }
}

TEST(CopyRows, UndoesConcatRows) {
  const Tensor a = Floats({2, 3}), b = Floats({3, 3}, 10);
  const Tensor joined = ConcatRows({All(a), All(b)}, 8);
  EXPECT_EQ(Values(CopyRows({&joined, 0, 2})), Values(a));
  EXPECT_EQ(Values(CopyRows({&joined, 2, 3})), Values(b));
}

TEST(HaveSameRows, LooksBeyondTheFirstDimension) {
  EXPECT_TRUE(HaveSameRows(Floats({1, 2}), Floats({5, 2})));
  EXPECT_FALSE(HaveSameRows(Floats({1, 2}), Floats({1, 3})));
  EXPECT_FALSE(HaveSameRows(Floats({1, 2}), Floats({1, 2, 1})));
}

TEST(NumElementsOfConcat, CountsPaddingAndOverflow) {
  const Tensor a = Floats({1, 2}), b = Floats({1, 5});
  EXPECT_EQ(NumElementsOfConcat({All(a), All(b)}, 4), 20);
  EXPECT_EQ(NumElementsOfConcat({All(a), All(b)}, int64_t{1} << 62), -1);
}

TEST(RoundUpBatch, PicksTheSmallestThatFits) {
  EXPECT_EQ(RoundUpBatch(3, {}), 3);
  EXPECT_EQ(RoundUpBatch(1, {2, 8}), 2);
  EXPECT_EQ(RoundUpBatch(2, {2, 8}), 2);
  EXPECT_EQ(RoundUpBatch(3, {2, 8}), 8);
  EXPECT_EQ(RoundUpBatch(9, {2, 8}), 9);
}

TEST(SplitSizes, FillsTheRoomFirst) {
  EXPECT_EQ(SplitSizes(3, 4, 8), (std::vector<int64_t>{3}));
  EXPECT_EQ(SplitSizes(20, 3, 8), (std::vector<int64_t>{3, 8, 8, 1}));
  EXPECT_EQ(SplitSizes(16, 0, 8), (std::vector<int64_t>{8, 8}));
}

}  // namespace
}  // namespace dpsr::serving
