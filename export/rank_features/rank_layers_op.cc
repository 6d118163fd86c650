// The op that scores the items of a request. Python: dpsr_export/rank_table.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "export/rank_features/rank_layers.h"
#include "export/rank_features/rank_table.h"
#include "export/request_tables/tf_table_resource.h"

namespace dpsr {
namespace {

enum ScoresInput {
  kRankedHandle = kHandle,
  kRankedRows,
  kRankedHistoryRows,
  kRankedPairNumbers,
  kRankedRequestNumbers,
  kRankedText,
  kRankedUser,
  kRankedRequestKernel,
  kRankedPairKernel,
  kRankedWantedKernel,
  kRankedWantedBias,
  kRankedWeights  // the bias of the first layer, then kernel and bias of each other one
};

Span<const float> Values(const Tensor& tensor) {
  return {tensor.flat<float>().data(), static_cast<size_t>(tensor.NumElements())};
}

tensorflow::Status ReadScales(OpKernelConstruction* c, const std::string& kind, Scales* scales) {
  // Three numbers for each scale.
  std::vector<float> values;
  TF_RETURN_IF_ERROR(c->GetAttr(kind + "_scales", &values));
  TF_RETURN_IF_ERROR(c->GetAttr(kind + "_may_miss", &scales->may_miss));
  TF_RETURN_IF_ERROR(c->GetAttr("cut", &scales->cut));
  if (values.size() % 3 != 0) {
    return errors::InvalidArgument(kind, "_scales has ", values.size(), " elements, expected three for each number");
  }
  for (size_t i = 0; i < values.size(); i += 3) scales->numbers.push_back({values[i], values[i + 1], values[i + 2]});
  for (const int32_t place : scales->may_miss) {
    if (place >= 0 && static_cast<size_t>(place) < scales->numbers.size()) continue;
    return errors::InvalidArgument(kind, "_may_miss has ", place, ", expected places of ", scales->numbers.size(),
                                   " numbers");
  }
  return tensorflow::OkStatus();
}

class RankScoresOp : public OpKernel {
 public:
  explicit RankScoresOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, ReadScales(c, "pair", &layout_.scales));
    OP_REQUIRES_OK(c, ReadScales(c, "request", &request_scales_));
    OP_REQUIRES_OK(c, c->GetAttr("fields", &layout_.fields));
    OP_REQUIRES_OK(c, c->GetAttr("half_life", &half_life_));
    OP_REQUIRES_OK(c, c->GetAttr("products", &products_));
    OP_REQUIRES_OK(c, c->GetAttr("has_history", &has_history_));
    OP_REQUIRES_OK(c, c->GetAttr("tables", &tables_));
    OP_REQUIRES_OK(c, c->GetAttr("num_weights", &num_weights_));
    for (const int32_t width : layout_.fields) {
      OP_REQUIRES(c, width >= 0, errors::InvalidArgument("fields has ", width, ", expected no negative width"));
    }
    OP_REQUIRES(c, tables_.size() == 4 && tables_[kHiddenTable] >= 0 && tables_[kVectors] >= 0,
                errors::InvalidArgument("tables has ", tables_.size(), " elements, expected 4, the first two not -1"));
    OP_REQUIRES(c, products_ == (tables_[kOffered] >= 0),
                errors::InvalidArgument("products is ", products_, ", expected a table for it, and else none"));
    OP_REQUIRES(c, num_weights_ % 2 == 1, errors::InvalidArgument("num_weights is ", num_weights_, ", expected an odd ",
                                                                  "number: a bias, then kernels and biases"));
  }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const RankTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    OP_REQUIRES_OK(c, CheckRank(c->input(kRankedRows), 1, "rows", "[n]"));
    OP_REQUIRES_OK(c, CheckRank(c->input(kRankedHistoryRows), 1, "history_rows", "[h]"));
    for (const int32_t number : tables_) {
      OP_REQUIRES(c, number < table->tables(),
                  errors::FailedPrecondition("the rank table has no table ", number, "; export the model again"));
    }
    const Span<const int32_t> rows = Rows(c->input(kRankedRows)), past = Rows(c->input(kRankedHistoryRows));
    for (const int32_t row : rows) {
      OP_REQUIRES(c, row < table->items(),
                  errors::InvalidArgument("rows has ", row, ", expected less than ", table->items()));
    }
    for (const int32_t row : past) {
      OP_REQUIRES(c, row >= 0 && row < table->items(),
                  errors::InvalidArgument("history_rows has ", row, ", expected 0 to ", table->items() - 1));
    }
    const size_t width = static_cast<size_t>(table->width(tables_[kHiddenTable]));
    const size_t vector = static_cast<size_t>(table->width(tables_[kVectors]));

    // What depends on the request alone.
    std::vector<float> pooled;
    if (has_history_) pooled = Pooled(*table, past, vector);
    const Span<const float> text = Values(c->input(kRankedText)), user = Values(c->input(kRankedUser));
    OP_REQUIRES_OK(c, CheckShape("request_numbers", c->input(kRankedRequestNumbers).shape(),
                                 {1, static_cast<int64_t>(request_scales_.numbers.size())}));
    std::vector<float> inputs(text.begin(), text.end());
    inputs.insert(inputs.end(), user.begin(), user.end());
    inputs.resize(inputs.size() + request_scales_.width());
    request_scales_.Apply(c->input(kRankedRequestNumbers).flat<float>().data(),
                          inputs.data() + inputs.size() - request_scales_.width());
    if (has_history_) {
      inputs.insert(inputs.end(), pooled.begin(), pooled.end());
      inputs.push_back(std::log1p(static_cast<float>(past.size())));
    }
    const auto num_inputs = static_cast<int64_t>(inputs.size());
    const Tensor& request_kernel = c->input(kRankedRequestKernel);
    OP_REQUIRES_OK(c, CheckShape("request_kernel", request_kernel.shape(), {num_inputs, static_cast<int64_t>(width)}));
    OP_REQUIRES_OK(c, CheckShape("the first bias", c->input(kRankedWeights).shape(), {static_cast<int64_t>(width)}));
    const Span<const float> bias = Values(c->input(kRankedWeights));
    std::vector<float> of_request(width), wanted;
    DenseLayer{request_kernel.flat<float>().data(), bias.data(), inputs.size(), width, false}.Apply(
        inputs.data(), nullptr, 1, of_request.data());
    RankedRequest request;
    if (products_) {
      const int64_t offered = table->width(tables_[kOffered]);
      OP_REQUIRES_OK(c, CheckShape("wanted_kernel", c->input(kRankedWantedKernel).shape(), {num_inputs, offered}));
      OP_REQUIRES_OK(c, CheckShape("wanted_bias", c->input(kRankedWantedBias).shape(), {offered}));
      OP_REQUIRES(c, text.size() <= vector,
                  errors::InvalidArgument("text has ", text.size(), " elements, expected at most ", vector));
      wanted.resize(static_cast<size_t>(offered));
      DenseLayer{c->input(kRankedWantedKernel).flat<float>().data(), c->input(kRankedWantedBias).flat<float>().data(),
                 inputs.size(), wanted.size(), false}
          .Apply(inputs.data(), nullptr, 1, wanted.data());
      request.wanted = {wanted.data(), wanted.size()};
      request.text = text;
      request.pooled = {pooled.data(), pooled.size()};
      int64_t fields = 0;
      for (const int32_t of_field : layout_.fields) fields += of_field;
      OP_REQUIRES(c, fields <= static_cast<int64_t>(vector),
                  errors::InvalidArgument("fields have ", fields, " elements, expected at most ", vector));
    }
    if (tables_[kCodes] >= 0) {
      const auto codes = static_cast<size_t>(table->width(tables_[kCodes]));
      std::vector<float> history;
      for (const int32_t row : past) {
        const float* of_item = table->Row(tables_[kCodes], row);
        history.insert(history.end(), of_item, of_item + codes);
      }
      request.SetHistory(history.data(), past.size(), codes, half_life_);
    }

    // The items. Unknown ones are left out.
    const size_t pair_inputs = request.Width(layout_), num_numbers = layout_.scales.numbers.size();
    OP_REQUIRES_OK(c, CheckShape("pair_numbers", c->input(kRankedPairNumbers).shape(),
                                 {static_cast<int64_t>(rows.size()), static_cast<int64_t>(num_numbers)}));
    OP_REQUIRES_OK(c, CheckShape("pair_kernel", c->input(kRankedPairKernel).shape(),
                                 {static_cast<int64_t>(pair_inputs), static_cast<int64_t>(width)}));
    OP_REQUIRES_OK(c, CheckLayers(c, static_cast<int64_t>(width)));
    const float* numbers = c->input(kRankedPairNumbers).flat<float>().data();
    std::vector<size_t> known;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] >= 0) known.push_back(i);
    }
    const size_t n = known.size();
    std::vector<float> x(n * pair_inputs), y(n * width);
    std::vector<const float*> hidden(n);
    for (size_t i = 0; i < n; ++i) {
      const int32_t row = rows[known[i]];
      hidden[i] = table->Row(tables_[kHiddenTable], row);
      PairInputs(layout_, request, numbers + known[i] * num_numbers, table->Row(tables_[kVectors], row),
                 OptionalRow(*table, kOffered, row), OptionalRow(*table, kCodes, row), x.data() + i * pair_inputs);
    }
    // What most items share is added once, as a part of the request.
    const float* pair_kernel = c->input(kRankedPairKernel).flat<float>().data();
    std::vector<float> common(pair_inputs), of_all(width);
    MoveCommonInputs(n, pair_inputs, x.data(), common.data());
    DenseLayer{pair_kernel, of_request.data(), pair_inputs, width, false}.Apply(common.data(), nullptr, 1, of_all.data());
    const bool is_last = num_weights_ == 1;
    DenseLayer{pair_kernel, of_all.data(), pair_inputs, width, !is_last}.Apply(x.data(), hidden.data(), n, y.data());
    size_t columns = width;
    for (int layer = 1; layer < num_weights_; layer += 2) {
      const Span<const float> biases = Values(c->input(kRankedWeights + layer + 1));
      x.swap(y);
      y.resize(n * biases.size());
      DenseLayer{c->input(kRankedWeights + layer).flat<float>().data(), biases.data(), columns, biases.size(),
                 layer + 2 < num_weights_}
          .Apply(x.data(), nullptr, n, y.data());
      columns = biases.size();
    }
    Tensor* scores;
    OP_REQUIRES_OK(c, c->allocate_output(0, {static_cast<int64_t>(rows.size())}, &scores));
    float* score = scores->flat<float>().data();
    std::fill_n(score, rows.size(), -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < n; ++i) score[known[i]] = y[i];
  }

 private:
  enum Table { kHiddenTable, kVectors, kOffered, kCodes };

  static Span<const int32_t> Rows(const Tensor& tensor) {
    return {tensor.flat<int32>().data(), static_cast<size_t>(tensor.NumElements())};
  }

  // Returns the mean of the vectors of some items, zeros if there are none.
  std::vector<float> Pooled(const RankTable& table, Span<const int32_t> rows, size_t width) const {
    std::vector<float> mean(width);
    for (const int32_t row : rows) {
      const float* vector = table.Row(tables_[kVectors], row);
      for (size_t i = 0; i < width; ++i) mean[i] += vector[i];
    }
    const float count = static_cast<float>(std::max<size_t>(rows.size(), 1));
    for (float& value : mean) value /= count;
    return mean;
  }

  const float* OptionalRow(const RankTable& table, Table which, int32_t row) const {
    return tables_[which] < 0 ? nullptr : table.Row(tables_[which], row);
  }

  // Checks that each layer has as many inputs as the one before it has outputs, and that the last one has one output.
  tensorflow::Status CheckLayers(OpKernelContext* c, int64_t inputs) const {
    for (int layer = 1; layer < num_weights_; layer += 2) {
      const int64_t outputs = c->input(kRankedWeights + layer + 1).NumElements();
      TF_RETURN_IF_ERROR(CheckShape("a kernel", c->input(kRankedWeights + layer).shape(), {inputs, outputs}));
      inputs = outputs;
    }
    if (inputs != 1) return errors::InvalidArgument("the last layer has ", inputs, " outputs, expected 1");
    return tensorflow::OkStatus();
  }

  PairLayout layout_;
  Scales request_scales_;
  std::vector<int32_t> tables_;
  int num_weights_;
  float half_life_;
  bool products_, has_history_;
};

REGISTER_OP("DpsrRankScores")
    .Input("handle: resource")
    .Input("rows: int32")
    .Input("history_rows: int32")
    .Input("pair_numbers: float")
    .Input("request_numbers: float")
    .Input("text: float")
    .Input("user: float")
    .Input("request_kernel: float")
    .Input("pair_kernel: float")
    .Input("wanted_kernel: float")
    .Input("wanted_bias: float")
    .Input("weights: num_weights * float")
    .Attr("num_weights: int >= 1")
    .Attr("tables: list(int)")
    .Attr("pair_scales: list(float)")
    .Attr("pair_may_miss: list(int)")
    .Attr("request_scales: list(float)")
    .Attr("request_may_miss: list(int)")
    .Attr("cut: float")
    .Attr("fields: list(int)")
    .Attr("half_life: float")
    .Attr("products: bool")
    .Attr("has_history: bool")
    .Output("scores: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle rows, ignored;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kRankedRows), 1, &rows));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kRankedHistoryRows), 1, &ignored));
      for (int i = kRankedPairNumbers; i < kRankedWantedBias; ++i) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 2, &ignored));
      }
      c->set_output(0, rows);
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Scores n items for one request: the layers of a ranker (export/rank_features/rank_layers.h).

rows: [n] rows of the rank table; -1 gives -inf.
history_rows: [h] rows of the history's items, oldest first.
pair_numbers: [n, numbers of kind pair]; NaN is missing.
request_numbers: [1, numbers of kind request]; NaN is missing.
text: [1, width], vector of the query; its width may be 0.
user: [1, width], vectors of the user's features; its width may be 0.
request_kernel: [inputs of a request, width of the first layer].
pair_kernel: [inputs of a pair, width of the first layer].
wanted_kernel: [inputs of a request, width], and its bias: what is multiplied with an item. Empty without `products`.
weights: The bias of the first layer, then kernel [inputs, outputs] and bias [outputs] of each other one.
tables: Which tables have the items' part of the first layer, vectors, what is multiplied with a request, and codes. -1
  stands for no table.
pair_scales: Unit, mean and standard deviation of each number of a pair.
pair_may_miss: The places of those whose absence is an input, too.
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrRankScores").Device(tensorflow::DEVICE_CPU), RankScoresOp);

}  // namespace
}  // namespace dpsr
