// The ops of a product quantizer: thin adapters of product_quantizer.h.

#include "dpsr_tf/ops/product_quantizer.h"

#include "common/tf_op.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace dpsr {
namespace {

// Checks codebooks [parts, size, width] and reads their shape.
tensorflow::Status ReadShape(const TensorShape& codebooks, CodebookShape* shape) {
  if (codebooks.dims() != 3 || codebooks.num_elements() == 0 || codebooks.dim_size(1) > (int64_t{1} << 30)) {
    return errors::InvalidArgument("codebooks have shape ", codebooks.DebugString(),
                                   ", expected [parts, size, width], none of them 0, and size at most 2^30");
  }
  *shape = {codebooks.dim_size(0), codebooks.dim_size(1), codebooks.dim_size(2)};
  return tensorflow::OkStatus();
}

// Checks a matrix with `columns` columns.
tensorflow::Status CheckMatrix(const char* name, const Tensor& matrix, int64_t columns) {
  if (matrix.dims() == 2 && matrix.dim_size(1) == columns) return tensorflow::OkStatus();
  return errors::InvalidArgument(name, " has shape ", matrix.shape().DebugString(), ", expected [n, ", columns, "]");
}

// Checks codes [n, parts], each 0 to size - 1.
tensorflow::Status CheckCodes(const Tensor& codes, const CodebookShape& shape) {
  TF_RETURN_IF_ERROR(CheckMatrix("codes", codes, shape.parts));
  const auto values = codes.flat<int32>();
  for (int64_t i = 0; i < values.size(); ++i) {
    if (values(i) >= 0 && values(i) < shape.size) continue;
    return errors::InvalidArgument("code ", values(i), " of row ", i / shape.parts, ", expected 0 to ", shape.size - 1);
  }
  return tensorflow::OkStatus();
}

tensorflow::thread::ThreadPool* Workers(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->workers;
}

// Merges the columns of the matrix `input` with the product of parts and width of `codebooks`.
tensorflow::Status MatrixShape(InferenceContext* c, int input, ShapeHandle codebooks, ShapeHandle* matrix) {
  DimensionHandle dim;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 2, matrix));
  TF_RETURN_IF_ERROR(c->Multiply(c->Dim(codebooks, 0), c->Dim(codebooks, 2), &dim));
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(*matrix, 1), dim, &dim));
  *matrix = c->Matrix(c->Dim(*matrix, 0), dim);
  return tensorflow::OkStatus();
}

REGISTER_OP("DpsrNearestCodes")
    .Input("x: float")
    .Input("codebooks: float")
    .Output("codes: int32")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle x, codebooks;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 3, &codebooks));
      TF_RETURN_IF_ERROR(MatrixShape(c, 0, codebooks, &x));
      c->set_output(0, c->Matrix(c->Dim(x, 0), c->Dim(codebooks, 0)));
      return tensorflow::OkStatus();
    });

class NearestCodesOp : public OpKernel {
 public:
  explicit NearestCodesOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    enum Input { kX, kCodebooks };
    const Tensor &x = context->input(kX), &codebooks = context->input(kCodebooks);
    CodebookShape shape;
    OP_REQUIRES_OK(context, ReadShape(codebooks.shape(), &shape));
    OP_REQUIRES_OK(context, CheckMatrix("x", x, shape.dim()));
    const int64_t n = x.dim_size(0);
    Tensor* codes;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({n, shape.parts}), &codes));
    const PackedCodebooks packed(codebooks.flat<float>().data(), shape);
    const float* from = x.flat<float>().data();
    int32* to = codes->flat<int32>().data();
    Workers(context)->ParallelFor(n, shape.size * shape.dim() / kProductsPerNanosecond + 1,
                                  [&](int64_t begin, int64_t end) {
                                    packed.NearestCodes(from + begin * shape.dim(), end - begin, to + begin * shape.parts);
                                  });
  }

 private:
  static constexpr int64_t kProductsPerNanosecond = 16;
};
REGISTER_KERNEL_BUILDER(Name("DpsrNearestCodes").Device(DEVICE_CPU), NearestCodesOp);

REGISTER_OP("DpsrLookUpCodes")
    .Input("codes: int32")
    .Input("codebooks: float")
    .Output("vectors: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle codes, codebooks;
      DimensionHandle parts, dim;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &codes));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 3, &codebooks));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(codes, 1), c->Dim(codebooks, 0), &parts));
      TF_RETURN_IF_ERROR(c->Multiply(parts, c->Dim(codebooks, 2), &dim));
      c->set_output(0, c->Matrix(c->Dim(codes, 0), dim));
      return tensorflow::OkStatus();
    });

class LookUpCodesOp : public OpKernel {
 public:
  explicit LookUpCodesOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    enum Input { kCodes, kCodebooks };
    const Tensor &codes = context->input(kCodes), &codebooks = context->input(kCodebooks);
    CodebookShape shape;
    OP_REQUIRES_OK(context, ReadShape(codebooks.shape(), &shape));
    OP_REQUIRES_OK(context, CheckCodes(codes, shape));
    const int64_t n = codes.dim_size(0);
    Tensor* vectors;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({n, shape.dim()}), &vectors));
    const int32* from = codes.flat<int32>().data();
    float* to = vectors->flat<float>().data();
    Workers(context)->ParallelFor(n, shape.dim(), [&](int64_t begin, int64_t end) {
      LookUpCodes(from + begin * shape.parts, end - begin, codebooks.flat<float>().data(), shape,
                  to + begin * shape.dim());
    });
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrLookUpCodes").Device(DEVICE_CPU), LookUpCodesOp);

REGISTER_OP("DpsrLookUpCodesGradient")
    .Input("codes: int32")
    .Input("codebooks: float")
    .Input("upstream: float")
    .Output("of_codebooks: float")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle matrix, codebooks;
      DimensionHandle parts;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 3, &codebooks));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &matrix));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(matrix, 1), c->Dim(codebooks, 0), &parts));
      TF_RETURN_IF_ERROR(MatrixShape(c, 2, codebooks, &matrix));
      c->set_output(0, codebooks);
      return tensorflow::OkStatus();
    });

class LookUpCodesGradientOp : public OpKernel {
 public:
  explicit LookUpCodesGradientOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    enum Input { kCodes, kCodebooks, kUpstream };
    const Tensor &codes = context->input(kCodes), &upstream = context->input(kUpstream);
    CodebookShape shape;
    OP_REQUIRES_OK(context, ReadShape(context->input(kCodebooks).shape(), &shape));
    OP_REQUIRES_OK(context, CheckCodes(codes, shape));
    const int64_t n = codes.dim_size(0);
    OP_REQUIRES_OK(context, CheckShape("upstream", upstream.shape(), TensorShape({n, shape.dim()})));
    Tensor* of_codebooks;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(kCodebooks).shape(), &of_codebooks));
    const int64_t units = GradientUnits(shape);
    Workers(context)->ParallelFor(units, n * shape.dim() / units + 1, [&](int64_t begin, int64_t end) {
      LookUpCodesGradient(codes.flat<int32>().data(), n, upstream.flat<float>().data(), shape, begin, end,
                          of_codebooks->flat<float>().data());
    });
  }
};
REGISTER_KERNEL_BUILDER(Name("DpsrLookUpCodesGradient").Device(DEVICE_CPU), LookUpCodesGradientOp);

}  // namespace
}  // namespace dpsr
