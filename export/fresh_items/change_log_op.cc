// The op that reads the log of item changes. Python: dpsr_export.faiss_search.read_item_changes.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tf_op.h"
#include "export/fresh_items/change_log.h"
#include "tensorflow/core/platform/logging.h"
#include "tensorflow/core/platform/mutex.h"

namespace dpsr {
namespace {

enum Input { kDirectory, kOffset, kMaxChanges };
enum Output { kKinds, kItemIds, kVersions, kTimes, kKeys, kExamples, kNextOffset };
constexpr const char* kInputNames[] = {"directory", "offset", "max_changes"};

class ItemChangesReadOp : public OpKernel {
 public:
  explicit ItemChangesReadOp(OpKernelConstruction* c) : OpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("up", &up_));
    OP_REQUIRES_OK(c, c->GetAttr("log_errors", &log_errors_));
  }

  void Compute(OpKernelContext* c) override {
    for (const int input : {kDirectory, kOffset, kMaxChanges}) {
      OP_REQUIRES(c, TensorShapeUtils::IsScalar(c->input(input).shape()),
                  errors::InvalidArgument(kInputNames[input], " has shape ", c->input(input).shape().DebugString(),
                                          ", expected a scalar"));
    }
    const std::string path = c->input(kDirectory).scalar<tstring>()();
    const std::shared_ptr<ChangeLogReader> reader = Reader(up_ == 0 ? path : ChangeLogDirectory(path, up_));
    ItemChanges changes;
    const int64_t offset = c->input(kOffset).scalar<tensorflow::int64>()();
    const Status status = reader->Read(offset, c->input(kMaxChanges).scalar<int32>()(), &changes);
    if (!status.ok() && log_errors_ && status.code() != StatusCode::kInvalidArgument) {
      LOG(ERROR) << "item changes: " << status.message() << "; no change from " << offset << " on is applied";
      changes = ItemChanges();
      changes.next_offset = offset;
    } else {
      OP_REQUIRES_OK(c, ToTensorFlow(status));
    }
    Set(c, kKinds, changes.kinds);
    Set(c, kItemIds, changes.item_ids);
    Set(c, kVersions, changes.versions);
    Set(c, kTimes, changes.times);
    SetTexts(c, kKeys, &changes.keys);
    SetTexts(c, kExamples, &changes.examples);
    Tensor* next_offset;
    OP_REQUIRES_OK(c, c->allocate_output(kNextOffset, {}, &next_offset));
    next_offset->scalar<tensorflow::int64>()() = changes.next_offset;
  }

 private:
  // Returns the reader of a directory. It is kept, because it knows which segments there are.
  std::shared_ptr<ChangeLogReader> Reader(const std::string& directory) {
    const tensorflow::mutex_lock lock(mutex_);
    if (reader_ == nullptr || reader_->directory() != directory) reader_ = std::make_shared<ChangeLogReader>(directory);
    return reader_;
  }

  template <typename T>
  static void Set(OpKernelContext* c, int output, const std::vector<T>& values) {
    Tensor* tensor;
    OP_REQUIRES_OK(c, c->allocate_output(output, {static_cast<int64_t>(values.size())}, &tensor));
    std::copy(values.begin(), values.end(), static_cast<T*>(tensor->data()));
  }

  static void SetTexts(OpKernelContext* c, int output, std::vector<std::string>* texts) {
    Tensor* tensor;
    OP_REQUIRES_OK(c, c->allocate_output(output, {static_cast<int64_t>(texts->size())}, &tensor));
    auto out = tensor->flat<tstring>();
    for (size_t i = 0; i < texts->size(); ++i) out(static_cast<int64_t>(i)) = std::move((*texts)[i]);
  }

  int up_ = 0;
  bool log_errors_ = false;
  tensorflow::mutex mutex_;
  std::shared_ptr<ChangeLogReader> reader_ TF_GUARDED_BY(mutex_);
};

REGISTER_OP("DpsrItemChangesRead")
    .Input("directory: string")
    .Input("offset: int64")
    .Input("max_changes: int32")
    .Attr("up: int >= 0 = 0")
    .Attr("log_errors: bool = false")
    .Output("kinds: int32")
    .Output("item_ids: int64")
    .Output("versions: int64")
    .Output("times: double")
    .Output("keys: string")
    .Output("examples: string")
    .Output("next_offset: int64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      for (const int input : {kDirectory, kOffset, kMaxChanges}) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 0, &scalar));
      }
      const DimensionHandle n = c->UnknownDim();
      for (int output = kKinds; output < kNextOffset; ++output) c->set_output(output, c->Vector(n));
      c->set_output(kNextOffset, c->Scalar());
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Reads changes of items from a log (export/fresh_items/change_log.h).

directory: The log. If `up` is not 0, the path of an asset of a servable instead, whose log is beside its versions.
offset: The number of the first change to read.
max_changes: The largest number of changes to read, at least 1.
up: The number of levels from the asset to the directory that has the log: 3, or more for shards.
log_errors: Whether to log that a segment cannot be read, and to return no changes, instead of an error.
kinds: [n] 0 for a whole item, 1 for new attributes, 2 for a deletion. n is 0 if there are no
  changes from `offset` on.
versions: [n] numbers that the shop gave, or 0.
times: [n] when the changes were acknowledged, in seconds since 1970.
keys: [n] the shop's own text ids, or empty texts.
examples: [n] serialized tf.train.Example.
next_offset: The number of the change after the last one.
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrItemChangesRead").Device(DEVICE_CPU), ItemChangesReadOp);

}  // namespace
}  // namespace dpsr
