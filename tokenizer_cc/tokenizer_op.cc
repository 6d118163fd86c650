// TensorFlow ops over the tokenizer and a vocabulary. The Python side is dpsr_tokenizer/tf_ops.py.
#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tokenizer_cc/vocabulary.h"

namespace dpsr {
namespace {

namespace tf = ::tensorflow;
using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

tf::Status ToTensorFlow(const Status& status) {
  const auto code = [&status] {
    switch (status.code()) {
      case StatusCode::kOk:
        return absl::StatusCode::kOk;
      case StatusCode::kInvalidArgument:
        return absl::StatusCode::kInvalidArgument;
      case StatusCode::kNotFound:
        return absl::StatusCode::kNotFound;
      case StatusCode::kDataLoss:
        return absl::StatusCode::kDataLoss;
      case StatusCode::kFailedPrecondition:
        return absl::StatusCode::kFailedPrecondition;
      case StatusCode::kResourceExhausted:
        return absl::StatusCode::kResourceExhausted;
      case StatusCode::kInternal:
        break;
    }
    return absl::StatusCode::kInternal;
  };
  return tf::Status(code(), status.message());
}

// What a handle stands for: no vocabulary until one is loaded, then the one loaded last.
class VocabularyResource : public tf::ResourceBase {
 public:
  std::string DebugString() const override {
    const std::shared_ptr<const Vocabulary> vocabulary = Get();
    return vocabulary == nullptr ? "no vocabulary" : StrCat("vocabulary ", vocabulary->path());
  }
  void Set(std::shared_ptr<const Vocabulary> vocabulary) {
    tf::mutex_lock lock(mutex_);
    vocabulary_ = std::move(vocabulary);
  }
  // Null before the first load. The caller's copy outlives a load that replaces it.
  std::shared_ptr<const Vocabulary> Get() const {
    tf::tf_shared_lock lock(mutex_);
    return vocabulary_;
  }

 private:
  mutable tf::mutex mutex_;
  std::shared_ptr<const Vocabulary> vocabulary_ TF_GUARDED_BY(mutex_);
};

class VocabularyLoadOp : public tf::OpKernel {
 public:
  enum Input { kVocabulary, kFilename };
  using tf::OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& filename = context->input(kFilename);
    OP_REQUIRES(context, tf::TensorShapeUtils::IsScalar(filename.shape()),
                tf::errors::InvalidArgument("filename has shape ", filename.shape().DebugString(),
                                            ", expected a scalar"));
    std::unique_ptr<Vocabulary> vocabulary;
    const Status opened =
        Vocabulary::Open(std::string(filename.scalar<tf::tstring>()()), /*verify=*/true, &vocabulary);
    OP_REQUIRES(context, opened.ok(), ToTensorFlow(opened));
    tf::core::RefCountPtr<VocabularyResource> resource;
    OP_REQUIRES_OK(context, tf::LookupOrCreateResource<VocabularyResource>(
                                context, tf::HandleFromInput(context, kVocabulary), &resource,
                                [](VocabularyResource** created) {
                                  *created = new VocabularyResource;
                                  return tf::OkStatus();
                                }));
    resource->Set(std::move(vocabulary));
  }
};

class TokenizeOp : public tf::OpKernel {
 public:
  enum Input { kVocabulary, kText };
  enum Output { kValues, kRowSplits };
  using tf::OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& text = context->input(kText);
    OP_REQUIRES(context, tf::TensorShapeUtils::IsVector(text.shape()),
                tf::errors::InvalidArgument("text has shape ", text.shape().DebugString(),
                                            ", expected a vector: string [num_texts]"));
    std::shared_ptr<const Vocabulary> vocabulary;
    OP_REQUIRES_OK(context, FindVocabulary(context, &vocabulary));

    const auto texts = text.vec<tf::tstring>();
    tf::Tensor* row_splits = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(kRowSplits, {texts.size() + 1}, &row_splits));
    auto splits = row_splits->vec<int64_t>();
    std::vector<int32_t> ids;
    splits(0) = 0;
    for (Eigen::Index i = 0; i < texts.size(); ++i) {
      vocabulary->Encode(std::string_view(texts(i).data(), texts(i).size()), &ids);
      splits(i + 1) = static_cast<int64_t>(ids.size());
    }
    tf::Tensor* values = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(kValues, {static_cast<int64_t>(ids.size())}, &values));
    std::copy(ids.begin(), ids.end(), values->vec<int32_t>().data());
  }

 private:
  tf::Status FindVocabulary(tf::OpKernelContext* context, std::shared_ptr<const Vocabulary>* vocabulary) const {
    tf::core::RefCountPtr<VocabularyResource> resource;
    const tf::Status found = tf::LookupResource(context, tf::HandleFromInput(context, kVocabulary), &resource);
    if (found.ok()) *vocabulary = resource->Get();
    if (*vocabulary != nullptr) return tf::OkStatus();
    if (!found.ok() && !tf::errors::IsNotFound(found)) return found;
    return tf::errors::FailedPrecondition(
        "no vocabulary is loaded for op ", name(),
        "; run the initializer of the VocabularyTable (tf.compat.v1.tables_initializer()) first");
  }
};

REGISTER_OP("DpsrVocabularyHandle")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .Output("vocabulary: resource")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle for a vocabulary. Equal names stand for the same vocabulary: give each its own.
)doc");

REGISTER_OP("DpsrVocabularyLoad")
    .Input("vocabulary: resource")
    .Input("filename: string")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle unused;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(VocabularyLoadOp::kVocabulary), 0, &unused));
      return context->WithRank(context->input(VocabularyLoadOp::kFilename), 0, &unused);
    })
    .Doc(R"doc(
Opens a vocabulary file (memory-mapped) and puts it behind the handle, replacing what was there.

filename: [] path of a vocabulary written by dpsr_tokenizer.VocabularyBuilder.
)doc");

REGISTER_OP("DpsrTokenize")
    .Input("vocabulary: resource")
    .Input("text: string")
    .Output("values: int32")
    .Output("row_splits: int64")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle unused, text;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(TokenizeOp::kVocabulary), 0, &unused));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(TokenizeOp::kText), 1, &text));
      DimensionHandle num_splits;
      TF_RETURN_IF_ERROR(context->Add(context->Dim(text, 0), 1, &num_splits));
      context->set_output(TokenizeOp::kValues, context->Vector(InferenceContext::kUnknownDim));
      context->set_output(TokenizeOp::kRowSplits, context->Vector(num_splits));
      return tf::OkStatus();
    })
    .Doc(R"doc(
The token ids of each text, ragged.

text: [num_texts] UTF-8; any bytes are valid.
values: [num_ids] the ids of all texts, one text after another.
row_splits: [num_texts + 1] text i has values[row_splits[i]:row_splits[i + 1]].
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrVocabularyHandle").Device(tf::DEVICE_CPU), tf::ResourceHandleOp<VocabularyResource>);
REGISTER_KERNEL_BUILDER(Name("DpsrVocabularyLoad").Device(tf::DEVICE_CPU), VocabularyLoadOp);
REGISTER_KERNEL_BUILDER(Name("DpsrTokenize").Device(tf::DEVICE_CPU), TokenizeOp);

}  // namespace
}  // namespace dpsr
