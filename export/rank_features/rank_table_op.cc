// The ops that turn a request to rank into the numbers that a ranker reads. Python: dpsr_export/rank_table.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tf_packed_file.h"
#include "export/rank_features/rank_table.h"
#include "export/request_tables/tf_history.h"
#include "export/request_tables/tf_table_resource.h"

namespace dpsr {
namespace {

class RankTableLoadOp : public TableLoadOp<RankTable> {
 public:
  using TableLoadOp::TableLoadOp;

 private:
  Status Open(const std::string& path, std::unique_ptr<RankTable>* table) const override {
    std::unique_ptr<PackedFile> file;
    DPSR_RETURN_IF_ERROR(OpenPackedFile(path, "rank_table", &file));
    return RankTable::Open(std::move(file), table);
  }
};

enum NumbersInput {
  kNumbersHandle = kHandle,
  kNumbersQuery,
  kNumbersUserId,
  kNumbersItemIds,
  kNumbersScores,
  kNumbersOfUser
};
enum NumbersOutput { kNumbersRows, kNumbersRequest, kNumbersPairs };

// Returns whether a tensor has one element, or none, which means absent.
bool IsOneOrAbsent(const Tensor& tensor) { return tensor.NumElements() == 0 || tensor.shape() == TensorShape({1}); }

class RankNumbersOp : public OpKernel {
 public:
  explicit RankNumbersOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("max_items", &max_items_));
    OP_REQUIRES_OK(c, c->GetAttr("names", &names_));
    OP_REQUIRES_OK(c, c->GetAttr("request", &request_));
    OP_REQUIRES_OK(c, c->GetAttr("pairs", &pairs_));
    OP_REQUIRES_OK(c, c->GetAttr("num_spending", &num_spending_));
    OP_REQUIRES_OK(c, c->GetAttr("num_pairs", &num_pairs_));
    int num_user;
    OP_REQUIRES_OK(c, c->GetAttr("num_user", &num_user));
    OP_REQUIRES(c, names_.size() == static_cast<size_t>(num_user),
                errors::InvalidArgument("names has ", names_.size(), " elements, expected ", num_user));
    for (const int32_t column : request_) {
      OP_REQUIRES(c, column >= 0 && column < num_spending_ + num_user,
                  errors::InvalidArgument("request has column ", column, ", expected 0 to ",
                                          num_spending_ + num_user - 1));
    }
    for (const int32_t column : pairs_) {
      OP_REQUIRES(c, column >= 0 && column <= num_pairs_,
                  errors::InvalidArgument("pairs has column ", column, ", expected 0 to ", num_pairs_));
    }
  }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const RankTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    OP_REQUIRES(c, table->spending() == num_spending_ && table->pair_numbers() == num_pairs_,
                errors::FailedPrecondition("the rank table has ", table->spending(), " numbers of a user and ",
                                           table->pair_numbers(), " of a pair, expected ", num_spending_, " and ",
                                           num_pairs_, "; export the model again"));
    const Tensor& query = c->input(kNumbersQuery);
    const Tensor& user_id = c->input(kNumbersUserId);
    const Tensor& item_ids = c->input(kNumbersItemIds);
    const Tensor& scores = c->input(kNumbersScores);
    OP_REQUIRES(c, query.shape() == TensorShape({1}),
                errors::InvalidArgument("query has shape ", query.shape().DebugString(),
                                        ", expected [1], one query for all items"));
    OP_REQUIRES(c, IsOneOrAbsent(user_id),
                errors::InvalidArgument("user_id has shape ", user_id.shape().DebugString(),
                                        ", expected [1], or [0] for an anonymous user"));
    OP_REQUIRES_OK(c, CheckRank(item_ids, 1, "item_ids", "[n], the items to rank"));
    const int64_t n = item_ids.NumElements();
    OP_REQUIRES(c, n <= max_items_,
                errors::InvalidArgument("item_ids has ", n, " items, expected at most ", max_items_,
                                        "; send the best of them, or export the model with a higher --max_items"));
    OP_REQUIRES_OK(c, CheckScores(scores, n));
    const size_t num_spending = static_cast<size_t>(num_spending_);
    std::vector<float> of_request(num_spending);
    // Through void*: TensorFlow's own int64 may be another type of the same size.
    table->Spending(user_id.NumElements() == 0 ? -1 : *static_cast<const int64_t*>(user_id.data()), of_request.data());
    for (size_t i = 0; i < names_.size(); ++i) {
      const Tensor& number = c->input(kNumbersOfUser + static_cast<int>(i));
      OP_REQUIRES(c, IsOneOrAbsent(number),
                  errors::InvalidArgument("user_", names_[i], " has shape ", number.shape().DebugString(),
                                          ", expected [1], or [0] if it is absent"));
      of_request.push_back(number.NumElements() == 0 ? kMissing : number.flat<float>()(0));
    }

    Tensor *rows, *request, *pairs;
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersRows, {n}, &rows));
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersRequest, {1, static_cast<int64_t>(request_.size())}, &request));
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersPairs, {n, static_cast<int64_t>(pairs_.size())}, &pairs));
    const auto* ids = static_cast<const int64_t*>(item_ids.data());
    int32_t* row = rows->flat<int32>().data();
    for (int64_t i = 0; i < n; ++i) row[i] = table->FindItem(ids[i]);
    std::transform(request_.begin(), request_.end(), request->flat<float>().data(),
                   [&](int32_t column) { return of_request[static_cast<size_t>(column)]; });
    std::vector<float> all(static_cast<size_t>(n) * static_cast<size_t>(num_pairs_));
    OP_REQUIRES_OK(c, ToTensorFlow(table->Pairs(View(query.flat<tstring>()(0)), of_request.data(),
                                                {row, static_cast<size_t>(n)}, all.data())));
    float* out = pairs->flat<float>().data();
    for (int64_t i = 0; i < n; ++i) {
      for (const int32_t column : pairs_) {
        const bool is_score = column == num_pairs_;
        *out++ = !is_score ? all[static_cast<size_t>(i * num_pairs_ + column)]
                 : scores.NumElements() == 0 ? kMissing
                                             : scores.flat<float>()(i);
      }
    }
  }

 private:
  static tensorflow::Status CheckScores(const Tensor& scores, int64_t n) {
    if (scores.NumElements() == 0) return tensorflow::OkStatus();
    if (scores.shape() != TensorShape({n})) {
      return errors::InvalidArgument("dpsr_score has shape ", scores.shape().DebugString(), ", expected [", n,
                                     "], one score for each item, or [0] if all are absent");
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isinf(scores.flat<float>()(i))) continue;
      return errors::InvalidArgument("dpsr_score has ", scores.flat<float>()(i), " at ", i,
                                     ", expected finite numbers, or NaN for an item without a score");
    }
    return tensorflow::OkStatus();
  }

  static constexpr float kMissing = std::numeric_limits<float>::quiet_NaN();

  int64_t max_items_;
  int num_spending_, num_pairs_;
  std::vector<std::string> names_;
  std::vector<int32_t> request_, pairs_;
};

enum HistoryInput { kHistoryHandle = kHandle, kHistoryIds, kHistoryTypes };
enum HistoryOutput { kHistoryRows, kHistoryTypeCodes };

class RankHistoryOp : public OpKernel {
 public:
  explicit RankHistoryOp(OpKernelConstruction* c) : OpKernel(c) { OP_REQUIRES_OK(c, reader_.Init(c)); }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const RankTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    KnownHistory history;
    OP_REQUIRES_OK(c, reader_.Read(1, c->input(kHistoryIds), c->input(kHistoryTypes),
                                   [&](int64_t id) { return table->FindItem(id); }, &history));
    const auto count = static_cast<int64_t>(history.rows.size());
    Tensor *rows, *types;
    OP_REQUIRES_OK(c, c->allocate_output(kHistoryRows, {count}, &rows));
    OP_REQUIRES_OK(c, c->allocate_output(kHistoryTypeCodes, {count}, &types));
    std::copy(history.rows.begin(), history.rows.end(), rows->flat<int32>().data());
    std::copy(history.types.begin(), history.types.end(), types->flat<int32>().data());
  }

 private:
  HistoryReader reader_;
};

enum RowsInput { kRowsHandle = kHandle, kRowsRows };

// Gathers rows of one of the table's own tables.
class RankRowsOp : public OpKernel {
 public:
  explicit RankRowsOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("table", &table_));
    OP_REQUIRES_OK(c, c->GetAttr("width", &width_));
  }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const RankTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    OP_REQUIRES(c, table_ < table->tables() && table->width(table_) == width_,
                errors::FailedPrecondition("the rank table has no table ", table_, " of width ", width_,
                                           "; export the model again"));
    const Tensor& rows = c->input(kRowsRows);
    OP_REQUIRES_OK(c, CheckRank(rows, 1, "rows", "[n]"));
    const int64_t n = rows.NumElements();
    Tensor* values;
    OP_REQUIRES_OK(c, c->allocate_output(0, {n, width_}, &values));
    const int32_t* row = rows.flat<int32>().data();
    float* out = values->flat<float>().data();
    for (int64_t i = 0; i < n; ++i, out += width_) {
      OP_REQUIRES(c, row[i] < table->items(),
                  errors::InvalidArgument("rows has ", row[i], " at ", i, ", expected less than ", table->items()));
      if (row[i] < 0) {
        std::fill_n(out, width_, 0.0f);
      } else {
        std::copy_n(table->Row(table_, row[i]), width_, out);
      }
    }
  }

 private:
  int table_, width_;
};

DPSR_REGISTER_HANDLE("DpsrRankTableHandle", "a rank table");

REGISTER_OP("DpsrRankTableLoad")
    .Input("handle: resource")
    .Input("filename: string")
    .SetIsStateful()
    .SetShapeFn(LoadShapes)
    .Doc(R"doc(
Maps a rank table (export/rank_features/rank_table.h) into a handle. A damaged file is refused.
)doc");

REGISTER_OP("DpsrRankNumbers")
    .Input("handle: resource")
    .Input("query: string")
    .Input("user_id: int64")
    .Input("item_ids: int64")
    .Input("scores: float")
    .Input("of_user: num_user * float")
    .Attr("num_user: int >= 0 = 0")
    .Attr("names: list(string) = []")
    .Attr("max_items: int >= 0")
    .Attr("num_spending: int >= 0")
    .Attr("num_pairs: int >= 0")
    .Attr("request: list(int)")
    .Attr("pairs: list(int)")
    .Output("rows: int32")
    .Output("request_numbers: float")
    .Output("pair_numbers: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle items, ignored;
      for (int i = kNumbersQuery; i < c->num_inputs(); ++i) TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &ignored));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kNumbersItemIds), 1, &items));
      std::vector<int32_t> request, pairs;
      TF_RETURN_IF_ERROR(c->GetAttr("request", &request));
      TF_RETURN_IF_ERROR(c->GetAttr("pairs", &pairs));
      c->set_output(kNumbersRows, items);
      c->set_output(kNumbersRequest, c->Matrix(1, static_cast<int64_t>(request.size())));
      c->set_output(kNumbersPairs, c->Matrix(c->Dim(items, 0), static_cast<int64_t>(pairs.size())));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns what a ranker reads of one query, one user and n items, as of the end of the log.

query: [1]. White space at its ends does not count. At most 65,536 bytes.
user_id: [1], or [0] for an anonymous user. A user who is not known has not spent anything.
item_ids: [n].
scores: [n], a number of each item that the request brings, or [0]. NaN is missing.
of_user: For each number of the user that the request brings [1], or [0] if it is missing.
names: Of these numbers, for messages.
max_items: The largest n. More is InvalidArgument.
num_spending: How many numbers the table has of a user.
num_pairs: How many numbers the table has of a pair.
request: What request_numbers has: places among the table's numbers of a user and then of_user.
pairs: What pair_numbers has: places among the table's numbers of a pair; num_pairs is that of `scores`.
rows: [n], the row of each item, -1 for an id that is not known.
request_numbers: [1, columns]; NaN is missing.
pair_numbers: [n, columns]; NaN is missing, and all numbers of the table are for an item that is not known.
)doc");

REGISTER_OP("DpsrRankHistory")
    .Input("handle: resource")
    .Input("ids: int64")
    .Input("types: string")
    .Attr("length: int >= 1")
    .Attr("event_types: list(string)")
    .Attr("default_type: int >= 0")
    .Output("rows: int32")
    .Output("type_codes: int32")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      const ShapeHandle unknown = c->Vector(InferenceContext::kUnknownDim);
      c->set_output(kHistoryRows, unknown);
      c->set_output(kHistoryTypeCodes, unknown);
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns the last known items of one user, oldest first. Inputs and attributes are those of DpsrItemHistory for a batch
of 1.

rows: [h] rows of the rank table.
type_codes: [h] positions in event_types.
)doc");

REGISTER_OP("DpsrRankRows")
    .Input("handle: resource")
    .Input("rows: int32")
    .Attr("table: int >= 0")
    .Attr("width: int >= 0")
    .Output("values: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle rows;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kRowsRows), 1, &rows));
      int width;
      TF_RETURN_IF_ERROR(c->GetAttr("width", &width));
      c->set_output(0, c->Matrix(c->Dim(rows, 0), width));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns rows of one of the tables with numbers that a model has computed for each item.

rows: [n]; -1 gives zeros.
values: [n, width].
)doc");

#define DPSR_REGISTER(name, kernel) REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_CPU), kernel)
DPSR_REGISTER("DpsrRankTableHandle", TableHandleOp<RankTable>);
DPSR_REGISTER("DpsrRankTableLoad", RankTableLoadOp);
DPSR_REGISTER("DpsrRankNumbers", RankNumbersOp);
DPSR_REGISTER("DpsrRankHistory", RankHistoryOp);
DPSR_REGISTER("DpsrRankRows", RankRowsOp);
#undef DPSR_REGISTER

}  // namespace
}  // namespace dpsr
