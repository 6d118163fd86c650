// The op of word sequences: a thin adapter of word_sequences.h. The Python side is VocabularyTable.word_sequences.
#include <cstdint>
#include <memory>
#include <string_view>

#include "common/tf_op.h"
#include "tensorflow/core/util/work_sharder.h"
#include "tokenizer_cc/vocabulary_resource.h"
#include "tokenizer_cc/word_sequences.h"

namespace dpsr {
namespace {

// Memory of the outputs for each text is bounded by these.
constexpr int64_t kMostWords = 1024, kMostPieces = 256;
// What one word costs about: its trigrams, and a look-up.
constexpr int64_t kCyclesOfAWord = 300;

REGISTER_OP("DpsrWordSequences")
    .Input("vocabulary: resource")
    .Input("text: string")
    .Output("words: int32")
    .Output("pieces: int32")
    .Attr("max_words: int >= 1")
    .Attr("max_pieces: int >= 1")
    .Attr("num_pieces: int >= 2")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle unused, text;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &unused));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &text));
      int64_t max_words, max_pieces;
      TF_RETURN_IF_ERROR(c->GetAttr("max_words", &max_words));
      TF_RETURN_IF_ERROR(c->GetAttr("max_pieces", &max_pieces));
      c->set_output(0, c->MakeShape({c->Dim(text, 0), c->MakeDim(max_words)}));
      c->set_output(1, c->MakeShape({c->Dim(text, 0), c->MakeDim(max_words), c->MakeDim(max_pieces)}));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns the first words of each text in their order, and the letter trigrams of each word. See word_sequences.h.

vocabulary: A vocabulary of words and characters, without hash buckets.
text: [num_texts] UTF-8; any bytes are valid.
words: [num_texts, max_words] ids; 0 after the last word, 1 for a word that the vocabulary does not have.
pieces: [num_texts, max_words, max_pieces] hashed trigrams, 1 to num_pieces - 1; 0 after the last of a word.
max_words: At most 1024.
max_pieces: At most 256.
num_pieces: Number of values of a piece, with the 0.
)doc");

class WordSequencesOp : public OpKernel {
 public:
  enum Input { kVocabulary, kText };
  enum Output { kWords, kPieces };

  explicit WordSequencesOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("max_words", &max_words_));
    OP_REQUIRES_OK(context, context->GetAttr("max_pieces", &max_pieces_));
    OP_REQUIRES_OK(context, context->GetAttr("num_pieces", &num_pieces_));
    OP_REQUIRES(context, max_words_ <= kMostWords,
                errors::InvalidArgument("max_words is ", max_words_, ", expected at most ", kMostWords));
    OP_REQUIRES(context, max_pieces_ <= kMostPieces,
                errors::InvalidArgument("max_pieces is ", max_pieces_, ", expected at most ", kMostPieces));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& text = context->input(kText);
    OP_REQUIRES(context, TensorShapeUtils::IsVector(text.shape()),
                errors::InvalidArgument("text has shape ", text.shape().DebugString(),
                                        ", expected a vector: string [num_texts]"));
    std::shared_ptr<const Vocabulary> vocabulary;
    OP_REQUIRES_OK(context, FindVocabulary(context, kVocabulary, &vocabulary));
    OP_REQUIRES_OK(context, ToTensorFlow(WordSequences::Check(*vocabulary)));
    const WordSequences sequences(*vocabulary);
    const auto texts = text.vec<tstring>();
    Tensor *words = nullptr, *pieces = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(kWords, {texts.size(), max_words_}, &words));
    OP_REQUIRES_OK(context, context->allocate_output(kPieces, {texts.size(), max_words_, max_pieces_}, &pieces));
    auto* ids = words->flat<int32>().data();
    auto* trigrams = pieces->flat<int32>().data();
    const auto encode = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sequences.EncodeBoth(std::string_view(texts(i).data(), texts(i).size()), max_words_, max_pieces_, num_pieces_,
                             ids + i * max_words_, trigrams + i * max_words_ * max_pieces_);
      }
    };
    const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
    tensorflow::Shard(workers.num_threads, workers.workers, texts.size(), kCyclesOfAWord * max_words_, encode);
  }

 private:
  int64_t max_words_, max_pieces_;
  int32 num_pieces_;
};

REGISTER_KERNEL_BUILDER(Name("DpsrWordSequences").Device(DEVICE_CPU), WordSequencesOp);

}  // namespace
}  // namespace dpsr
