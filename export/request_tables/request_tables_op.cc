// The ops that turn the values of a request into what the towers read in training: feature values into codes, a history
// of items into their texts and features, and past queries. Also the ops between a shop's own text ids and item ids.
// Python: dpsr_export/request_tables.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/item_table.h"
#include "dpsr_tf/ops/tf_columns.h"
#include "export/request_tables/file_fingerprint.h"
#include "export/request_tables/tf_history.h"
#include "export/request_tables/key_table.h"
#include "export/request_tables/tf_table_resource.h"

namespace dpsr {
namespace {

class KeyTableLoadOp : public TableLoadOp<KeyTable> {
 public:
  using TableLoadOp::TableLoadOp;

 private:
  Status Open(const std::string& path, std::unique_ptr<KeyTable>* table) const override {
    return KeyTable::Open(path, table);
  }
};

class ItemTableLoadOp : public TableLoadOp<ItemTable> {
 public:
  explicit ItemTableLoadOp(OpKernelConstruction* c) : TableLoadOp(c) {
    OP_REQUIRES_OK(c, c->GetAttr("fixed", &names_.fixed));
    OP_REQUIRES_OK(c, c->GetAttr("lists", &names_.lists));
  }

 private:
  Status Open(const std::string& path, std::unique_ptr<ItemTable>* table) const override {
    std::unique_ptr<PackedFile> file;
    DPSR_RETURN_IF_ERROR(PackedFile::Open(path, "items", /*verify=*/false, &file));
    return ItemTable::Open(std::move(file), names_, /*with_ids=*/true, table);
  }

  FeatureNames names_;
};

enum FeatureInput { kFeatureHandle = kHandle, kFeatureTexts, kFeatureValues };
enum FeatureOutput { kFeatureCodes, kFeatureLists };  // then the values of all lists, then their splits

class FeatureCodesOp : public OpKernel {
 public:
  explicit FeatureCodesOp(OpKernelConstruction* c) : OpKernel(c) {
    std::string side;
    std::vector<std::string> names;
    std::vector<bool> lists;
    std::vector<float> boundaries;
    std::vector<int32_t> num_boundaries;
    int num_lists;
    tensorflow::DataTypeVector types;
    OP_REQUIRES_OK(c, c->GetAttr("side", &side));
    OP_REQUIRES_OK(c, c->GetAttr("names", &names));
    OP_REQUIRES_OK(c, c->GetAttr("lists", &lists));
    OP_REQUIRES_OK(c, c->GetAttr("boundaries", &boundaries));
    OP_REQUIRES_OK(c, c->GetAttr("num_boundaries", &num_boundaries));
    OP_REQUIRES_OK(c, c->GetAttr("num_lists", &num_lists));
    OP_REQUIRES_OK(c, c->GetAttr("types", &types));
    OP_REQUIRES(c,
                names.size() == types.size() && lists.size() == types.size() && num_boundaries.size() == types.size(),
                errors::InvalidArgument("names, lists and num_boundaries have ", names.size(), ", ", lists.size(),
                                        " and ", num_boundaries.size(), " elements, expected one of each of the ",
                                        types.size(), " values"));
    size_t begin = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      const size_t end = begin + static_cast<size_t>(std::max(num_boundaries[i], 0));
      OP_REQUIRES(c, end <= boundaries.size(),
                  errors::InvalidArgument("boundaries has ", boundaries.size(), " elements, expected ", end));
      Feature feature{StrCat(side, "_", names[i]), StrCat(side, '\0', names[i], '\0'), bool{lists[i]}, {}};
      feature.boundaries.assign(boundaries.begin() + begin, boundaries.begin() + end);
      begin = end;
      (feature.is_list ? num_lists_ : num_fixed_) += 1;
      features_.push_back(std::move(feature));
    }
    OP_REQUIRES(c, num_lists == num_lists_,
                errors::InvalidArgument("num_lists is ", num_lists, ", expected ", num_lists_, " as lists has it"));
  }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const KeyTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    OP_REQUIRES_OK(c, CheckRank(c->input(kFeatureTexts), 1, "texts", "[batch]"));
    const int64_t batch = c->input(kFeatureTexts).dim_size(0);
    Tensor* codes;
    OP_REQUIRES_OK(c, c->allocate_output(kFeatureCodes, {batch, num_fixed_}, &codes));
    int32_t* code = codes->flat<tensorflow::int32>().data();
    std::fill_n(code, codes->NumElements(), 0);
    OpInputList values;
    OP_REQUIRES_OK(c, c->input_list("values", &values));
    int fixed = 0, list = 0;
    for (size_t i = 0; i < features_.size(); ++i) {
      const Feature& feature = features_[i];
      const Tensor& value = values[static_cast<int>(i)];
      if (feature.is_list) {
        OP_REQUIRES_OK(c, List(c, *table, feature, value, batch, list++));
        continue;
      }
      const int column = fixed++;
      if (value.NumElements() == 0) continue;
      OP_REQUIRES(c, value.shape() == TensorShape({batch}),
                  errors::InvalidArgument(feature.input, " has shape ", value.shape().DebugString(), ", expected [",
                                          batch, "], one value for each text, or [0] if all are absent"));
      for (int64_t row = 0; row < batch; ++row) {
        code[row * num_fixed_ + column] = value.dtype() == tensorflow::DT_STRING
                                              ? Code(*table, feature, View(value.flat<tstring>()(row)))
                                              : Bucket(feature, value.flat<float>()(row));
      }
    }
  }

 private:
  struct Feature {
    std::string input;   // its name in a signature
    std::string prefix;  // begins the keys of its values in the table
    bool is_list;
    std::vector<float> boundaries;
  };

  // Returns the code of a value, or 0 if it is empty or unknown.
  static int32_t Code(const KeyTable& table, const Feature& feature, std::string_view value) {
    value = Trimmed(value);
    if (value.empty()) return 0;
    const int32_t row = table.Find(feature.prefix + std::string(value));
    return row < 0 ? 0 : table.code(row);
  }

  // Returns 1 + the number of boundaries that are not above the number, or 0 for NaN.
  static int32_t Bucket(const Feature& feature, float number) {
    if (std::isnan(number)) return 0;
    const auto above = std::upper_bound(feature.boundaries.begin(), feature.boundaries.end(), number);
    return static_cast<int32_t>(above - feature.boundaries.begin()) + 1;
  }

  // Outputs the codes of the known values of each row.
  tensorflow::Status List(OpKernelContext* c, const KeyTable& table, const Feature& feature, const Tensor& value,
                          int64_t batch, int list) {
    const bool absent = value.NumElements() == 0;
    if (!absent && !(value.dims() == 2 && value.dim_size(0) == batch)) {
      return errors::InvalidArgument(feature.input, " has shape ", value.shape().DebugString(), ", expected [", batch,
                                     ", n], values for each text, or no elements if all are absent");
    }
    Tensor* splits;
    TF_RETURN_IF_ERROR(c->allocate_output(kFeatureLists + num_lists_ + list, {batch + 1}, &splits));
    int64_t* split = splits->flat<int64_t>().data();
    std::vector<int32_t> codes;
    split[0] = 0;
    const int64_t width = absent ? 0 : value.dim_size(1);
    for (int64_t row = 0; row < batch; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        const int32_t code = Code(table, feature, View(value.flat<tstring>()(row * width + i)));
        if (code > 0) codes.push_back(code);
      }
      split[row + 1] = static_cast<int64_t>(codes.size());
    }
    Tensor* out;
    TF_RETURN_IF_ERROR(c->allocate_output(kFeatureLists + list, {split[batch]}, &out));
    std::copy(codes.begin(), codes.end(), out->flat<tensorflow::int32>().data());
    return tensorflow::OkStatus();
  }

  std::vector<Feature> features_;
  int num_fixed_ = 0, num_lists_ = 0;
};

enum HistoryInput { kHistoryHandle = kHandle, kHistoryTexts, kHistoryIds, kHistoryTypes };
enum HistoryOutput {
  kHistoryRows,
  kHistorySplits,
  kHistoryTypeCodes,
  kHistoryTextValues,
  kHistoryTextSplits,
  kHistoryCodes,
  kHistoryLists  // then the values of all lists, then their splits
};

class ItemHistoryOp : public OpKernel {
 public:
  explicit ItemHistoryOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, reader_.Init(c));
    OP_REQUIRES_OK(c, c->GetAttr("num_lists", &num_lists_));
  }

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const ItemTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    OP_REQUIRES(c, table->features().lists.size() == static_cast<size_t>(num_lists_),
                errors::InvalidArgument("num_lists is ", num_lists_, ", expected ", table->features().lists.size()));
    OP_REQUIRES_OK(c, CheckRank(c->input(kHistoryTexts), 1, "texts", "[batch]"));
    const int64_t batch = c->input(kHistoryTexts).dim_size(0);
    KnownHistory history;
    OP_REQUIRES_OK(c, reader_.Read(batch, c->input(kHistoryIds), c->input(kHistoryTypes),
                                   [&](int64_t id) { return table->Find(id); }, &history));
    const auto& [rows, types, row_splits] = history;
    const auto count = static_cast<int64_t>(rows.size());
    Tensor *rows_tensor, *splits, *types_tensor;
    OP_REQUIRES_OK(c, c->allocate_output(kHistoryRows, {count}, &rows_tensor));
    OP_REQUIRES_OK(c, c->allocate_output(kHistorySplits, {batch + 1}, &splits));
    OP_REQUIRES_OK(c, c->allocate_output(kHistoryTypeCodes, {count}, &types_tensor));
    std::copy(rows.begin(), rows.end(), rows_tensor->flat<tensorflow::int32>().data());
    std::copy(row_splits.begin(), row_splits.end(), splits->flat<int64_t>().data());
    std::copy(types.begin(), types.end(), types_tensor->flat<tensorflow::int32>().data());
    tensorflow::Allocator* allocator = c->get_allocator(tensorflow::AllocatorAttributes());
    const Span<const int32_t> view(rows.data(), rows.size());
    SetTokens(c, table->text(), view, allocator, kHistoryTextValues, kHistoryTextSplits);
    c->set_output(kHistoryCodes, GatherCodesTensor(table->features(), view, allocator));
    for (int i = 0; i < num_lists_; ++i) {
      SetTokens(c, table->features().lists[static_cast<size_t>(i)], view, allocator, kHistoryLists + i,
                kHistoryLists + num_lists_ + i);
    }
  }

 private:
  static void SetTokens(OpKernelContext* c, const RaggedColumn& column, Span<const int32_t> rows,
                        tensorflow::Allocator* allocator, int values_output, int splits_output) {
    Tensor values, splits;
    GatherTokens(column, rows, allocator, &values, &splits);
    c->set_output(values_output, values);
    c->set_output(splits_output, splits);
  }

  HistoryReader reader_;
  int num_lists_;
};

enum QueriesInput { kQueriesTexts, kQueriesPast };
enum QueriesOutput { kQueriesOut, kQueriesSplits };

class PastQueriesOp : public OpKernel {
 public:
  explicit PastQueriesOp(OpKernelConstruction* c) : OpKernel(c) { OP_REQUIRES_OK(c, c->GetAttr("length", &length_)); }

  void Compute(OpKernelContext* c) override {
    OP_REQUIRES_OK(c, CheckRank(c->input(kQueriesTexts), 1, "texts", "[batch]"));
    const int64_t batch = c->input(kQueriesTexts).dim_size(0);
    const Tensor& past = c->input(kQueriesPast);
    OP_REQUIRES(c, past.NumElements() == 0 || (past.dims() == 2 && past.dim_size(0) == batch),
                errors::InvalidArgument("past_queries has shape ", past.shape().DebugString(), ", expected [", batch,
                                        ", n], the queries of each query's user, or no elements if all are absent"));
    const int64_t width = past.NumElements() == 0 ? 0 : past.dim_size(1);
    Tensor* splits;
    OP_REQUIRES_OK(c, c->allocate_output(kQueriesSplits, {batch + 1}, &splits));
    int64_t* split = splits->flat<int64_t>().data();
    std::vector<std::string_view> texts;
    split[0] = 0;
    for (int64_t user = 0; user < batch; ++user) {
      const size_t begin = texts.size();
      // Collects the last queries, from the newest on, and then reverses their order. Equal queries in a row count
      // once.
      for (int64_t i = width - 1; i >= 0 && texts.size() - begin < static_cast<size_t>(length_); --i) {
        const std::string_view text = Trimmed(View(past.flat<tstring>()(user * width + i)));
        if (!text.empty() && (texts.size() == begin || texts.back() != text)) texts.push_back(text);
      }
      std::reverse(texts.begin() + static_cast<int64_t>(begin), texts.end());
      split[user + 1] = static_cast<int64_t>(texts.size());
    }
    Tensor* out;
    OP_REQUIRES_OK(c, c->allocate_output(kQueriesOut, {split[batch]}, &out));
    for (size_t i = 0; i < texts.size(); ++i) {
      out->flat<tstring>()(static_cast<int64_t>(i)).assign(texts[i].data(), texts[i].size());
    }
  }

 private:
  int length_;
};

enum MapInput { kMapHandle = kHandle, kMapValues };

// Gives each element of the input what a key table has for it, in an output of the same shape.
template <typename Mapping>
class KeyTableMapOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* c) override {
    std::shared_ptr<const KeyTable> table;
    OP_REQUIRES_OK(c, LoadedTable(c, &table));
    const Tensor& values = c->input(kMapValues);
    Tensor* mapped;
    OP_REQUIRES_OK(c, c->allocate_output(0, values.shape(), &mapped));
    // Through void*: TensorFlow's own int64 may be another type of the same size.
    const auto* from = static_cast<const typename Mapping::From*>(values.data());
    auto* to = static_cast<typename Mapping::To*>(mapped->data());
    for (int64_t i = 0; i < values.NumElements(); ++i) Mapping::Map(*table, from[i], &to[i]);
  }
};

// An item id of the shop's own text id, or -1.
struct IdOfKey {
  using From = tstring;
  using To = int64_t;
  static void Map(const KeyTable& table, const tstring& key, int64_t* id) {
    const std::string_view text = Trimmed(View(key));
    const int32_t row = text.empty() ? -1 : table.Find(text);
    *id = row < 0 ? -1 : table.id(row);
  }
};

// The shop's own text id of an item id, or the empty text, which a new tensor holds.
struct KeyOfId {
  using From = int64_t;
  using To = tstring;
  static void Map(const KeyTable& table, int64_t id, tstring* key) {
    const int32_t row = id < 0 ? -1 : table.FindId(id);
    if (row < 0) return;
    const std::string_view text = table.key(row);
    key->assign(text.data(), text.size());
  }
};

class FileFingerprintOp : public OpKernel {
 public:
  explicit FileFingerprintOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("expected", &expected_));
  }

  void Compute(OpKernelContext* c) override {
    OP_REQUIRES_OK(c, CheckRank(c->input(0), 0, "filename", "a scalar"));
    const std::string path = c->input(0).scalar<tstring>()();
    std::string found;
    OP_REQUIRES_OK(c, ToTensorFlow(FileFingerprint(path, &found)));
    OP_REQUIRES(c, expected_.empty() || found == expected_,
                errors::FailedPrecondition(path, ": is not the file that this servable was exported with (fingerprint ",
                                           found, ", expected ", expected_,
                                           "); files of another model, index or tokenizer give wrong answers: export "
                                           "the model again"));
    Tensor* out;
    OP_REQUIRES_OK(c, c->allocate_output(0, {}, &out));
    out->scalar<tstring>()() = found;
  }

 private:
  std::string expected_;
};

// Checks that the texts have the shape [batch], and returns the dimension of row splits with one list for each text.
tensorflow::Status SplitsDim(InferenceContext* c, int texts_input, DimensionHandle* splits) {
  ShapeHandle texts;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(texts_input), 1, &texts));
  return c->Add(c->Dim(texts, 0), 1, splits);
}

DPSR_REGISTER_HANDLE("DpsrKeyTableHandle", "a key table");
DPSR_REGISTER_HANDLE("DpsrItemTableHandle", "an item table");

REGISTER_OP("DpsrKeyTableLoad")
    .Input("handle: resource")
    .Input("filename: string")
    .SetIsStateful()
    .SetShapeFn(LoadShapes)
    .Doc(R"doc(
Maps a key table (export/request_tables/key_table.h) into a handle. A damaged file is refused.
)doc");

REGISTER_OP("DpsrItemTableLoad")
    .Input("handle: resource")
    .Input("filename: string")
    .Attr("fixed: list(string) = []")
    .Attr("lists: list(string) = []")
    .SetIsStateful()
    .SetShapeFn(LoadShapes)
    .Doc(R"doc(
Maps items.dpsr (dpsr_tf/ops/item_table.h) into a handle. A file that is damaged or lacks a feature is refused.

fixed: Names of features of the kinds categorical and number.
lists: Names of features of the kinds multi and text.
)doc");

REGISTER_OP("DpsrFeatureCodes")
    .Input("handle: resource")
    .Input("texts: string")
    .Input("values: types")
    .Attr("types: list({string, float}) >= 1")
    .Attr("side: string")
    .Attr("names: list(string)")
    .Attr("lists: list(bool)")
    .Attr("boundaries: list(float) = []")
    .Attr("num_boundaries: list(int)")
    .Attr("num_lists: int >= 0 = 0")
    .Output("codes: int32")
    .Output("list_values: num_lists * int32")
    .Output("list_splits: num_lists * int64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle splits;
      TF_RETURN_IF_ERROR(SplitsDim(c, kFeatureTexts, &splits));
      std::vector<bool> lists;
      int num_lists;
      TF_RETURN_IF_ERROR(c->GetAttr("lists", &lists));
      TF_RETURN_IF_ERROR(c->GetAttr("num_lists", &num_lists));
      const int64_t fixed = static_cast<int64_t>(lists.size()) - num_lists;
      c->set_output(kFeatureCodes, c->Matrix(c->Dim(c->input(kFeatureTexts), 0), std::max(fixed, int64_t{0})));
      for (int i = 0; i < num_lists; ++i) {
        c->set_output(kFeatureLists + i, c->Vector(InferenceContext::kUnknownDim));
        c->set_output(kFeatureLists + num_lists + i, c->Vector(splits));
      }
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns the codes of feature values, as training has them. 0 is absent or unknown.

handle: A key table whose keys are "SIDE\0NAME\0VALUE", with their codes.
texts: [batch], the texts that the values belong to. Only their number counts.
values: For each feature strings [batch] (categorical), floats [batch] (number; NaN is absent), or strings [batch, n]
  (one of `lists`; "" is padding). A tensor without elements is absent for all texts.
side: "user" or "item".
lists: Whether each feature is of kind multi.
boundaries: Bucket boundaries of all features of kind number, one feature after the other. The code of a number is 1 +
  the number of boundaries that are not above it.
codes: [batch, features that are not lists].
)doc");

REGISTER_OP("DpsrItemHistory")
    .Input("handle: resource")
    .Input("texts: string")
    .Input("ids: int64")
    .Input("types: string")
    .Attr("length: int >= 1")
    .Attr("event_types: list(string)")
    .Attr("default_type: int >= 0")
    .Attr("num_lists: int >= 0 = 0")
    .Output("rows: int32")
    .Output("row_splits: int64")
    .Output("type_codes: int32")
    .Output("text_values: int32")
    .Output("text_splits: int64")
    .Output("codes: int32")
    .Output("list_values: num_lists * int32")
    .Output("list_splits: num_lists * int64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle splits;
      TF_RETURN_IF_ERROR(SplitsDim(c, kHistoryTexts, &splits));
      int num_lists;
      TF_RETURN_IF_ERROR(c->GetAttr("num_lists", &num_lists));
      const ShapeHandle unknown = c->Vector(InferenceContext::kUnknownDim);
      for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, unknown);
      c->set_output(kHistorySplits, c->Vector(splits));
      c->set_output(kHistoryCodes, c->Matrix(InferenceContext::kUnknownDim, InferenceContext::kUnknownDim));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns texts and features of the last known items of users, oldest first, as training has them.

texts: [batch], one for each user. Only their number counts.
ids: [batch, n] item ids, oldest first. -1 and unknown ids are left out. A tensor without elements means no history.
types: [batch, n] names of `event_types`, or "" for the default. A tensor without elements means the default for all.
length: The largest number of items of a user.
rows: [h] rows of the item table.
row_splits: [batch + 1], row splits of the users.
type_codes: [h] positions in event_types.
)doc");

REGISTER_OP("DpsrPastQueries")
    .Input("texts: string")
    .Input("past_queries: string")
    .Attr("length: int >= 1")
    .Output("queries: string")
    .Output("row_splits: int64")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle splits;
      TF_RETURN_IF_ERROR(SplitsDim(c, kQueriesTexts, &splits));
      c->set_output(kQueriesOut, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(kQueriesSplits, c->Vector(splits));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns the last queries of users, oldest first. Equal queries in a row count once.

texts: [batch], one for each user. Only their number counts.
past_queries: [batch, n], oldest first. "" is padding. A tensor without elements means no past queries.
length: The largest number of queries of a user.
row_splits: [batch + 1], row splits of the users.
)doc");

#define DPSR_REGISTER_KEY_TABLE_MAP(name, from, to, doc) \
  REGISTER_OP(name)                                      \
      .Input("handle: resource")                         \
      .Input(from)                                       \
      .Output(to)                                        \
      .SetIsStateful()                                   \
      .SetShapeFn([](InferenceContext* c) {              \
        c->set_output(0, c->input(kMapValues));          \
        return tensorflow::OkStatus();                   \
      })                                                 \
      .Doc(doc)
DPSR_REGISTER_KEY_TABLE_MAP("DpsrItemIdsOfKeys", "keys: string", "ids: int64",
                            "Returns the item ids of the shop's own text ids, in the same shape, or -1.");
DPSR_REGISTER_KEY_TABLE_MAP("DpsrItemKeysOfIds", "ids: int64", "keys: string",
                            "Returns the shop's own text ids of item ids, in the same shape, or empty texts.");
#undef DPSR_REGISTER_KEY_TABLE_MAP

REGISTER_OP("DpsrFileFingerprint")
    .Input("filename: string")
    .Attr("expected: string = ''")
    .Output("fingerprint: string")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &scalar));
      c->set_output(0, scalar);
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns the fingerprint of a file (export/request_tables/file_fingerprint.h).

expected: If this is not empty, another fingerprint is FailedPrecondition.
)doc");

#define DPSR_REGISTER(name, kernel) REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_CPU), kernel)
DPSR_REGISTER("DpsrKeyTableHandle", TableHandleOp<KeyTable>);
DPSR_REGISTER("DpsrItemTableHandle", TableHandleOp<ItemTable>);
DPSR_REGISTER("DpsrKeyTableLoad", KeyTableLoadOp);
DPSR_REGISTER("DpsrItemTableLoad", ItemTableLoadOp);
DPSR_REGISTER("DpsrFeatureCodes", FeatureCodesOp);
DPSR_REGISTER("DpsrItemHistory", ItemHistoryOp);
DPSR_REGISTER("DpsrPastQueries", PastQueriesOp);
DPSR_REGISTER("DpsrItemIdsOfKeys", KeyTableMapOp<IdOfKey>);
DPSR_REGISTER("DpsrItemKeysOfIds", KeyTableMapOp<KeyOfId>);
DPSR_REGISTER("DpsrFileFingerprint", FileFingerprintOp);
#undef DPSR_REGISTER

}  // namespace
}  // namespace dpsr
