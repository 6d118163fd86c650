// The ops of the hinge loss: thin adapters of hinge_loss.h.

#include "dpsr_tf/ops/hinge_loss.h"

#include "common/tf_op.h"

namespace dpsr {
namespace {

tensorflow::Status MixingRatio(OpKernelConstruction* context, float* ratio) {
  TF_RETURN_IF_ERROR(context->GetAttr("mixing_ratio", ratio));
  if (*ratio >= 0 && *ratio <= 1) return tensorflow::OkStatus();
  return errors::InvalidArgument("mixing_ratio is ", *ratio, ", expected 0 to 1");
}

REGISTER_OP("DpsrNegativeWeights")
    .Input("mask: bool")
    .Output("weights: float")
    .Attr("mixing_ratio: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle mask;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &mask));
      c->set_output(0, mask);
      return tensorflow::OkStatus();
    });

class NegativeWeightsOp : public OpKernel {
 public:
  explicit NegativeWeightsOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, MixingRatio(context, &mixing_ratio_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& mask = context->input(0);
    OP_REQUIRES(context, mask.dims() == 2 && mask.dim_size(0) <= mask.dim_size(1),
                errors::InvalidArgument("mask has shape ", mask.shape().DebugString(), ", expected [b, b + r]"));
    Tensor* weights;
    OP_REQUIRES_OK(context, context->allocate_output(0, mask.shape(), &weights));
    NegativeWeights(mask.flat<bool>().data(), mask.dim_size(0), mask.dim_size(1), mixing_ratio_,
                    weights->flat<float>().data());
  }

 private:
  float mixing_ratio_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrNegativeWeights").Device(DEVICE_CPU), NegativeWeightsOp);

REGISTER_OP("DpsrHingeLoss")
    .Input("scores: T")
    .Input("weights: T")
    .Input("example_weights: T")
    .Input("positive: num_positive * T")
    .Output("loss: T")
    .Output("scores_gradient: T")
    .Output("positive_gradient: num_positive * T")
    .Attr("T: {float, double}")
    .Attr("num_positive: int >= 0")
    .Attr("margin: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scores, pairs;
      DimensionHandle b;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &scores));
      TF_RETURN_IF_ERROR(c->Merge(scores, c->input(1), &scores));
      pairs = c->Vector(c->Dim(scores, 0));
      for (int i = 2; i < c->num_inputs(); ++i) TF_RETURN_IF_ERROR(c->Merge(pairs, c->input(i), &pairs));
      c->set_output(0, c->Scalar());
      c->set_output(1, scores);
      for (int i = 2; i < c->num_outputs(); ++i) c->set_output(i, pairs);
      return tensorflow::OkStatus();
    });

template <typename T>
class HingeLossOp : public OpKernel {
 public:
  explicit HingeLossOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("margin", &margin_));
    OP_REQUIRES(context, context->num_inputs() <= 4, errors::InvalidArgument("num_positive is more than 1"));
  }

  void Compute(OpKernelContext* context) override {
    enum Input { kScores, kWeights, kExampleWeights, kPositive };
    enum Output { kLoss, kScoresGradient, kPositiveGradient };
    const Tensor& scores = context->input(kScores);
    const bool on_diagonal = context->num_inputs() == kPositive;
    OP_REQUIRES(context, scores.dims() == 2 && (!on_diagonal || scores.dim_size(0) <= scores.dim_size(1)),
                errors::InvalidArgument("scores has shape ", scores.shape().DebugString(), ", expected [b, n]"));
    const TensorShape pairs({scores.dim_size(0)});
    OP_REQUIRES_OK(context, CheckShape("weights", context->input(kWeights).shape(), scores.shape()));
    OP_REQUIRES_OK(context, CheckShape("example_weights", context->input(kExampleWeights).shape(), pairs));
    if (!on_diagonal) OP_REQUIRES_OK(context, CheckShape("positive", context->input(kPositive).shape(), pairs));
    auto data = [&](int input) { return context->input(input).flat<T>().data(); };
    HingeInput<T> input{nullptr, data(kScores), data(kWeights), data(kExampleWeights)};
    Tensor *loss, *of_scores;
    OP_REQUIRES_OK(context, context->allocate_output(kLoss, TensorShape({}), &loss));
    OP_REQUIRES_OK(context, context->allocate_output(kScoresGradient, scores.shape(), &of_scores));
    HingeGradient<T> gradient{nullptr, of_scores->flat<T>().data()};
    if (!on_diagonal) {
      Tensor* of_positive;
      OP_REQUIRES_OK(context, context->allocate_output(kPositiveGradient, pairs, &of_positive));
      of_positive->flat<T>().setZero();
      input.positive = data(kPositive);
      gradient.positive = of_positive->flat<T>().data();
    }
    loss->scalar<T>()() = HingeLoss(input, scores.dim_size(0), scores.dim_size(1), T{margin_}, gradient);
  }

 private:
  float margin_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrHingeLoss").Device(DEVICE_CPU).TypeConstraint<float>("T"), HingeLossOp<float>);
REGISTER_KERNEL_BUILDER(Name("DpsrHingeLoss").Device(DEVICE_CPU).TypeConstraint<double>("T"), HingeLossOp<double>);

REGISTER_OP("DpsrMixedHingeLoss")
    .Input("scores: float")
    .Input("mask: bool")
    .Input("example_weights: float")
    .Output("loss: float")
    .Output("scores_gradient: float")
    .Attr("margin: float")
    .Attr("mixing_ratio: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scores, pairs;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &scores));
      TF_RETURN_IF_ERROR(c->Merge(scores, c->input(1), &scores));
      TF_RETURN_IF_ERROR(c->Merge(c->Vector(c->Dim(scores, 0)), c->input(2), &pairs));
      c->set_output(0, c->Scalar());
      c->set_output(1, scores);
      return tensorflow::OkStatus();
    });

class MixedHingeLossOp : public OpKernel {
 public:
  explicit MixedHingeLossOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("margin", &margin_));
    OP_REQUIRES_OK(context, MixingRatio(context, &mixing_ratio_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &scores = context->input(0), &mask = context->input(1), &weights = context->input(2);
    OP_REQUIRES(context, scores.dims() == 2 && scores.dim_size(0) <= scores.dim_size(1),
                errors::InvalidArgument("scores has shape ", scores.shape().DebugString(), ", expected [b, b + r]"));
    OP_REQUIRES_OK(context, CheckShape("mask", mask.shape(), scores.shape()));
    OP_REQUIRES_OK(context, CheckShape("example_weights", weights.shape(), TensorShape({scores.dim_size(0)})));
    Tensor *loss, *gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({}), &loss));
    OP_REQUIRES_OK(context, context->allocate_output(1, scores.shape(), &gradient));
    loss->scalar<float>()() = MixedHingeLoss(scores.flat<float>().data(), mask.flat<bool>().data(),
                                             weights.flat<float>().data(), scores.dim_size(0), scores.dim_size(1),
                                             mixing_ratio_, margin_, gradient->flat<float>().data());
  }

 private:
  float margin_, mixing_ratio_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrMixedHingeLoss").Device(DEVICE_CPU), MixedHingeLossOp);

}  // namespace
}  // namespace dpsr
