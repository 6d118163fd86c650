// The op of propagation over a whole graph: a thin adapter of propagation.h.

#include "dpsr_tf/ops/propagation.h"

#include "common/tf_op.h"

namespace dpsr {
namespace {

REGISTER_OP("DpsrPropagate")
    .Input("x: float")           // [n, dim]
    .Input("row_splits: int64")  // [n + 1]
    .Input("columns: int32")     // [values]
    .Input("weights: float")     // [values]
    .Output("y: float")          // [n, dim]
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x, columns, unused;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &x));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &unused));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &columns));
      TF_RETURN_IF_ERROR(c->Merge(c->input(3), columns, &unused));
      c->set_output(0, x);
      return tensorflow::OkStatus();
    });

class PropagateOp : public OpKernel {
 public:
  explicit PropagateOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor &x = context->input(0), &row_splits = context->input(1), &columns = context->input(2),
                 &weights = context->input(3);
    OP_REQUIRES(context, x.dims() == 2,
                errors::InvalidArgument("x has shape ", x.shape().DebugString(), ", expected [n, dim]"));
    const int64_t n = x.dim_size(0), dim = x.dim_size(1), count = columns.NumElements();
    OP_REQUIRES_OK(context, CheckShape("row_splits", row_splits.shape(), TensorShape({n + 1})));
    OP_REQUIRES_OK(context, CheckShape("columns", columns.shape(), TensorShape({count})));
    OP_REQUIRES_OK(context, CheckShape("weights", weights.shape(), TensorShape({count})));
    const SparseRows matrix{row_splits.flat<int64_t>().data(), columns.flat<int32>().data(),
                            weights.flat<float>().data()};
    bool fits = matrix.row_splits[0] == 0 && matrix.row_splits[n] == count;
    for (int64_t i = 0; i < n; ++i) fits &= matrix.row_splits[i] <= matrix.row_splits[i + 1];
    OP_REQUIRES(context, fits,
                errors::InvalidArgument("row_splits do not rise from 0 to ", count, ", the number of columns"));
    for (int64_t e = 0; e < count; ++e) {
      OP_REQUIRES(context, matrix.columns[e] >= 0 && matrix.columns[e] < n,
                  errors::InvalidArgument("columns[", e, "] is ", matrix.columns[e], ", expected 0 to ", n - 1));
    }
    Tensor* y;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    const float* from = x.flat<float>().data();
    float* to = y->flat<float>().data();
    const int64_t cost = n == 0 ? 1 : 1 + count * dim / n;
    context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
        n, cost, [&](int64_t begin, int64_t end) { PropagateRows(matrix, from, begin, end, dim, to); });
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrPropagate").Device(DEVICE_CPU), PropagateOp);

}  // namespace
}  // namespace dpsr
