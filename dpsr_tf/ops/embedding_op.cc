// The ops of embedding tables: thin adapters of embedding.h. Table and accumulator are ordinary resource variables.
//
// Locks. An update, a sum and a snapshot each take the mutexes of the variables that they use, in the order of their
// addresses. Sums and updates take them shared, so that the steps of several workers run at the same time and wait for
// each other at the locks of rows only. A snapshot takes them exclusively. So the update of a row is atomic, and a
// snapshot holds each update completely, in table and accumulator, or not at all. If all ops of a table are
// `exclusive`, its updates take the mutexes exclusively and no row is locked, which is faster if there is one step at a
// time anyway.

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/tf_op.h"
#include "dpsr_tf/ops/embedding.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor_util.h"

namespace dpsr {
namespace {

using ::tensorflow::Var;
using ::tensorflow::core::RefCountPtr;

// Returns the shape of a variable by its handle; unknown if the handle does not tell it.
ShapeHandle VariableShape(InferenceContext* c, int input) {
  const auto* handle = c->input_handle_shapes_and_types(input);
  return handle == nullptr || handle->empty() ? c->UnknownShape() : (*handle)[0].shape;
}

// Checks that the handles `input` and `input + 1`, table and accumulator, have the same shape [rows, dim].
tensorflow::Status PairShape(InferenceContext* c, int input, ShapeHandle* shape) {
  ShapeHandle handle;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 0, &handle));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(input + 1), 0, &handle));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, input), 2, shape));
  return c->Merge(*shape, VariableShape(c, input + 1), shape);
}

tensorflow::Status CheckVector(const char* name, const Tensor& tensor) {
  if (tensor.dims() == 1) return tensorflow::OkStatus();
  return errors::InvalidArgument(name, " has shape ", tensor.shape().DebugString(), ", expected [n]");
}

tensorflow::Status CheckTable(const char* name, const Var& variable, int64_t dim) {
  const Tensor& tensor = *const_cast<Var&>(variable).tensor();
  if (!variable.is_initialized) return errors::FailedPrecondition("the ", name, " is not initialized");
  if (tensor.dtype() != tensorflow::DT_FLOAT || tensor.dims() != 2 || (dim >= 0 && tensor.dim_size(1) != dim)) {
    return errors::InvalidArgument("the ", name, " is ", tensorflow::DataTypeString(tensor.dtype()), " ",
                                   tensor.shape().DebugString(), ", expected float [rows, ",
                                   dim < 0 ? "dim" : std::to_string(dim), "]");
  }
  return tensorflow::OkStatus();
}

// Holds the mutexes of one or two variables, in the order of their addresses.
template <typename Lock>
class VariableLocks {
 public:
  explicit VariableLocks(Var* a, Var* b = nullptr) {
    if (b != nullptr && b->mu() < a->mu()) std::swap(a, b);
    first_.emplace(*a->mu());
    if (b != nullptr && b != a) second_.emplace(*b->mu());
  }

 private:
  std::optional<Lock> first_, second_;
};

// A smaller table needs no huge pages: the CPU caches the addresses of all its pages.
constexpr int64_t kLeastHugeTable = 4 << 20;

// Puts a variable into TensorFlow's "copy on read" mode, which it then keeps: sparse access in place needs a tensor
// that no dense read shares. Must be called before the variable's mutex is taken.
void UseSparsely(Var* variable) {
  if (variable->copy_on_read_mode.load()) return;
  const tensorflow::mutex_lock lock(*variable->mu());
  if (variable->copy_on_read_mode.load() || !variable->is_initialized) return;
  if (!variable->tensor()->RefCountIsOne()) *variable->tensor() = tensorflow::tensor::DeepCopy(*variable->tensor());
  const int64_t bytes = variable->tensor()->TotalBytes();
  if (bytes >= kLeastHugeTable) UseHugePages(variable->tensor()->data(), bytes);
  variable->copy_on_read_mode.store(true);
}

tensorflow::Status Find(OpKernelContext* context, int input, RefCountPtr<Var>* variable) {
  TF_RETURN_IF_ERROR(LookupResource(context, HandleFromInput(context, input), variable));
  UseSparsely(variable->get());
  return tensorflow::OkStatus();
}

tensorflow::Status Parse(const Tensor& packed, int64_t num_rows, PackedTokens* tokens) {
  TF_RETURN_IF_ERROR(CheckVector("packed", packed));
  return ToTensorFlow(PackedTokens::Parse(packed.flat<int32>().data(), packed.NumElements(), num_rows, tokens));
}

REGISTER_OP("DpsrPackTokens")
    .Input("values: num_lists * int32")
    .Input("row_splits: num_lists * int64")
    .Input("weights: num_weights * float")
    .Output("packed: num_shards * int32")
    .Attr("num_lists: int >= 1")
    .Attr("num_weights: int >= 0")
    .Attr("num_shards: int >= 1")
    .Attr("first_rows: list(int) >= 2")
    .Attr("shards: list(int) = []")
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < c->num_inputs(); ++i) {
        ShapeHandle vector;
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &vector));
      }
      for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->Vector(c->UnknownDim()));
      return tensorflow::OkStatus();
    });

class PackTokensOp : public OpKernel {
 public:
  explicit PackTokensOp(OpKernelConstruction* context) : OpKernel(context) {
    int num_shards, num_lists, num_weights;
    std::vector<int64_t> first_rows, shards;
    OP_REQUIRES_OK(context, context->GetAttr("first_rows", &first_rows));
    OP_REQUIRES_OK(context, context->GetAttr("shards", &shards));
    OP_REQUIRES_OK(context, context->GetAttr("num_shards", &num_shards));
    OP_REQUIRES_OK(context, context->GetAttr("num_lists", &num_lists));
    OP_REQUIRES_OK(context, context->GetAttr("num_weights", &num_weights));
    OP_REQUIRES_OK(context, ToTensorFlow(RowRanges::Make(first_rows, shards, num_shards, &ranges_)));
    OP_REQUIRES(context, num_weights == 0 || num_weights == num_lists,
                errors::InvalidArgument(num_weights, " weights for ", num_lists, " lists, expected as many or none"));
  }

  void Compute(OpKernelContext* context) override {
    OpInputList values, row_splits, weights;
    OpOutputList packed;
    OP_REQUIRES_OK(context, context->input_list("values", &values));
    OP_REQUIRES_OK(context, context->input_list("row_splits", &row_splits));
    OP_REQUIRES_OK(context, context->input_list("weights", &weights));
    OP_REQUIRES_OK(context, context->output_list("packed", &packed));
    std::vector<TokenLists> lists;
    for (int i = 0; i < values.size(); ++i) {
      OP_REQUIRES_OK(context, CheckVector("values", values[i]));
      OP_REQUIRES_OK(context, CheckVector("row_splits", row_splits[i]));
      OP_REQUIRES(context, row_splits[i].NumElements() > 0,
                  errors::InvalidArgument("row_splits is empty, expected [texts + 1]"));
      const float* weight = nullptr;
      if (weights.size() > 0) {
        OP_REQUIRES_OK(context, CheckShape("weights", weights[i].shape(), values[i].shape()));
        weight = weights[i].flat<float>().data();
      }
      lists.push_back({values[i].flat<int32>().data(), values[i].NumElements(), row_splits[i].flat<int64_t>().data(),
                       row_splits[i].NumElements() - 1, weight});
    }
    tensorflow::Status allocated;
    std::vector<int32> nowhere;
    OP_REQUIRES_OK(context, ToTensorFlow(PackTokens(lists, ranges_, [&](int shard, int64_t size) -> int32* {
                     Tensor* tensor = nullptr;
                     allocated.Update(packed.allocate(shard, TensorShape({size}), &tensor));
                     if (tensor != nullptr) return tensor->flat<int32>().data();
                     nowhere.resize(std::max<size_t>(nowhere.size(), size));
                     return nowhere.data();
                   })));
    OP_REQUIRES_OK(context, allocated);
  }

 private:
  RowRanges ranges_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrPackTokens").Device(DEVICE_CPU), PackTokensOp);

REGISTER_OP("DpsrEmbeddingBag")
    .Input("table: resource")
    .Input("packed: int32")
    .Output("pooled: float")
    .Attr("dim: int >= 1")
    .Attr("exclusive: bool = false")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle shape;
      DimensionHandle dim;
      int expected;
      TF_RETURN_IF_ERROR(c->GetAttr("dim", &expected));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &shape));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &shape));
      TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 0), 2, &shape));
      TF_RETURN_IF_ERROR(c->WithValue(c->Dim(shape, 1), expected, &dim));
      c->set_output(0, c->Matrix(c->UnknownDim(), dim));
      return tensorflow::OkStatus();
    });

class EmbeddingBagOp : public OpKernel {
 public:
  explicit EmbeddingBagOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("dim", &dim_));
    OP_REQUIRES_OK(context, context->GetAttr("exclusive", &exclusive_));
  }

  void Compute(OpKernelContext* context) override {
    enum Input { kTable, kPacked };
    RefCountPtr<Var> table;
    OP_REQUIRES_OK(context, Find(context, kTable, &table));
    const VariableLocks<tensorflow::tf_shared_lock> lock(table.get());
    OP_REQUIRES_OK(context, CheckTable("table", *table, dim_));
    const Tensor& rows = *table->tensor();
    PackedTokens tokens;
    OP_REQUIRES_OK(context, Parse(context->input(kPacked), rows.dim_size(0), &tokens));
    Tensor* pooled;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({tokens.num_texts(), dim_}), &pooled));
    SumRows(rows.flat<float>().data(), dim_, tokens, exclusive_ ? nullptr : RowLocks::OfProcess(),
            pooled->flat<float>().data());
  }

 private:
  int64_t dim_;
  bool exclusive_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrEmbeddingBag").Device(DEVICE_CPU), EmbeddingBagOp);

REGISTER_OP("DpsrEmbeddingAdagrad")
    .Input("table: resource")
    .Input("accumulator: resource")
    .Input("learning_rate: float")
    .Input("packed: num_bags * int32")
    .Input("gradient: num_bags * float")
    .Attr("num_bags: int >= 1")
    .Attr("exclusive: bool = false")
    .Attr("decay: float = 1.0")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle shape, input;
      DimensionHandle dim;
      TF_RETURN_IF_ERROR(PairShape(c, 0, &shape));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 0, &input));
      const int num_bags = (c->num_inputs() - 3) / 2;
      for (int i = 0; i < num_bags; ++i) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(3 + i), 1, &input));
        TF_RETURN_IF_ERROR(c->WithRank(c->input(3 + num_bags + i), 2, &input));
        TF_RETURN_IF_ERROR(c->Merge(c->Dim(input, 1), c->Dim(shape, 1), &dim));
      }
      return tensorflow::OkStatus();
    });

class EmbeddingAdagradOp : public OpKernel {
 public:
  explicit EmbeddingAdagradOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("exclusive", &exclusive_));
    OP_REQUIRES_OK(context, context->GetAttr("decay", &decay_));
    OP_REQUIRES(context, decay_ > 0 && decay_ <= 1,
                tensorflow::errors::InvalidArgument("decay is ", decay_, ", expected above 0 and at most 1"));
  }

  void Compute(OpKernelContext* context) override {
    RefCountPtr<Var> table, accumulator;
    OP_REQUIRES_OK(context, Find(context, kTable, &table));
    OP_REQUIRES_OK(context, Find(context, kAccumulator, &accumulator));
    OpInputList packed, gradient;
    OP_REQUIRES_OK(context, context->input_list("packed", &packed));
    OP_REQUIRES_OK(context, context->input_list("gradient", &gradient));
    OP_REQUIRES_OK(context, CheckShape("learning_rate", context->input(kLearningRate).shape(), TensorShape({})));
    if (exclusive_) {
      const VariableLocks<tensorflow::mutex_lock> lock(table.get(), accumulator.get());
      Apply(context, table.get(), accumulator.get(), packed, gradient, nullptr);
    } else {
      const VariableLocks<tensorflow::tf_shared_lock> lock(table.get(), accumulator.get());
      Apply(context, table.get(), accumulator.get(), packed, gradient, RowLocks::OfProcess());
    }
  }

 private:
  enum Input { kTable, kAccumulator, kLearningRate };

  // The caller holds the mutexes of both variables.
  void Apply(OpKernelContext* context, Var* table, Var* accumulator, const OpInputList& packed,
             const OpInputList& gradient, RowLocks* locks) const {
    OP_REQUIRES_OK(context, CheckTable("table", *table, -1));
    OP_REQUIRES_OK(context, CheckTable("accumulator", *accumulator, -1));
    OP_REQUIRES_OK(context, CheckShape("accumulator", accumulator->tensor()->shape(), table->tensor()->shape()));
    const int64_t num_rows = table->tensor()->dim_size(0), dim = table->tensor()->dim_size(1);
    // Everything is checked before anything is changed.
    std::vector<PooledGradient> gradients(packed.size());
    for (int i = 0; i < packed.size(); ++i) {
      OP_REQUIRES_OK(context, Parse(packed[i], num_rows, &gradients[i].tokens));
      OP_REQUIRES_OK(context, CheckShape("gradient", gradient[i].shape(),
                                         TensorShape({gradients[i].tokens.num_texts(), dim})));
      gradients[i].gradient = gradient[i].flat<float>().data();
    }
    ApplyAdagrad(gradients, context->input(kLearningRate).scalar<float>()(), num_rows, dim, locks,
                 table->tensor()->flat<float>().data(), accumulator->tensor()->flat<float>().data(), decay_);
  }

  bool exclusive_;
  float decay_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrEmbeddingAdagrad").Device(DEVICE_CPU), EmbeddingAdagradOp);

// AdaGrad of all dense variables in one op. With small batches, running TensorFlow's op for each variable takes more
// time than the arithmetic.
REGISTER_OP("DpsrDenseAdagrad")
    .Input("variables: n * resource")
    .Input("accumulators: n * resource")
    .Input("gradients: n * float")
    .Input("learning_rate: float")
    .Attr("n: int >= 1")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      const int n = (c->num_inputs() - 1) / 3;
      ShapeHandle shape;
      for (int i = 0; i < n; ++i) {
        TF_RETURN_IF_ERROR(c->Merge(VariableShape(c, i), VariableShape(c, n + i), &shape));
        TF_RETURN_IF_ERROR(c->Merge(shape, c->input(2 * n + i), &shape));
      }
      return c->WithRank(c->input(3 * n), 0, &shape);
    });

class DenseAdagradOp : public OpKernel {
 public:
  explicit DenseAdagradOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const int n = (context->num_inputs() - 1) / 3;
    const Tensor& learning_rate = context->input(3 * n);
    OP_REQUIRES_OK(context, CheckShape("learning_rate", learning_rate.shape(), TensorShape({})));
    for (int i = 0; i < n; ++i) {
      RefCountPtr<Var> variable, accumulator;
      OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, i), &variable));
      OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, n + i), &accumulator));
      const VariableLocks<tensorflow::mutex_lock> lock(variable.get(), accumulator.get());
      const Tensor& gradient = context->input(2 * n + i);
      for (Var* each : {variable.get(), accumulator.get()}) {
        OP_REQUIRES(context, each->is_initialized, errors::FailedPrecondition("variable ", i, " is not initialized"));
        OP_REQUIRES_OK(context, CheckShape("gradient", gradient.shape(), each->tensor()->shape()));
        OP_REQUIRES(context, each->tensor()->dtype() == tensorflow::DT_FLOAT,
                    errors::InvalidArgument("variable ", i, " is ", tensorflow::DataTypeString(each->tensor()->dtype()),
                                            ", expected float"));
        // A tensor from an earlier read that is still in use keeps its values.
        if (!each->tensor()->RefCountIsOne()) *each->tensor() = tensorflow::tensor::DeepCopy(*each->tensor());
      }
      ApplyDenseAdagrad(gradient.flat<float>().data(), gradient.NumElements(), learning_rate.scalar<float>()(),
                        variable->tensor()->flat<float>().data(), accumulator->tensor()->flat<float>().data());
    }
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrDenseAdagrad").Device(DEVICE_CPU), DenseAdagradOp);

REGISTER_OP("DpsrEmbeddingSnapshot")
    .Input("table: resource")
    .Input("accumulator: resource")
    .Output("table_copy: float")
    .Output("accumulator_copy: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle shape;
      TF_RETURN_IF_ERROR(PairShape(c, 0, &shape));
      c->set_output(0, shape);
      c->set_output(1, shape);
      return tensorflow::OkStatus();
    });

class EmbeddingSnapshotOp : public OpKernel {
 public:
  explicit EmbeddingSnapshotOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    RefCountPtr<Var> pair[2];
    for (int i = 0; i < 2; ++i) OP_REQUIRES_OK(context, Find(context, i, &pair[i]));
    const VariableLocks<tensorflow::mutex_lock> lock(pair[0].get(), pair[1].get());
    for (int i = 0; i < 2; ++i) {
      OP_REQUIRES_OK(context, CheckTable(i == 0 ? "table" : "accumulator", *pair[i], -1));
      const Tensor& tensor = *pair[i]->tensor();
      Tensor* copy;
      OP_REQUIRES_OK(context, context->allocate_output(i, tensor.shape(), &copy));
      const auto bytes = tensor.tensor_data();
      std::memcpy(copy->data(), bytes.data(), bytes.size());
    }
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrEmbeddingSnapshot").Device(DEVICE_CPU), EmbeddingSnapshotOp);

}  // namespace
}  // namespace dpsr
