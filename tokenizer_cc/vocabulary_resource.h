// The vocabulary behind a TensorFlow handle, for the ops that read one.
#ifndef DPSR_TOKENIZER_CC_VOCABULARY_RESOURCE_H_
#define DPSR_TOKENIZER_CC_VOCABULARY_RESOURCE_H_

#include <memory>
#include <string>
#include <utility>

#include "common/tf_op.h"
#include "tokenizer_cc/vocabulary.h"

namespace dpsr {

// The vocabulary that was loaded last, or none before the first load.
class VocabularyResource : public tensorflow::ResourceBase {
 public:
  std::string DebugString() const override {
    const std::shared_ptr<const Vocabulary> vocabulary = Get();
    return vocabulary == nullptr ? "no vocabulary" : StrCat("vocabulary ", vocabulary->path());
  }
  void Set(std::shared_ptr<const Vocabulary> vocabulary) {
    tensorflow::mutex_lock lock(mutex_);
    vocabulary_ = std::move(vocabulary);
  }
  // Returns null before the first load. The caller's copy stays valid when another load replaces the vocabulary.
  std::shared_ptr<const Vocabulary> Get() const {
    tensorflow::tf_shared_lock lock(mutex_);
    return vocabulary_;
  }

 private:
  mutable tensorflow::mutex mutex_;
  std::shared_ptr<const Vocabulary> vocabulary_ TF_GUARDED_BY(mutex_);
};

// Gets the vocabulary of the handle in `input`. Errors: FailedPrecondition (none is loaded).
inline tensorflow::Status FindVocabulary(OpKernelContext* context, int input,
                                         std::shared_ptr<const Vocabulary>* vocabulary) {
  tensorflow::core::RefCountPtr<VocabularyResource> resource;
  const tensorflow::Status found =
      tensorflow::LookupResource(context, tensorflow::HandleFromInput(context, input), &resource);
  if (found.ok()) *vocabulary = resource->Get();
  if (*vocabulary != nullptr) return tensorflow::OkStatus();
  if (!found.ok() && !errors::IsNotFound(found)) return found;
  return errors::FailedPrecondition(
      "no vocabulary is loaded for op ", context->op_kernel().name(),
      "; run the initializer of the VocabularyTable (tf.compat.v1.tables_initializer()) first");
}

}  // namespace dpsr

#endif  // DPSR_TOKENIZER_CC_VOCABULARY_RESOURCE_H_
