// tf.data source over the three files of a store (DPSR section 5.1.2): each element is one ready training batch.
// A thin adapter of BatchSampler and TrainingStore; the Python wrapper is dpsr_tf/data/dataset.py.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/batch_sampler.h"
#include "dpsr_tf/ops/training_store.h"
#include "tensorflow/core/framework/dataset.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/partial_tensor_shape.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tokenizer_cc/tf_status.h"

namespace dpsr {
namespace {

namespace data = ::tensorflow::data;
namespace errors = ::tensorflow::errors;
using ::tensorflow::DataTypeVector;
using ::tensorflow::int32;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::PartialTensorShape;
using ::tensorflow::Tensor;
using ::tensorflow::tstring;

// TensorFlow requires the name of a dataset op to end in "Dataset".
REGISTER_OP("DpsrExamplesDataset")
    .Input("users: string")
    .Input("items: string")
    .Input("interactions: string")
    .Input("batch_size: int64")
    .Input("num_title_queries: int64")
    .Input("num_shared_negatives: int64")
    .Input("num_supervised_negatives: int64")
    .Input("seed: int64")
    .Input("num_epochs: int64")
    .Input("shard_index: int64")
    .Input("num_shards: int64")
    .Input("first_step: int64")
    .Attr("user_features: list(string) >= 0")
    .Output("handle: variant")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      for (int i = 0; i < c->num_inputs(); ++i) {
        tensorflow::shape_inference::ShapeHandle scalar;
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &scalar));
      }
      c->set_output(0, c->Scalar());
      return tensorflow::OkStatus();
    });

// The components of an element, in order.
enum Component { kQueryTokens, kQuerySplits, kItemTokens, kItemSplits, kItemRows, kUserFeatures, kWeights, kNegativeMask };

class ExamplesDataset : public data::DatasetBase {
 public:
  ExamplesDataset(data::DatasetContext&& context, TrainingStore::Paths paths, std::vector<std::string> user_features,
                  const BatchOptions& options, int64_t first_step, std::unique_ptr<TrainingStore> store)
      : DatasetBase(std::move(context)),
        paths_(std::move(paths)),
        user_features_(std::move(user_features)),
        options_(options),
        first_step_(first_step),
        store_(std::move(store)),
        sampler_(*store_, options_) {
    const int64_t b = options_.batch_size, items = b + options_.num_shared_negatives;
    shapes_.resize(kNegativeMask + 1);
    shapes_[kQueryTokens] = PartialTensorShape({-1});
    shapes_[kQuerySplits] = PartialTensorShape({b + 1});
    shapes_[kItemTokens] = PartialTensorShape({-1});
    shapes_[kItemSplits] = PartialTensorShape({items + 1});
    shapes_[kItemRows] = PartialTensorShape({items});
    shapes_[kUserFeatures] = PartialTensorShape({b, static_cast<int64_t>(user_features_.size())});
    shapes_[kWeights] = PartialTensorShape({b});
    shapes_[kNegativeMask] = PartialTensorShape({b, items});
  }

  std::unique_ptr<data::IteratorBase> MakeIteratorInternal(const std::string& prefix) const override {
    return std::make_unique<Iterator>(Iterator::Params{this, tensorflow::strings::StrCat(prefix, "::DpsrExamples")});
  }
  const DataTypeVector& output_dtypes() const override {
    static const auto* dtypes = new DataTypeVector(
        {tensorflow::DT_INT32, tensorflow::DT_INT64, tensorflow::DT_INT32, tensorflow::DT_INT64, tensorflow::DT_INT32,
         tensorflow::DT_INT32, tensorflow::DT_FLOAT, tensorflow::DT_BOOL});
    return *dtypes;
  }
  const std::vector<PartialTensorShape>& output_shapes() const override { return shapes_; }
  std::string DebugString() const override { return "DpsrExamplesDataset(" + paths_.interactions + ")"; }
  tensorflow::Status InputDatasets(std::vector<const DatasetBase*>*) const override { return tensorflow::OkStatus(); }
  tensorflow::Status CheckExternalState() const override { return tensorflow::OkStatus(); }
  int64_t CardinalityInternal(data::CardinalityOptions) const override {
    return sampler_.num_batches() < 0 ? data::kInfiniteCardinality
                                      : std::max<int64_t>(0, sampler_.num_batches() - first_step_);
  }

 protected:
  tensorflow::Status AsGraphDefInternal(data::SerializationContext*, DatasetGraphDefBuilder* b,
                                        tensorflow::Node** output) const override {
    std::vector<tensorflow::Node*> inputs;
    for (const std::string& path : {paths_.users, paths_.items, paths_.interactions}) {
      TF_RETURN_IF_ERROR(b->AddScalar(tstring(path), &inputs.emplace_back()));
    }
    for (int64_t value : {options_.batch_size, options_.num_title_queries, options_.num_shared_negatives, options_.num_supervised_negatives,
                          options_.seed, options_.num_epochs, options_.shard_index, options_.num_shards, first_step_}) {
      TF_RETURN_IF_ERROR(b->AddScalar(value, &inputs.emplace_back()));
    }
    tensorflow::AttrValue user_features;
    b->BuildAttrValue(user_features_, &user_features);
    std::vector<std::pair<size_t, tensorflow::Node*>> indexed;
    for (size_t i = 0; i < inputs.size(); ++i) indexed.emplace_back(i, inputs[i]);
    return b->AddDataset(this, indexed, {}, {{"user_features", user_features}}, output);
  }

 private:
  class Iterator : public data::DatasetIterator<ExamplesDataset> {
   public:
    explicit Iterator(const Params& params) : DatasetIterator(params), step_(params.dataset->first_step_) {}

    tensorflow::Status GetNextInternal(data::IteratorContext* context, std::vector<Tensor>* out,
                                       bool* end_of_sequence) override {
      const ExamplesDataset& d = *dataset();
      int64_t step;
      {
        tensorflow::mutex_lock lock(mu_);
        *end_of_sequence = d.sampler_.num_batches() >= 0 && step_ >= d.sampler_.num_batches();
        if (*end_of_sequence) return tensorflow::OkStatus();
        step = step_++;
      }
      d.Assemble(step, context->allocator({}), out);
      return tensorflow::OkStatus();
    }

   protected:
    std::shared_ptr<data::model::Node> CreateNode(data::IteratorContext*,
                                                  data::model::Node::Args args) const override {
      return data::model::MakeSourceNode(std::move(args));
    }
    // A batch is a function of its number, so the number is the whole state.
    tensorflow::Status SaveInternal(data::SerializationContext*, data::IteratorStateWriter* writer) override {
      tensorflow::mutex_lock lock(mu_);
      return writer->WriteScalar(full_name("step"), step_);
    }
    tensorflow::Status RestoreInternal(data::IteratorContext*, data::IteratorStateReader* reader) override {
      int64_t step;
      TF_RETURN_IF_ERROR(reader->ReadScalar(full_name("step"), &step));
      if (step < 0 || step > BatchSampler::kMaxStep) {
        return errors::DataLoss("the saved iterator is at step ", step, ", expected 0 to ", BatchSampler::kMaxStep);
      }
      tensorflow::mutex_lock lock(mu_);
      step_ = step;
      return tensorflow::OkStatus();
    }

   private:
    tensorflow::mutex mu_;
    int64_t step_ TF_GUARDED_BY(mu_);
  };

  void Assemble(int64_t step, tensorflow::Allocator* allocator, std::vector<Tensor>* out) const {
    Batch batch;
    sampler_.Sample(step, &batch);
    const int64_t b = batch.query.size(), items = batch.item.size(), features = user_features_.size();
    out->resize(kNegativeMask + 1);
    (*out)[kQueryTokens] = ToTensor<int32>(batch.query_tokens, allocator);
    (*out)[kQuerySplits] = ToTensor<int64_t>(batch.query_splits, allocator);
    GatherTokens(store_->item_tokens(), batch.item, allocator, &(*out)[kItemTokens], &(*out)[kItemSplits]);
    Tensor profile(allocator, tensorflow::DT_INT32, {b, features});
    auto codes = profile.matrix<int32>();
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t f = 0; f < features; ++f) codes(i, f) = store_->user_features()[f][batch.user[i]];
    }
    Tensor mask(allocator, tensorflow::DT_BOOL, {b, items});
    sampler_.NegativeMask(batch, mask.flat<bool>().data());
    (*out)[kItemRows] = ToTensor<int32>(batch.item, allocator);
    (*out)[kUserFeatures] = std::move(profile);
    (*out)[kWeights] = ToTensor<float>(batch.weight, allocator);
    (*out)[kNegativeMask] = std::move(mask);
  }

  template <typename T>
  static Tensor ToTensor(const std::vector<T>& values, tensorflow::Allocator* allocator) {
    Tensor tensor(allocator, tensorflow::DataTypeToEnum<T>::value, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), tensor.flat<T>().data());
    return tensor;
  }

  static void GatherTokens(const RaggedColumn& column, const std::vector<int32_t>& rows,
                           tensorflow::Allocator* allocator, Tensor* values, Tensor* splits) {
    *splits = Tensor(allocator, tensorflow::DT_INT64, {static_cast<int64_t>(rows.size()) + 1});
    auto split = splits->vec<int64_t>();
    split(0) = 0;
    for (size_t i = 0; i < rows.size(); ++i) split(i + 1) = split(i) + column.length(rows[i]);
    *values = Tensor(allocator, tensorflow::DT_INT32, {split(rows.size())});
    int32* out = values->flat<int32>().data();
    for (int32_t row : rows) {
      const Span<const int32_t> tokens = column[row];
      out = std::copy(tokens.begin(), tokens.end(), out);
    }
  }

  const TrainingStore::Paths paths_;
  const std::vector<std::string> user_features_;
  const BatchOptions options_;
  const int64_t first_step_;  // where a resumed training goes on
  const std::unique_ptr<TrainingStore> store_;
  const BatchSampler sampler_;
  std::vector<PartialTensorShape> shapes_;
};

class ExamplesDatasetOp : public data::DatasetOpKernel {
 public:
  explicit ExamplesDatasetOp(OpKernelConstruction* c) : DatasetOpKernel(c) {
    OP_REQUIRES_OK(c, c->GetAttr("user_features", &user_features_));
  }

  void MakeDataset(OpKernelContext* c, data::DatasetBase** output) override {
    TrainingStore::Paths paths;
    BatchOptions options;
    int64_t first_step;
    for (auto [name, value] : {std::pair{"users", &paths.users}, {"items", &paths.items},
                               {"interactions", &paths.interactions}}) {
      tstring path;
      OP_REQUIRES_OK(c, data::ParseScalarArgument<tstring>(c, name, &path));
      *value = path;
    }
    for (auto [name, value] :
         {std::pair{"batch_size", &options.batch_size}, {"num_title_queries", &options.num_title_queries},
          {"num_shared_negatives", &options.num_shared_negatives},
          {"num_supervised_negatives", &options.num_supervised_negatives}, {"seed", &options.seed},
          {"num_epochs", &options.num_epochs}, {"shard_index", &options.shard_index},
          {"num_shards", &options.num_shards}, {"first_step", &first_step}}) {
      OP_REQUIRES_OK(c, data::ParseScalarArgument<int64_t>(c, name, value));
    }
    OP_REQUIRES_OK(c, ToTensorFlow(BatchSampler::Validate(options)));
    OP_REQUIRES(c, first_step >= 0 && first_step <= BatchSampler::kMaxStep,
                errors::InvalidArgument("first_step is ", first_step, ", expected 0 to ", BatchSampler::kMaxStep));
    std::unique_ptr<TrainingStore> store;
    OP_REQUIRES_OK(c, ToTensorFlow(TrainingStore::Open(paths, user_features_, &store)));
    *output = new ExamplesDataset(data::DatasetContext(c), std::move(paths), user_features_, options, first_step,
                                  std::move(store));
  }

 private:
  std::vector<std::string> user_features_;
};

REGISTER_KERNEL_BUILDER(Name("DpsrExamplesDataset").Device(tensorflow::DEVICE_CPU), ExamplesDatasetOp);

}  // namespace
}  // namespace dpsr
