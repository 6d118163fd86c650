// The ops of attention over neighbours: thin adapters of attention.h.

#include "dpsr_tf/ops/attention.h"

#include "common/tf_op.h"

namespace dpsr {
namespace {

// Checks [n, dim], [m, dim], the places of the neighbours and their row splits, as Attend needs them.
tensorflow::Status CheckInputs(const Tensor& wanted, const Tensor& messages, const Tensor& near,
                               const Tensor& row_splits) {
  if (wanted.dims() != 2 || messages.dims() != 2 || wanted.dim_size(1) != messages.dim_size(1)) {
    return errors::InvalidArgument("wanted has shape ", wanted.shape().DebugString(), " and messages ",
                                   messages.shape().DebugString(), ", expected [n, dim] and [m, dim]");
  }
  if (near.dims() != 1) {
    return errors::InvalidArgument("near has shape ", near.shape().DebugString(), ", expected [neighbours]");
  }
  TF_RETURN_IF_ERROR(CheckShape("row_splits", row_splits.shape(), TensorShape({wanted.dim_size(0) + 1})));
  const int64_t n = wanted.dim_size(0), m = messages.dim_size(0), count = near.dim_size(0);
  const int64_t* splits = row_splits.flat<int64_t>().data();
  bool fits = splits[0] == 0 && splits[n] == count;
  for (int64_t i = 0; i < n; ++i) fits &= splits[i] <= splits[i + 1];
  if (!fits) return errors::InvalidArgument("row_splits do not rise from 0 to ", count, ", the number of neighbours");
  const int32_t* places = near.flat<int32>().data();
  for (int64_t e = 0; e < count; ++e) {
    if (places[e] < 0 || places[e] >= m) {
      return errors::InvalidArgument("near[", e, "] is ", places[e], ", expected 0 to ", m - 1);
    }
  }
  return tensorflow::OkStatus();
}

NearRows RowsOf(const Tensor& near, const Tensor& row_splits) {
  return {near.flat<int32>().data(), row_splits.flat<int64_t>().data(), row_splits.dim_size(0) - 1};
}

REGISTER_OP("DpsrAttend")
    .Input("wanted: float")      // [n, dim]
    .Input("messages: float")    // [m, dim]
    .Input("near: int32")        // [neighbours of all rows]
    .Input("row_splits: int64")  // [n + 1]
    .Attr("scale: float")
    .Output("y: float")          // [n, dim]
    .Output("weights: float")    // [neighbours of all rows]
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle wanted, messages, near, splits;
      DimensionHandle dim;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &wanted));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &messages));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &near));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 1, &splits));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(wanted, 1), c->Dim(messages, 1), &dim));
      c->set_output(0, c->Matrix(c->Dim(wanted, 0), dim));
      c->set_output(1, near);
      return tensorflow::OkStatus();
    });

class AttendOp : public OpKernel {
 public:
  explicit AttendOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("scale", &scale_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &wanted = context->input(0), &messages = context->input(1), &near = context->input(2),
                 &row_splits = context->input(3);
    OP_REQUIRES_OK(context, CheckInputs(wanted, messages, near, row_splits));
    Tensor *y, *weights;
    OP_REQUIRES_OK(context, context->allocate_output(0, wanted.shape(), &y));
    OP_REQUIRES_OK(context, context->allocate_output(1, near.shape(), &weights));
    Attend(wanted.flat<float>().data(), messages.flat<float>().data(), RowsOf(near, row_splits), wanted.dim_size(1),
           scale_, y->flat<float>().data(), weights->flat<float>().data());
  }

 private:
  float scale_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrAttend").Device(DEVICE_CPU), AttendOp);

REGISTER_OP("DpsrAttendGradient")
    .Input("upstream: float")  // of y
    .Input("wanted: float")
    .Input("messages: float")
    .Input("near: int32")
    .Input("row_splits: int64")
    .Input("weights: float")
    .Attr("scale: float")
    .Output("of_wanted: float")
    .Output("of_messages: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle wanted, messages;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &wanted));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 2, &messages));
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), wanted, &wanted));
      c->set_output(0, wanted);
      c->set_output(1, messages);
      return tensorflow::OkStatus();
    });

class AttendGradientOp : public OpKernel {
 public:
  explicit AttendGradientOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("scale", &scale_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &upstream = context->input(0), &wanted = context->input(1), &messages = context->input(2),
                 &near = context->input(3), &row_splits = context->input(4), &weights = context->input(5);
    OP_REQUIRES_OK(context, CheckInputs(wanted, messages, near, row_splits));
    OP_REQUIRES_OK(context, CheckShape("upstream", upstream.shape(), wanted.shape()));
    OP_REQUIRES_OK(context, CheckShape("weights", weights.shape(), near.shape()));
    Tensor *of_wanted, *of_messages;
    OP_REQUIRES_OK(context, context->allocate_output(0, wanted.shape(), &of_wanted));
    OP_REQUIRES_OK(context, context->allocate_output(1, messages.shape(), &of_messages));
    AttendGradient(upstream.flat<float>().data(), wanted.flat<float>().data(), messages.flat<float>().data(),
                   RowsOf(near, row_splits), weights.flat<float>().data(), messages.dim_size(0), wanted.dim_size(1),
                   scale_, of_wanted->flat<float>().data(), of_messages->flat<float>().data());
  }

 private:
  float scale_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrAttendGradient").Device(DEVICE_CPU), AttendGradientOp);

}  // namespace
}  // namespace dpsr
