// TensorFlow ops over the tokenizer and a vocabulary. The Python side is dpsr_tokenizer/tf_ops.py.
#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/tf_op.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/util/work_sharder.h"
#include "tokenizer_cc/tokenizer.h"
#include "tokenizer_cc/vocabulary.h"
#include "tokenizer_cc/vocabulary_resource.h"

namespace dpsr {
namespace {

namespace tf = ::tensorflow;

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

// The values of a ragged tensor for a block of rows.
template <typename T>
struct Block {
  std::vector<T> values;
  int64_t first_value = 0;  // position of the block in the whole tensor
};

// Fills the outputs 0 (values) and 1 (row_splits). Calls append(text, &values) for each text, in parallel if the batch
// is large enough, and then finish(block, output), which moves the values of a block to their position.
template <typename T, typename Append, typename Finish>
void ComputeRagged(tf::OpKernelContext* context, const tf::Tensor& text, const Append& append, const Finish& finish) {
  constexpr int64_t kBytesOfABlock = 1 << 14;
  const auto texts = text.vec<tf::tstring>();
  const int64_t num_texts = texts.size();
  tf::Tensor* row_splits = nullptr;
  OP_REQUIRES_OK(context, context->allocate_output(1, {num_texts + 1}, &row_splits));
  auto splits = row_splits->vec<int64_t>();
  splits(0) = 0;

  // Blocks have about equal numbers of bytes, so that a long text does not delay the short ones.
  std::vector<int64_t> ends;
  int64_t bytes = 0;
  for (int64_t i = 0; i < num_texts; ++i) {
    bytes += static_cast<int64_t>(texts(i).size());
    if (bytes >= kBytesOfABlock || i + 1 == num_texts) {
      ends.push_back(i + 1);
      bytes = 0;
    }
  }
  const auto num_blocks = static_cast<int64_t>(ends.size());
  std::vector<Block<T>> blocks(ends.size());
  const auto for_each_block = [&](const auto& work) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) work(b, b == 0 ? 0 : ends[static_cast<size_t>(b) - 1]);
    };
    if (num_blocks <= 1) return run(0, num_blocks);
    const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
    constexpr int64_t kCyclesOfABlock = kBytesOfABlock * 20;
    tf::Shard(workers.num_threads, workers.workers, num_blocks, kCyclesOfABlock, run);
  };

  for_each_block([&](int64_t b, int64_t begin) {
    std::vector<T>& values = blocks[static_cast<size_t>(b)].values;
    for (int64_t i = begin; i < ends[static_cast<size_t>(b)]; ++i) {
      append(std::string_view(texts(i).data(), texts(i).size()), &values);
      // Counted from the beginning of the block for now.
      splits(i + 1) = static_cast<int64_t>(values.size());
    }
  });
  int64_t total = 0;
  for (Block<T>& block : blocks) {
    block.first_value = total;
    total += static_cast<int64_t>(block.values.size());
  }
  tf::Tensor* values = nullptr;
  OP_REQUIRES_OK(context, context->allocate_output(0, {total}, &values));
  for_each_block([&](int64_t b, int64_t begin) {
    Block<T>& block = blocks[static_cast<size_t>(b)];
    for (int64_t i = begin; i < ends[static_cast<size_t>(b)]; ++i) splits(i + 1) += block.first_value;
    finish(&block, values);
  });
}

tf::Status CheckText(const tf::Tensor& text) {
  if (tf::TensorShapeUtils::IsVector(text.shape())) return tf::OkStatus();
  return tf::errors::InvalidArgument("text has shape ", text.shape().DebugString(),
                                     ", expected a vector: string [num_texts]");
}

class TokenizeOp : public tf::OpKernel {
 public:
  enum Input { kVocabulary, kText };
  enum Output { kValues, kRowSplits };
  using tf::OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& text = context->input(kText);
    OP_REQUIRES_OK(context, CheckText(text));
    std::shared_ptr<const Vocabulary> vocabulary;
    OP_REQUIRES_OK(context, FindVocabulary(context, kVocabulary, &vocabulary));
    ComputeRagged<int32_t>(
        context, text,
        [&](std::string_view each, std::vector<int32_t>* values) { vocabulary->Encode(each, values); },
        [](Block<int32_t>* block, tf::Tensor* values) {
          std::copy(block->values.begin(), block->values.end(), values->vec<int32_t>().data() + block->first_value);
        });
  }
};

class TokenizeStringsOp : public tf::OpKernel {
 public:
  enum Input { kText };
  enum Output { kValues, kRowSplits };

  explicit TokenizeStringsOp(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    std::string text;
    OP_REQUIRES_OK(context, context->GetAttr("config", &text));
    TokenizerConfig config;
    const Status parsed = TokenizerConfig::Parse(text, &config);
    OP_REQUIRES(context, parsed.ok(), ToTensorFlow(parsed));
    tokenizer_ = Tokenizer(config);
  }

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& text = context->input(kText);
    OP_REQUIRES_OK(context, CheckText(text));
    ComputeRagged<tf::tstring>(
        context, text,
        [this](std::string_view each, std::vector<tf::tstring>* values) {
          tokenizer_.Tokenize(each, [&](std::string_view token) { values->emplace_back(token.data(), token.size()); });
        },
        [](Block<tf::tstring>* block, tf::Tensor* values) {
          std::move(block->values.begin(), block->values.end(),
                    values->vec<tf::tstring>().data() + block->first_value);
        });
  }

 private:
  Tokenizer tokenizer_;
};

// Sets the shapes of values and row_splits for an input text [num_texts].
tf::Status RaggedShapes(InferenceContext* context, int text_input) {
  ShapeHandle text;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(text_input), 1, &text));
  DimensionHandle num_splits;
  TF_RETURN_IF_ERROR(context->Add(context->Dim(text, 0), 1, &num_splits));
  context->set_output(0, context->Vector(InferenceContext::kUnknownDim));
  context->set_output(1, context->Vector(num_splits));
  return tf::OkStatus();
}

REGISTER_OP("DpsrVocabularyHandle")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .Output("vocabulary: resource")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle for a vocabulary. Handles with equal names refer to the same vocabulary, so each vocabulary needs its own name.
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
Opens a vocabulary file, memory-mapped, for the handle. Replaces a vocabulary that was loaded before.

filename: [] path of a vocabulary written by dpsr_tokenizer.VocabularyBuilder.
)doc");

REGISTER_OP("DpsrTokenize")
    .Input("vocabulary: resource")
    .Input("text: string")
    .Output("values: int32")
    .Output("row_splits: int64")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle unused;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(TokenizeOp::kVocabulary), 0, &unused));
      return RaggedShapes(context, TokenizeOp::kText);
    })
    .Doc(R"doc(
Returns the token ids of each text as a ragged tensor.

text: [num_texts] UTF-8; any bytes are valid.
values: [num_ids] the ids of all texts, one text after another.
row_splits: [num_texts + 1] text i has values[row_splits[i]:row_splits[i + 1]].
)doc");

REGISTER_OP("DpsrTokenizeStrings")
    .Input("text: string")
    .Output("values: string")
    .Output("row_splits: int64")
    .Attr("config: string")
    .SetShapeFn([](InferenceContext* context) { return RaggedShapes(context, TokenizeStringsOp::kText); })
    .Doc(R"doc(
Returns the tokens of each text as a ragged tensor.

text: [num_texts] UTF-8; any bytes are valid.
values: [num_tokens] the tokens of all texts, one text after another.
row_splits: [num_texts + 1] text i has values[row_splits[i]:row_splits[i + 1]].
config: TokenizerConfig.serialize().
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrVocabularyHandle").Device(tf::DEVICE_CPU), tf::ResourceHandleOp<VocabularyResource>);
REGISTER_KERNEL_BUILDER(Name("DpsrVocabularyLoad").Device(tf::DEVICE_CPU), VocabularyLoadOp);
REGISTER_KERNEL_BUILDER(Name("DpsrTokenize").Device(tf::DEVICE_CPU), TokenizeOp);
REGISTER_KERNEL_BUILDER(Name("DpsrTokenizeStrings").Device(tf::DEVICE_CPU), TokenizeStringsOp);

}  // namespace
}  // namespace dpsr
