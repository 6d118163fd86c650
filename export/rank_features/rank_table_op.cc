// The ops that turn a request to rank into the numbers that a ranker reads. Python: dpsr_export/rank_table.py.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tf_packed_file.h"
#include "export/rank_features/rank_table.h"
#include "export/request_tables/history.h"
#include "export/request_tables/table_resource.h"

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

enum NumbersInput { kNumbersHandle = kHandle, kNumbersQuery, kNumbersUserId, kNumbersItemIds };
enum NumbersOutput { kNumbersRows, kNumbersSpending, kNumbersPairs };

class RankNumbersOp : public OpKernel {
 public:
  explicit RankNumbersOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("max_items", &max_items_));
    OP_REQUIRES_OK(c, c->GetAttr("num_spending", &num_spending_));
    OP_REQUIRES_OK(c, c->GetAttr("num_pairs", &num_pairs_));
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
    OP_REQUIRES(c, query.shape() == TensorShape({1}),
                errors::InvalidArgument("query has shape ", query.shape().DebugString(),
                                        ", expected [1], one query for all items"));
    OP_REQUIRES(c, user_id.NumElements() == 0 || user_id.shape() == TensorShape({1}),
                errors::InvalidArgument("user_id has shape ", user_id.shape().DebugString(),
                                        ", expected [1], or [0] for an anonymous user"));
    OP_REQUIRES_OK(c, CheckRank(item_ids, 1, "item_ids", "[n], the items to rank"));
    const int64_t n = item_ids.NumElements();
    OP_REQUIRES(c, n <= max_items_,
                errors::InvalidArgument("item_ids has ", n, " items, expected at most ", max_items_,
                                        "; send the best of them, or export the model with a higher --max_items"));
    Tensor *rows, *spending, *pairs;
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersRows, {n}, &rows));
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersSpending, {1, num_spending_}, &spending));
    OP_REQUIRES_OK(c, c->allocate_output(kNumbersPairs, {n, num_pairs_}, &pairs));
    // Through void*: TensorFlow's own int64 may be another type of the same size.
    const auto* ids = static_cast<const int64_t*>(item_ids.data());
    int32_t* row = rows->flat<int32>().data();
    for (int64_t i = 0; i < n; ++i) row[i] = table->FindItem(ids[i]);
    const int64_t user = user_id.NumElements() == 0 ? -1 : *static_cast<const int64_t*>(user_id.data());
    float* spent = spending->flat<float>().data();
    table->Spending(user, spent);
    OP_REQUIRES_OK(c, ToTensorFlow(table->Pairs(View(query.flat<tstring>()(0)), spent,
                                                {row, static_cast<size_t>(n)}, pairs->flat<float>().data())));
  }

 private:
  int64_t max_items_;
  int num_spending_, num_pairs_;
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
    .Attr("max_items: int >= 0")
    .Attr("num_spending: int >= 0")
    .Attr("num_pairs: int >= 0")
    .Output("rows: int32")
    .Output("spending: float")
    .Output("pairs: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle items, ignored;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kNumbersQuery), 1, &ignored));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kNumbersUserId), 1, &ignored));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kNumbersItemIds), 1, &items));
      int spending, pairs;
      TF_RETURN_IF_ERROR(c->GetAttr("num_spending", &spending));
      TF_RETURN_IF_ERROR(c->GetAttr("num_pairs", &pairs));
      c->set_output(kNumbersRows, items);
      c->set_output(kNumbersSpending, c->Matrix(1, spending));
      c->set_output(kNumbersPairs, c->Matrix(c->Dim(items, 0), pairs));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns what a ranker reads of one query, one user and n items, as of the end of the log.

query: [1]. White space at its ends does not count. At most 65,536 bytes.
user_id: [1], or [0] for an anonymous user. A user who is not known has not spent anything.
item_ids: [n].
max_items: The largest n. More is InvalidArgument.
rows: [n], the row of each item, -1 for an id that is not known.
spending: [1, num_spending], numbers of the user; NaN is missing.
pairs: [n, num_pairs], numbers of query and item; NaN is missing, and all of an unknown item.
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
