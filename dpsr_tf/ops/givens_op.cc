// The op of Givens rotations: a thin adapter of givens.h. The rotation is an ordinary resource variable.

#include "dpsr_tf/ops/givens.h"

#include <string>

#include "common/tf_op.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor_util.h"

namespace dpsr {
namespace {

using ::tensorflow::Var;

REGISTER_OP("DpsrGivensStep")
    .Input("rotation: resource")
    .Input("product: float")
    .Input("learning_rate: float")
    .Input("step: int64")
    .Attr("pairs: {'steepest', 'random'}")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle product, scalar;
      DimensionHandle d;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &scalar));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &product));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(product, 0), c->Dim(product, 1), &d));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 0, &scalar));
      return c->WithRank(c->input(3), 0, &scalar);
    })
    .Doc(R"doc(
Rotates disjoint pairs of axes of a rotation, in place. See givens.h.

rotation: Variable, float [d, d].
product: rotation^T times the gradient of the loss with respect to it, [d, d].
learning_rate: Radians for a slope of 1.
step: Number of steps done, the seed of random pairs.
pairs: Those with the largest slopes, or random ones.
)doc");

class GivensStepOp : public OpKernel {
 public:
  explicit GivensStepOp(OpKernelConstruction* context) : OpKernel(context) {
    std::string pairs;
    OP_REQUIRES_OK(context, context->GetAttr("pairs", &pairs));
    steepest_ = pairs == "steepest";
  }

  void Compute(OpKernelContext* context) override {
    enum Input { kRotation, kProduct, kLearningRate, kStep };
    tensorflow::core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, kRotation), &variable));
    const Tensor& product = context->input(kProduct);
    for (const Input input : {kLearningRate, kStep}) {
      OP_REQUIRES_OK(context, CheckShape(input == kStep ? "step" : "learning_rate", context->input(input).shape(),
                                         TensorShape({})));
    }
    OP_REQUIRES(context, product.dims() == 2 && product.dim_size(0) == product.dim_size(1),
                errors::InvalidArgument("product has shape ", product.shape().DebugString(), ", expected [d, d]"));
    const int64_t d = product.dim_size(0), step = context->input(kStep).scalar<int64_t>()();
    OP_REQUIRES(context, step >= 0, errors::InvalidArgument("step is ", step, ", expected at least 0"));
    if (d == 0) return;
    const std::vector<AxisPair> pairs = steepest_ ? SteepestPairs(product.flat<float>().data(), d)
                                                  : RandomPairs(product.flat<float>().data(), d, step);

    const tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES(context, variable->is_initialized, errors::FailedPrecondition("the rotation is not initialized"));
    Tensor* rotation = variable->tensor();
    OP_REQUIRES(context, rotation->dtype() == tensorflow::DT_FLOAT,
                errors::InvalidArgument("the rotation is ", tensorflow::DataTypeString(rotation->dtype()),
                                        ", expected float"));
    OP_REQUIRES_OK(context, CheckShape("the rotation", rotation->shape(), product.shape()));
    // A tensor from an earlier read that is still in use keeps its values.
    if (!rotation->RefCountIsOne()) *rotation = tensorflow::tensor::DeepCopy(*rotation);
    float* values = rotation->flat<float>().data();
    RotatePairs(pairs, context->input(kLearningRate).scalar<float>()(), d, values);
    OrthogonalizeColumn(step % d, d, values);
  }

 private:
  bool steepest_;
};
REGISTER_KERNEL_BUILDER(Name("DpsrGivensStep").Device(DEVICE_CPU), GivensStepOp);

}  // namespace
}  // namespace dpsr
