// The ops that apply changes of items to a loaded index. Python: dpsr_export.faiss_search.FaissIndexTable.
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/tf_op.h"
#include "export/faiss_search/fresh_index.h"
#include "export/faiss_search/tf_index_resource.h"
#include "tensorflow/core/example/example.pb.h"
#include "tensorflow/core/example/feature.pb.h"
#include "tensorflow/core/framework/common_shape_fns.h"

namespace dpsr {
namespace {

constexpr std::string_view kAttributePrefix = "attribute.";

enum ApplyInput {
  kApplyHandle,
  kApplyOffset,
  kApplyNextOffset,
  kApplyKinds,
  kApplyItemIds,
  kApplyVersions,
  kApplyTimes,
  kApplyKeys,
  kApplyExamples,
  kApplyVectors
};
enum StateOutput { kStateOffset, kStateCounts, kStateLastTime, kStateDrift };
enum FindInput { kFindHandle, kFindGiven, kFindFilled };

// The number of counts of DpsrItemChangesState.
constexpr int64_t kNumCounts = 8;

// Reads the attributes for filters from a serialized tf.train.Example.
tensorflow::Status ReadAttributes(const tstring& serialized, std::vector<AttributeValue>* attributes) {
  tensorflow::Example example;
  if (!example.ParseFromArray(serialized.data(), static_cast<int>(serialized.size()))) {
    return errors::InvalidArgument("an example of ", serialized.size(), " bytes is not a serialized tf.train.Example");
  }
  for (const auto& [name, feature] : example.features().feature()) {
    if (name.size() <= kAttributePrefix.size() || name.compare(0, kAttributePrefix.size(), kAttributePrefix) != 0) {
      continue;
    }
    AttributeValue& value = attributes->emplace_back();
    value.name = name.substr(kAttributePrefix.size());
    value.numbers.assign(feature.float_list().value().begin(), feature.float_list().value().end());
    for (const auto number : feature.int64_list().value()) value.numbers.push_back(static_cast<double>(number));
    value.texts.assign(feature.bytes_list().value().begin(), feature.bytes_list().value().end());
  }
  return tensorflow::OkStatus();
}

class ItemChangesApplyOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<const ItemIndex> items;
    OP_REQUIRES_OK(context, LoadedIndex(context, &items));
    for (const int input : {kApplyOffset, kApplyNextOffset}) {
      OP_REQUIRES(context, TensorShapeUtils::IsScalar(context->input(input).shape()),
                  errors::InvalidArgument(kNames[input], " has shape ", context->input(input).shape().DebugString(),
                                          ", expected a scalar"));
    }
    const TensorShape shape({context->input(kApplyKinds).NumElements()});
    for (int input = kApplyKinds; input <= kApplyExamples; ++input) {
      OP_REQUIRES_OK(context, CheckShape(kNames[input], context->input(input).shape(), shape));
    }
    std::vector<ItemChange> changes;
    OP_REQUIRES_OK(context, ReadChanges(context, items->index->d(), &changes));
    Tensor* applied = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({}), &applied));
    const int64_t offset = context->input(kApplyOffset).scalar<tensorflow::int64>()();
    const int64_t next_offset = context->input(kApplyNextOffset).scalar<tensorflow::int64>()();
    OP_REQUIRES_OK(context,
                   ToTensorFlow(items->fresh->Apply(offset, next_offset, changes, &applied->scalar<bool>()())));
  }

 private:
  static constexpr const char* kNames[] = {"handle",   "offset", "next_offset", "kinds",    "item_ids",
                                           "versions", "times",  "keys",        "examples", "vectors"};

  static tensorflow::Status ReadChanges(OpKernelContext* context, int64_t dim, std::vector<ItemChange>* changes) {
    const auto kinds = context->input(kApplyKinds).flat<int32>();
    const auto ids = context->input(kApplyItemIds).flat<tensorflow::int64>();
    const auto versions = context->input(kApplyVersions).flat<tensorflow::int64>();
    const auto times = context->input(kApplyTimes).flat<double>();
    const auto keys = context->input(kApplyKeys).flat<tstring>();
    const auto examples = context->input(kApplyExamples).flat<tstring>();
    changes->resize(kinds.size());
    int64_t puts = 0;
    for (int64_t i = 0; i < kinds.size(); ++i) puts += kinds(i) == static_cast<int32>(ItemChangeKind::kPut) ? 1 : 0;
    const Tensor& vectors = context->input(kApplyVectors);
    TF_RETURN_IF_ERROR(CheckShape("vectors", vectors.shape(), TensorShape({puts, dim})));
    const float* vector = vectors.flat<float>().data();
    for (int64_t i = 0; i < kinds.size(); ++i) {
      ItemChange& change = (*changes)[i];
      change.kind = static_cast<ItemChangeKind>(kinds(i));
      change.id = ids(i);
      change.version = versions(i);
      change.time = times(i);
      change.key = std::string(keys(i).data(), keys(i).size());
      if (!examples(i).empty()) TF_RETURN_IF_ERROR(ReadAttributes(examples(i), &change.attributes));
      if (change.kind != ItemChangeKind::kPut) continue;
      change.vector = vector;
      vector += dim;
    }
    return tensorflow::OkStatus();
  }
};

class ItemChangesStateOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<const ItemIndex> items;
    OP_REQUIRES_OK(context, LoadedIndex(context, &items));
    const FreshIndexState state = items->fresh->state();
    Tensor* outputs[4] = {};
    for (const int output : {kStateOffset, kStateCounts, kStateLastTime, kStateDrift}) {
      const TensorShape shape = output == kStateCounts ? TensorShape({kNumCounts}) : TensorShape({});
      OP_REQUIRES_OK(context, context->allocate_output(output, shape, &outputs[output]));
    }
    outputs[kStateOffset]->scalar<tensorflow::int64>()() = state.offset;
    const int64_t counts[kNumCounts] = {state.items,  state.open,    state.sealed,      state.segments,
                                        state.hidden, state.ignored, state.not_indexed, state.updated};
    for (int64_t i = 0; i < kNumCounts; ++i) outputs[kStateCounts]->flat<tensorflow::int64>()(i) = counts[i];
    outputs[kStateLastTime]->scalar<double>()() = state.last_time;
    outputs[kStateDrift]->scalar<float>()() = static_cast<float>(state.drift);
  }
};

tensorflow::Status CheckSameShape(OpKernelContext* context) {
  return CheckShape("the second input", context->input(kFindFilled).shape(), context->input(kFindGiven).shape());
}

class ChangedItemKeysOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<const ItemIndex> items;
    OP_REQUIRES_OK(context, LoadedIndex(context, &items));
    OP_REQUIRES_OK(context, CheckSameShape(context));
    const auto ids = context->input(kFindGiven).flat<tensorflow::int64>();
    const auto before = context->input(kFindFilled).flat<tstring>();
    Tensor* output = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(kFindGiven).shape(), &output));
    auto keys = output->flat<tstring>();
    for (int64_t i = 0; i < ids.size(); ++i) {
      keys(i) = before(i).empty() && ids(i) >= 0 ? tstring(items->fresh->FindKey(ids(i))) : before(i);
    }
  }
};

class ChangedItemIdsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<const ItemIndex> items;
    OP_REQUIRES_OK(context, LoadedIndex(context, &items));
    OP_REQUIRES_OK(context, CheckSameShape(context));
    const auto keys = context->input(kFindGiven).flat<tstring>();
    const auto before = context->input(kFindFilled).flat<tensorflow::int64>();
    Tensor* output = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(kFindGiven).shape(), &output));
    auto ids = output->flat<tensorflow::int64>();
    for (int64_t i = 0; i < keys.size(); ++i) {
      ids(i) = before(i) < 0 && !keys(i).empty() ? items->fresh->FindId({keys(i).data(), keys(i).size()}) : before(i);
    }
  }
};

tensorflow::Status FindShapes(InferenceContext* c) {
  ShapeHandle shape;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(kFindHandle), 0, &shape));
  TF_RETURN_IF_ERROR(c->Merge(c->input(kFindGiven), c->input(kFindFilled), &shape));
  c->set_output(0, shape);
  return tensorflow::OkStatus();
}

REGISTER_OP("DpsrItemChangesApply")
    .Input("handle: resource")
    .Input("offset: int64")
    .Input("next_offset: int64")
    .Input("kinds: int32")
    .Input("item_ids: int64")
    .Input("versions: int64")
    .Input("times: double")
    .Input("keys: string")
    .Input("examples: string")
    .Input("vectors: float")
    .Output("applied: bool")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle shape;
      for (const int input : {kApplyHandle, kApplyOffset, kApplyNextOffset}) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 0, &shape));
      }
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kApplyKinds), 1, &shape));
      for (int input = kApplyItemIds; input <= kApplyExamples; ++input) {
        TF_RETURN_IF_ERROR(c->Merge(shape, c->input(input), &shape));
      }
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kApplyVectors), 2, &shape));
      c->set_output(0, c->Scalar());
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Applies a batch of changes of items to a loaded index. Searches see all changes of the batch, or none.

handle: That of the index.
offset: The offset of the first change. If the index has another offset, nothing happens.
next_offset: The offset of the index after the batch.
kinds: [n], 0 puts an item (adds or replaces it), 1 updates attributes for filters, 2 deletes an item.
item_ids: [n], at least 0.
versions: [n], 0 if not given. A change with a lower version than that of the last change of its item is ignored.
times: [n], seconds since the epoch.
keys: [n], the shop's own ids, or "" if ids are numbers.
examples: [n], serialized tf.train.Example with features "attribute.NAME", empty for deletions. An update changes the
  attributes that it has. A feature without values makes the attribute missing. Attributes that the index does not have,
  and other features, are ignored.
vectors: [puts, dim], the embedding of each item that is put, in their order. An item whose vector is zero or not finite
  is hidden.
applied: Whether the index had this offset.
)doc");

REGISTER_OP("DpsrItemChangesState")
    .Input("handle: resource")
    .Output("offset: int64")
    .Output("counts: int64")
    .Output("last_time: double")
    .Output("drift: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &scalar));
      for (const int output : {kStateOffset, kStateLastTime, kStateDrift}) c->set_output(output, c->Scalar());
      c->set_output(kStateCounts, c->Vector(kNumCounts));
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Returns what the changes have done to an index.

handle: That of the index.
offset: The first change that has not been applied.
counts: [8], numbers of: visible items; those in the open segment; those in sealed segments; sealed segments; hidden
  entries of the base; changes that were ignored (an older version, or an update or deletion of an unknown id); puts
  whose vector is zero or not finite; updates of attributes.
last_time: The time of the last change, or 0.
drift: Mean squared distance of new vectors to what their codes stand for, over that of the items the index was built
  with. NaN if it is not known.
)doc");

REGISTER_OP("DpsrChangedItemKeys")
    .Input("handle: resource")
    .Input("item_ids: int64")
    .Input("keys: string")
    .Output("changed_keys: string")
    .SetIsStateful()
    .SetShapeFn(FindShapes)
    .Doc(R"doc(
Fills in the keys of items that changes have put.

handle: That of the index.
item_ids: Item ids, in any shape.
keys: The keys that are known already, in the same shape, or "".
changed_keys: The keys, in the same shape. "" where they are still not known.
)doc");

REGISTER_OP("DpsrChangedItemIds")
    .Input("handle: resource")
    .Input("keys: string")
    .Input("item_ids: int64")
    .Output("changed_ids: int64")
    .SetIsStateful()
    .SetShapeFn(FindShapes)
    .Doc(R"doc(
Fills in the ids of items that changes have put.

handle: That of the index.
keys: The shop's own ids, in any shape.
item_ids: The item ids that are known already, in the same shape, or -1.
changed_ids: The item ids, in the same shape. -1 where they are still not known.
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrItemChangesApply").Device(DEVICE_CPU), ItemChangesApplyOp);
REGISTER_KERNEL_BUILDER(Name("DpsrItemChangesState").Device(DEVICE_CPU), ItemChangesStateOp);
REGISTER_KERNEL_BUILDER(Name("DpsrChangedItemKeys").Device(DEVICE_CPU), ChangedItemKeysOp);
REGISTER_KERNEL_BUILDER(Name("DpsrChangedItemIds").Device(DEVICE_CPU), ChangedItemIdsOp);

}  // namespace
}  // namespace dpsr
