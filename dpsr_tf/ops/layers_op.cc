// The ops of the layers of a tower: thin adapters of layers.h.

#include "dpsr_tf/ops/layers.h"

#include "common/tf_op.h"

namespace dpsr {
namespace {

REGISTER_OP("DpsrAddBias")
    .Input("x: float")
    .Input("bias: float")
    .Output("y: float")
    .Attr("relu: bool")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x, bias;
      DimensionHandle width;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &x));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &bias));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(x, 1), c->Dim(bias, 0), &width));
      c->set_output(0, c->Matrix(c->Dim(x, 0), width));
      return tensorflow::OkStatus();
    });

class AddBiasOp : public OpKernel {
 public:
  explicit AddBiasOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &x = context->input(0), &bias = context->input(1);
    OP_REQUIRES(context, x.dims() == 2,
                errors::InvalidArgument("x has shape ", x.shape().DebugString(), ", expected [n, width]"));
    OP_REQUIRES_OK(context, CheckShape("bias", bias.shape(), TensorShape({x.dim_size(1)})));
    Tensor* y;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, x.shape(), &y));
    AddBias(x.flat<float>().data(), bias.flat<float>().data(), x.dim_size(0), x.dim_size(1), relu_,
            y->flat<float>().data());
  }

 private:
  bool relu_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrAddBias").Device(DEVICE_CPU), AddBiasOp);

REGISTER_OP("DpsrAddBiasGradient")
    .Input("upstream: float")
    .Input("y: float")
    .Output("of_x: float")
    .Output("of_bias: float")
    .Attr("relu: bool")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle y;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &y));
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), y, &y));
      c->set_output(0, y);
      c->set_output(1, c->Vector(c->Dim(y, 1)));
      return tensorflow::OkStatus();
    });

class AddBiasGradientOp : public OpKernel {
 public:
  explicit AddBiasGradientOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &upstream = context->input(0), &y = context->input(1);
    OP_REQUIRES(context, y.dims() == 2,
                errors::InvalidArgument("y has shape ", y.shape().DebugString(), ", expected [n, width]"));
    OP_REQUIRES_OK(context, CheckShape("upstream", upstream.shape(), y.shape()));
    Tensor *of_x = nullptr, *of_bias;
    if (relu_) {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, y.shape(), &of_x));
    } else {
      context->set_output(0, upstream);
    }
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({y.dim_size(1)}), &of_bias));
    AddBiasGradient(upstream.flat<float>().data(), y.flat<float>().data(), y.dim_size(0), y.dim_size(1), relu_,
                    relu_ ? of_x->flat<float>().data() : nullptr, of_bias->flat<float>().data());
  }

 private:
  bool relu_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrAddBiasGradient").Device(DEVICE_CPU), AddBiasGradientOp);

REGISTER_OP("DpsrUnitVectors")
    .Input("x: float")
    .Input("row_splits: int64")
    .Output("y: float")
    .Output("scales: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x, splits;
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 2, &x));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &splits));
      c->set_output(0, x);
      c->set_output(1, c->Vector(c->UnknownDim()));
      return tensorflow::OkStatus();
    });

class UnitVectorsOp : public OpKernel {
 public:
  explicit UnitVectorsOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor &x = context->input(0), &row_splits = context->input(1);
    OP_REQUIRES(context, x.dims() >= 2,
                errors::InvalidArgument("x has shape ", x.shape().DebugString(), ", expected [texts, ..., dim]"));
    const int64_t texts = x.dim_size(0), dim = x.dim_size(x.dims() - 1);
    OP_REQUIRES_OK(context, CheckShape("row_splits", row_splits.shape(), TensorShape({texts + 1})));
    int64_t per_text = 1;
    for (int i = 1; i < x.dims() - 1; ++i) per_text *= x.dim_size(i);
    Tensor *y, *scales;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({texts * per_text}), &scales));
    UnitVectors(x.flat<float>().data(), row_splits.flat<int64_t>().data(), texts, per_text, dim,
                y->flat<float>().data(), scales->flat<float>().data());
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrUnitVectors").Device(DEVICE_CPU), UnitVectorsOp);

REGISTER_OP("DpsrUnitVectorsGradient")
    .Input("upstream: float")
    .Input("y: float")
    .Input("scales: float")
    .Output("of_x: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle y, scales;
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(1), 2, &y));
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), y, &y));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &scales));
      c->set_output(0, y);
      return tensorflow::OkStatus();
    });

class UnitVectorsGradientOp : public OpKernel {
 public:
  explicit UnitVectorsGradientOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor &upstream = context->input(0), &y = context->input(1), &scales = context->input(2);
    OP_REQUIRES(context, y.dims() >= 2,
                errors::InvalidArgument("y has shape ", y.shape().DebugString(), ", expected [texts, ..., dim]"));
    OP_REQUIRES_OK(context, CheckShape("upstream", upstream.shape(), y.shape()));
    int64_t n = 1;
    for (int i = 0; i < y.dims() - 1; ++i) n *= y.dim_size(i);
    OP_REQUIRES_OK(context, CheckShape("scales", scales.shape(), TensorShape({n})));
    Tensor* of_x;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, y.shape(), &of_x));
    UnitVectorsGradient(upstream.flat<float>().data(), y.flat<float>().data(), scales.flat<float>().data(), n,
                        y.dim_size(y.dims() - 1), of_x->flat<float>().data());
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrUnitVectorsGradient").Device(DEVICE_CPU), UnitVectorsGradientOp);

}  // namespace
}  // namespace dpsr
