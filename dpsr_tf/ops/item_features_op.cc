// Features of items by id, for the history that a caller sends at serving: the same table and the same gathers as those
// of the training dataset. The Python wrapper is dpsr_tf/data/item_table.py.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/item_table.h"
#include "dpsr_tf/ops/tf_columns.h"
#include "dpsr_tf/ops/tf_packed_file.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tokenizer_cc/tf_status.h"

namespace dpsr {
namespace {

namespace errors = ::tensorflow::errors;
using ::tensorflow::Tensor;
using ::tensorflow::tstring;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

enum Input { kItems, kIds };
enum Output { kRows, kTextValues, kTextSplits, kCodes, kLists };  // then values of all lists, then their splits

// num_lists = the number of names in `lists`; TensorFlow cannot count them for the outputs.
REGISTER_OP("DpsrItemFeatures")
    .Input("items: string")  // the path of items.dpsr
    .Input("ids: int64")     // [n]
    .Attr("text: bool = true")
    .Attr("fixed: list(string) = []")
    .Attr("lists: list(string) = []")
    .Attr("num_lists: int >= 0 = 0")
    .Output("rows: int32")           // [n], -1: unknown
    .Output("text_values: int32")    // [tokens]
    .Output("text_splits: int64")    // [n + 1], or [1] without text
    .Output("codes: int32")          // [n, fixed]
    .Output("list_values: num_lists * int32")
    .Output("list_splits: num_lists * int64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle path, ids;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kItems), 0, &path));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kIds), 1, &ids));
      bool text;
      int num_lists;
      std::vector<std::string> fixed;
      TF_RETURN_IF_ERROR(c->GetAttr("text", &text));
      TF_RETURN_IF_ERROR(c->GetAttr("fixed", &fixed));
      TF_RETURN_IF_ERROR(c->GetAttr("num_lists", &num_lists));
      tensorflow::shape_inference::DimensionHandle splits;
      TF_RETURN_IF_ERROR(c->Add(c->Dim(ids, 0), 1, &splits));
      c->set_output(kRows, ids);
      c->set_output(kTextValues, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(kTextSplits, text ? c->Vector(splits) : c->Vector(1));
      c->set_output(kCodes, c->Matrix(c->Dim(ids, 0), static_cast<int64_t>(fixed.size())));
      for (int i = 0; i < num_lists; ++i) {
        c->set_output(kLists + i, c->Vector(InferenceContext::kUnknownDim));
        c->set_output(kLists + num_lists + i, c->Vector(splits));
      }
      return tensorflow::OkStatus();
    });

// Maps the file when it first runs, and again when it is given another path. The pages are shared with whoever else has
// the file mapped.
class ItemFeaturesOp : public tensorflow::OpKernel {
 public:
  explicit ItemFeaturesOp(tensorflow::OpKernelConstruction* c) : OpKernel(c) {
    int num_lists;
    OP_REQUIRES_OK(c, c->GetAttr("text", &text_));
    OP_REQUIRES_OK(c, c->GetAttr("fixed", &names_.fixed));
    OP_REQUIRES_OK(c, c->GetAttr("lists", &names_.lists));
    OP_REQUIRES_OK(c, c->GetAttr("num_lists", &num_lists));
    OP_REQUIRES(c, static_cast<size_t>(num_lists) == names_.lists.size(),
                errors::InvalidArgument("num_lists is ", num_lists, ", expected the number of names in lists, ",
                                        names_.lists.size()));
  }

  void Compute(tensorflow::OpKernelContext* c) override {
    const Tensor& path = c->input(kItems);
    const Tensor& ids = c->input(kIds);
    OP_REQUIRES(c, tensorflow::TensorShapeUtils::IsScalar(path.shape()),
                errors::InvalidArgument("items has shape ", path.shape().DebugString(), ", expected a scalar"));
    OP_REQUIRES(c, tensorflow::TensorShapeUtils::IsVector(ids.shape()),
                errors::InvalidArgument("ids has shape ", ids.shape().DebugString(), ", expected [n]"));
    std::shared_ptr<const ItemTable> table;
    OP_REQUIRES_OK(c, ToTensorFlow(Open(path.scalar<tstring>()(), &table)));

    const size_t n = static_cast<size_t>(ids.NumElements());
    Tensor* rows_tensor;
    OP_REQUIRES_OK(c, c->allocate_output(kRows, ids.shape(), &rows_tensor));
    int32_t* rows = rows_tensor->flat<tensorflow::int32>().data();
    const int64_t* id = ids.flat<int64_t>().data();
    for (size_t i = 0; i < n; ++i) rows[i] = table->Find(id[i]);
    const Span<const int32_t> view(rows, n);

    tensorflow::Allocator* allocator = c->get_allocator(tensorflow::AllocatorAttributes());
    const int num_lists = static_cast<int>(names_.lists.size());
    SetTokens(c, table->text(), text_ ? view : Span<const int32_t>(), allocator, kTextValues, kTextSplits);
    c->set_output(kCodes, GatherCodesTensor(table->features(), view, allocator));
    for (int i = 0; i < num_lists; ++i) {
      SetTokens(c, table->features().lists[i], view, allocator, kLists + i, kLists + num_lists + i);
    }
  }

 private:
  static void SetTokens(tensorflow::OpKernelContext* c, const RaggedColumn& column, Span<const int32_t> rows,
                        tensorflow::Allocator* allocator, int values_output, int splits_output) {
    Tensor values, splits;
    GatherTokens(column, rows, allocator, &values, &splits);
    c->set_output(values_output, values);
    c->set_output(splits_output, splits);
  }

  Status Open(const std::string& path, std::shared_ptr<const ItemTable>* table) {
    tensorflow::mutex_lock lock(mu_);
    if (table_ == nullptr || table_->file().path() != path) {
      std::unique_ptr<PackedFile> file;
      std::unique_ptr<ItemTable> opened;
      DPSR_RETURN_IF_ERROR(OpenPackedFile(path, "items", &file));
      DPSR_RETURN_IF_ERROR(ItemTable::Open(std::move(file), names_, /*with_ids=*/true, &opened));
      table_ = std::move(opened);
    }
    *table = table_;
    return Status();
  }

  bool text_;
  FeatureNames names_;
  tensorflow::mutex mu_;
  std::shared_ptr<const ItemTable> table_ TF_GUARDED_BY(mu_);
};

REGISTER_KERNEL_BUILDER(Name("DpsrItemFeatures").Device(tensorflow::DEVICE_CPU), ItemFeaturesOp);

}  // namespace
}  // namespace dpsr
