// tf.data source over the files of a store (DPSR section 5.1.2): each element is one ready training batch.
// A thin adapter of BatchSampler and TrainingStore; the Python wrapper is dpsr_tf/data/examples_dataset.py.

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/batch_sampler.h"
#include "dpsr_tf/ops/tf_columns.h"
#include "common/tf_packed_file.h"
#include "dpsr_tf/ops/training_store.h"
#include "tensorflow/core/framework/dataset.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/partial_tensor_shape.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "common/tf_status.h"

namespace dpsr {
namespace {

namespace data = ::tensorflow::data;
namespace errors = ::tensorflow::errors;
using ::tensorflow::Allocator;
using ::tensorflow::DataTypeVector;
using ::tensorflow::int32;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::PartialTensorShape;
using ::tensorflow::Tensor;
using ::tensorflow::tstring;

// Inputs say which examples come in which order, attributes what a batch holds of them. TensorFlow requires the name of
// a dataset op to end in "Dataset".
REGISTER_OP("DpsrExamplesDataset")
    .Input("users: string")
    .Input("items: string")
    .Input("interactions: string")  // [files]
    .Input("titles: string")        // read for title queries only
    .Input("vocabulary: string")    // read for those, and for queries with typos
    .Input("batch_size: int64")
    .Input("num_title_queries: int64")
    .Input("pretrain_steps: int64")
    .Input("num_shared_negatives: int64")
    .Input("num_supervised_negatives: int64")
    .Input("shuffle_buffer: int64")
    .Input("seed: int64")
    .Input("num_epochs: int64")
    .Input("shard_index: int64")
    .Input("num_shards: int64")
    .Input("first_step: int64")
    .Attr("title_subsampling: float = 0")
    .Attr("title_typo_rate: float = 0")
    .Attr("query_typo_rate: float = 0")
    .Attr("num_own_negatives: int = 0")
    .Attr("own_negative_source: {'impressions', 'labels', 'both'} = 'impressions'")
    .Attr("user_fixed: list(string) = []")
    .Attr("user_lists: list(string) = []")
    .Attr("item_fixed: list(string) = []")
    .Attr("item_lists: list(string) = []")
    .Attr("history_length: int = 0")
    .Attr("history_types: int = 0")
    .Attr("history_text: bool = false")
    .Attr("history_fixed: list(string) = []")
    .Attr("history_lists: list(string) = []")
    .Attr("query_history_length: int = 0")
    .Attr("negative_mask: bool = true")
    .Attr("num_parallel_calls: int = 0")
    .Output("handle: variant")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      for (int i = 0; i < c->num_inputs(); ++i) {
        tensorflow::shape_inference::ShapeHandle checked;
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), i == 2 ? 1 : 0, &checked));
      }
      c->set_output(0, c->Scalar());
      return tensorflow::OkStatus();
    });

constexpr const char* kInteractionsInput = "interactions";
constexpr int64_t kMostParallelCalls = 1024;
// Queries between a prefetch and its use.
constexpr size_t kAhead = 8;

// All arguments of the op.
struct Arguments {
  TrainingStore::Options store;
  BatchOptions batch;
  std::string own_negative_source;
  bool history_text = false;
  bool negative_mask = true;
  int64_t first_step = 0;  // where a resumed training goes on
  int64_t num_parallel_calls = 0;

  // Calls visit(name, value) for each int64 input; their order is that of the op.
  template <typename Visit>
  tensorflow::Status VisitInputs(Visit visit) {
    for (auto [name, value] :
         {std::pair{"batch_size", &batch.batch_size}, {"num_title_queries", &batch.num_title_queries},
          {"pretrain_steps", &batch.pretrain_steps}, {"num_shared_negatives", &batch.num_shared_negatives},
          {"num_supervised_negatives", &batch.num_supervised_negatives}, {"shuffle_buffer", &batch.shuffle_buffer},
          {"seed", &batch.seed}, {"num_epochs", &batch.num_epochs}, {"shard_index", &batch.shard_index},
          {"num_shards", &batch.num_shards}, {"first_step", &first_step}}) {
      TF_RETURN_IF_ERROR(visit(name, value));
    }
    return tensorflow::OkStatus();
  }
  // The same for each attribute.
  template <typename Visit>
  tensorflow::Status VisitAttributes(Visit visit) {
    for (auto [name, value] :
         {std::pair{"num_own_negatives", &batch.num_own_negatives}, {"history_length", &batch.history_length},
          {"history_types", &batch.history_types}, {"query_history_length", &batch.query_history_length},
          {"num_parallel_calls", &num_parallel_calls}}) {
      TF_RETURN_IF_ERROR(visit(name, value));
    }
    for (auto [name, value] :
         {std::pair{"user_fixed", &store.user_features.fixed}, {"user_lists", &store.user_features.lists},
          {"item_fixed", &store.item_features.fixed}, {"item_lists", &store.item_features.lists},
          {"history_fixed", &store.history_features.fixed}, {"history_lists", &store.history_features.lists}}) {
      TF_RETURN_IF_ERROR(visit(name, value));
    }
    TF_RETURN_IF_ERROR(visit("title_subsampling", &batch.title_subsampling));
    TF_RETURN_IF_ERROR(visit("title_typo_rate", &batch.title_typo_rate));
    TF_RETURN_IF_ERROR(visit("query_typo_rate", &batch.query_typo_rate));
    TF_RETURN_IF_ERROR(visit("own_negative_source", &own_negative_source));
    TF_RETURN_IF_ERROR(visit("history_text", &history_text));
    return visit("negative_mask", &negative_mask);
  }
};

class ExamplesDataset : public data::DatasetBase {
 public:
  ExamplesDataset(data::DatasetContext&& context, Arguments arguments, std::unique_ptr<TrainingStore> store)
      : DatasetBase(std::move(context)),
        arguments_(std::move(arguments)),
        store_(std::move(store)),
        sampler_(*store_, arguments_.batch) {
    // dpsr_tf/data/examples_dataset.py has the same components, in this order and that of Assemble.
    const BatchOptions& o = arguments_.batch;
    const int64_t b = o.batch_size, shared = b + o.num_shared_negatives, items = shared + b * o.num_own_negatives;
    AddTokens(b);
    Add(tensorflow::DT_INT32, {b});
    AddTokens(items);
    Add(tensorflow::DT_INT32, {items});
    AddFeatures(items, store_->items().features());
    Add(tensorflow::DT_INT32, {b});
    AddFeatures(b, store_->user_features());
    AddTokens(b);                     // history: item rows,
    Add(tensorflow::DT_INT32, {-1});  // types,
    AddTokens(arguments_.history_text ? -1 : 0);
    AddFeatures(-1, store_->history_features());
    Add(tensorflow::DT_INT64, {b + 1});  // past queries
    AddTokens(-1);
    Add(tensorflow::DT_FLOAT, {b});
    Add(tensorflow::DT_FLOAT, {b});
    Add(tensorflow::DT_INT32, {b});
    Add(tensorflow::DT_BOOL, {b, arguments_.negative_mask ? shared : 0});
    Add(tensorflow::DT_BOOL, {b, o.num_own_negatives});
  }

  std::unique_ptr<data::IteratorBase> MakeIteratorInternal(const std::string& prefix) const override {
    return std::make_unique<Iterator>(Iterator::Params{this, tensorflow::strings::StrCat(prefix, "::DpsrExamples")});
  }
  const DataTypeVector& output_dtypes() const override { return dtypes_; }
  const std::vector<PartialTensorShape>& output_shapes() const override { return shapes_; }
  std::string DebugString() const override { return "DpsrExamplesDataset(" + arguments_.store.users + ")"; }
  tensorflow::Status InputDatasets(std::vector<const DatasetBase*>*) const override { return tensorflow::OkStatus(); }
  tensorflow::Status CheckExternalState() const override { return tensorflow::OkStatus(); }
  int64_t CardinalityInternal(data::CardinalityOptions) const override {
    return sampler_.num_batches() < 0 ? data::kInfiniteCardinality
                                      : std::max<int64_t>(0, sampler_.num_batches() - arguments_.first_step);
  }

 protected:
  tensorflow::Status AsGraphDefInternal(data::SerializationContext*, DatasetGraphDefBuilder* b,
                                        tensorflow::Node** output) const override {
    Arguments arguments = arguments_;
    std::vector<tensorflow::Node*> nodes(5);
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(arguments.store.users), &nodes[0]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(arguments.store.items), &nodes[1]));
    const std::vector<std::string>& files = arguments.store.interactions;
    TF_RETURN_IF_ERROR(b->AddVector(std::vector<tstring>(files.begin(), files.end()), &nodes[2]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(arguments.store.titles), &nodes[3]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(arguments.store.vocabulary), &nodes[4]));
    TF_RETURN_IF_ERROR(arguments.VisitInputs(
        [&](const char*, int64_t* value) { return b->AddScalar(*value, &nodes.emplace_back()); }));
    std::vector<std::pair<size_t, tensorflow::Node*>> inputs;
    for (size_t i = 0; i < nodes.size(); ++i) inputs.emplace_back(i, nodes[i]);
    std::vector<std::pair<tensorflow::StringPiece, tensorflow::AttrValue>> attributes;
    TF_RETURN_IF_ERROR(arguments.VisitAttributes([&](const char* name, const auto* value) {
      b->BuildAttrValue(*value, &attributes.emplace_back(name, tensorflow::AttrValue()).second);
      return tensorflow::OkStatus();
    }));
    return b->AddDataset(this, inputs, {}, attributes, output);
  }

 private:
  // A batch that is assembled ahead, by the runner or, where that has not begun, by whoever needs it.
  class Slot {
   public:
    explicit Slot(int64_t step) : step_(step) {}

    void Assemble(const ExamplesDataset& dataset, Allocator* allocator) {
      if (!Claim()) return;
      dataset.Assemble(step_, allocator, &tensors_);
      tensorflow::mutex_lock lock(mu_);
      state_ = kDone;
      done_.notify_all();
    }
    std::vector<Tensor> Take() {
      Wait();
      return std::move(tensors_);
    }
    // After this nobody works on it.
    void Abandon() {
      if (!Claim()) Wait();
    }

   private:
    enum State { kWaiting, kClaimed, kDone };

    bool Claim() {
      tensorflow::mutex_lock lock(mu_);
      if (state_ != kWaiting) return false;
      state_ = kClaimed;
      return true;
    }
    void Wait() {  // for a computation that is going on: never long, so there is nothing to cancel
      tensorflow::mutex_lock lock(mu_);
      while (state_ != kDone) done_.wait(lock);
    }

    const int64_t step_;
    std::vector<Tensor> tensors_;
    tensorflow::mutex mu_;
    tensorflow::condition_variable done_;
    State state_ TF_GUARDED_BY(mu_) = kWaiting;
  };

  class Iterator : public data::DatasetIterator<ExamplesDataset> {
   public:
    explicit Iterator(const Params& params)
        : DatasetIterator(params), step_(params.dataset->arguments_.first_step) {}
    ~Iterator() override { AbandonAll(); }

    tensorflow::Status GetNextInternal(data::IteratorContext* context, std::vector<Tensor>* out,
                                       bool* end_of_sequence) override {
      const ExamplesDataset& d = *dataset();
      Allocator* allocator = context->allocator({});
      const int64_t parallel = d.arguments_.num_parallel_calls;
      std::shared_ptr<Slot> slot;
      int64_t step;
      {
        tensorflow::mutex_lock lock(mu_);
        *end_of_sequence = d.IsEnd(step_);
        if (*end_of_sequence) return tensorflow::OkStatus();
        step = step_++;
        if (parallel > 0) {
          if (ahead_.empty()) ahead_.push_back(std::make_shared<Slot>(step));
          slot = std::move(ahead_.front());
          ahead_.pop_front();
          while (static_cast<int64_t>(ahead_.size()) < parallel) {
            const int64_t next = step_ + static_cast<int64_t>(ahead_.size());
            if (d.IsEnd(next)) break;
            ahead_.push_back(std::make_shared<Slot>(next));
            // A slot that the runner comes to late has been taken or abandoned by then; only while it works on one does
            // it need the dataset, and whoever destroys the iterator waits for that.
            (*context->runner())([slot = ahead_.back(), &d, allocator] { slot->Assemble(d, allocator); });
          }
        }
      }
      if (slot == nullptr) {
        d.Assemble(step, allocator, out);
      } else {
        slot->Assemble(d, allocator);
        *out = slot->Take();
      }
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
      AbandonAll();
      tensorflow::mutex_lock lock(mu_);
      step_ = step;
      return tensorflow::OkStatus();
    }

   private:
    void AbandonAll() {
      tensorflow::mutex_lock lock(mu_);
      for (const std::shared_ptr<Slot>& slot : ahead_) slot->Abandon();
      ahead_.clear();
    }

    tensorflow::mutex mu_;
    int64_t step_ TF_GUARDED_BY(mu_);                          // the next batch to give
    std::deque<std::shared_ptr<Slot>> ahead_ TF_GUARDED_BY(mu_);  // batches step_, step_ + 1, ...
  };

  bool IsEnd(int64_t step) const { return sampler_.num_batches() >= 0 && step >= sampler_.num_batches(); }

  void Add(tensorflow::DataType dtype, PartialTensorShape shape) {
    dtypes_.push_back(dtype);
    shapes_.push_back(std::move(shape));
  }
  void AddTokens(int64_t texts) {  // -1: any number
    Add(tensorflow::DT_INT32, {-1});
    Add(tensorflow::DT_INT64, {texts < 0 ? -1 : texts + 1});
  }
  void AddFeatures(int64_t rows, const FeatureColumns& features) {
    Add(tensorflow::DT_INT32, {rows, static_cast<int64_t>(features.fixed.size())});
    for (size_t i = 0; i < features.lists.size(); ++i) AddTokens(rows);
  }

  // Makes the components of batch `step`.
  void Assemble(int64_t step, Allocator* allocator, std::vector<Tensor>* out) const {
    std::unique_ptr<Batch> batch = TakeBatch();
    sampler_.Sample(step, batch.get());
    out->clear();
    out->reserve(dtypes_.size());
    const int64_t b = static_cast<int64_t>(batch->query.size());
    const int64_t shared = b + arguments_.batch.num_shared_negatives;

    AppendQueries(batch.get(), allocator, out);
    AppendVector<int32>(batch->query, allocator, out);
    AppendTokens(store_->items().text(), View(batch->item), allocator, out);
    AppendVector<int32>(batch->item, allocator, out);
    AppendFeatures(store_->items().features(), View(batch->item), allocator, out);
    AppendVector<int32>(batch->user, allocator, out);
    AppendFeatures(store_->user_features(), View(batch->user), allocator, out);
    AppendVector<int32>(batch->history_item, allocator, out);
    AppendVector<int64_t>(batch->history_splits, allocator, out);
    AppendVector<int32>(batch->history_type, allocator, out);
    const Span<const int32_t> history = View(batch->history_item);
    AppendTokens(store_->items().text(), arguments_.history_text ? history : Span<const int32_t>(), allocator, out);
    AppendFeatures(store_->history_features(), history, allocator, out);
    AppendVector<int64_t>(batch->query_history_splits, allocator, out);
    AppendPastQueries(batch.get(), allocator, out);
    AppendVector<float>(batch->weight, allocator, out);
    AppendVector<float>(batch->label, allocator, out);
    AppendVector<int32>(batch->type, allocator, out);
    out->emplace_back(allocator, tensorflow::DT_BOOL, tensorflow::TensorShape({b, arguments_.negative_mask ? shared : 0}));
    if (arguments_.negative_mask) sampler_.NegativeMask(batch.get(), out->back().flat<bool>().data());
    out->emplace_back(allocator, tensorflow::DT_BOOL,
                      tensorflow::TensorShape({b, arguments_.batch.num_own_negatives}));
    std::copy(batch->own_negative_mask.begin(), batch->own_negative_mask.end(), out->back().flat<bool>().data());
    ReturnBatch(std::move(batch));
  }

  static Span<const int32_t> View(const std::vector<int32_t>& rows) { return {rows.data(), rows.size()}; }

  template <typename T>
  static void AppendVector(const std::vector<T>& values, Allocator* allocator, std::vector<Tensor>* out) {
    out->emplace_back(allocator, tensorflow::DataTypeToEnum<T>::value,
                      tensorflow::TensorShape({static_cast<int64_t>(values.size())}));
    std::copy(values.begin(), values.end(), out->back().flat<T>().data());
  }
  static void AppendTokens(const RaggedColumn& column, Span<const int32_t> rows, Allocator* allocator,
                           std::vector<Tensor>* out) {
    out->resize(out->size() + 2);
    GatherTokens(column, rows, allocator, &(*out)[out->size() - 2], &out->back());
  }
  static void AppendFeatures(const FeatureColumns& features, Span<const int32_t> rows, Allocator* allocator,
                             std::vector<Tensor>* out) {
    out->push_back(GatherCodesTensor(features, rows, allocator));
    for (const RaggedColumn& column : features.lists) AppendTokens(column, rows, allocator, out);
  }
  // The queries as the log has them, then those that were made.
  void AppendQueries(Batch* batch, Allocator* allocator, std::vector<Tensor>* out) const {
    const size_t made = batch->made_splits.size() - 1;
    FindQueryTexts({batch->query.data(), batch->query.size() - made}, &batch->texts);
    for (size_t i = 0; i < made; ++i) {
      const int64_t begin = batch->made_splits[i], end = batch->made_splits[i + 1];
      batch->texts.emplace_back(batch->made_tokens.data() + begin, static_cast<size_t>(end - begin));
    }
    AppendTexts(batch->texts, allocator, out);
  }
  void AppendPastQueries(Batch* batch, Allocator* allocator, std::vector<Tensor>* out) const {
    FindQueryTexts(View(batch->query_history), &batch->texts);
    AppendTexts(batch->texts, allocator, out);
  }
  // The tokens of queries, which may lie in several files.
  void FindQueryTexts(Span<const int32_t> queries, std::vector<Span<const int32_t>>* texts) const {
    texts->resize(queries.size());
    for (size_t i = 0; i < queries.size(); ++i) {
      if (i + kAhead < queries.size()) store_->PrefetchQuery(queries[i + kAhead]);
      (*texts)[i] = store_->query_tokens(queries[i]);
      __builtin_prefetch((*texts)[i].data());
    }
  }
  static void AppendTexts(const std::vector<Span<const int32_t>>& texts, Allocator* allocator,
                          std::vector<Tensor>* out) {
    Tensor splits(allocator, tensorflow::DT_INT64, {static_cast<int64_t>(texts.size()) + 1});
    int64_t* split = splits.flat<int64_t>().data();
    *split = 0;
    for (const Span<const int32_t>& text : texts) {
      split[1] = split[0] + static_cast<int64_t>(text.size());
      ++split;
    }
    Tensor values(allocator, tensorflow::DT_INT32, {*split});
    int32* value = values.flat<int32>().data();
    for (const Span<const int32_t>& text : texts) value = std::copy(text.begin(), text.end(), value);
    out->push_back(std::move(values));
    out->push_back(std::move(splits));
  }

  // Batches keep their memory from one step to the next; there are as many as are assembled at once.
  std::unique_ptr<Batch> TakeBatch() const {
    tensorflow::mutex_lock lock(mu_);
    if (spare_.empty()) return std::make_unique<Batch>();
    std::unique_ptr<Batch> batch = std::move(spare_.back());
    spare_.pop_back();
    return batch;
  }
  void ReturnBatch(std::unique_ptr<Batch> batch) const {
    tensorflow::mutex_lock lock(mu_);
    spare_.push_back(std::move(batch));
  }

  const Arguments arguments_;
  const std::unique_ptr<TrainingStore> store_;
  const BatchSampler sampler_;
  DataTypeVector dtypes_;
  std::vector<PartialTensorShape> shapes_;
  mutable tensorflow::mutex mu_;
  mutable std::vector<std::unique_ptr<Batch>> spare_ TF_GUARDED_BY(mu_);
};

class ExamplesDatasetOp : public data::DatasetOpKernel {
 public:
  explicit ExamplesDatasetOp(OpKernelConstruction* c) : DatasetOpKernel(c) {
    OP_REQUIRES_OK(c, attributes_.VisitAttributes([c](const char* name, auto* value) { return c->GetAttr(name, value); }));
    const int64_t parallel = attributes_.num_parallel_calls;
    OP_REQUIRES(c, parallel >= 0 && parallel <= kMostParallelCalls,
                errors::InvalidArgument("num_parallel_calls is ", parallel, ", expected 0 to ", kMostParallelCalls));
  }

  void MakeDataset(OpKernelContext* c, data::DatasetBase** output) override {
    Arguments arguments = attributes_;
    TrainingStore::Options& store_options = arguments.store;
    BatchOptions& batch = arguments.batch;
    tstring users, items, titles, vocabulary;
    std::vector<tstring> interactions;
    OP_REQUIRES_OK(c, data::ParseScalarArgument<tstring>(c, "users", &users));
    OP_REQUIRES_OK(c, data::ParseScalarArgument<tstring>(c, "items", &items));
    OP_REQUIRES_OK(c, data::ParseVectorArgument<tstring>(c, kInteractionsInput, &interactions));
    OP_REQUIRES_OK(c, data::ParseScalarArgument<tstring>(c, "titles", &titles));
    OP_REQUIRES_OK(c, data::ParseScalarArgument<tstring>(c, "vocabulary", &vocabulary));
    OP_REQUIRES_OK(c, arguments.VisitInputs([c](const char* name, int64_t* value) {
      return data::ParseScalarArgument<int64_t>(c, name, value);
    }));
    batch.own_impressions = arguments.own_negative_source != "labels";
    batch.own_labels = arguments.own_negative_source != "impressions";
    OP_REQUIRES_OK(c, ToTensorFlow(BatchSampler::Validate(batch)));
    OP_REQUIRES(c, arguments.first_step >= 0 && arguments.first_step <= BatchSampler::kMaxStep,
                errors::InvalidArgument("first_step is ", arguments.first_step, ", expected 0 to ",
                                        BatchSampler::kMaxStep));
    store_options.users = users;
    store_options.items = items;
    store_options.interactions.assign(interactions.begin(), interactions.end());
    store_options.has_titles = batch.num_title_queries > 0 || batch.pretrain_steps > 0;
    store_options.has_query_texts = batch.query_typo_rate > 0;
    store_options.titles = titles;
    store_options.vocabulary = vocabulary;
    store_options.events = batch.history_length > 0 || batch.query_history_length > 0;
    store_options.impressions = batch.num_own_negatives > 0 && !batch.own_labels;
    store_options.impressions_if_any = batch.num_own_negatives > 0 && batch.own_impressions;
    store_options.shard_index = batch.shard_index;
    store_options.num_shards = batch.num_shards;
    std::unique_ptr<TrainingStore> store;
    OP_REQUIRES_OK(c, ToTensorFlow(TrainingStore::Open(store_options, OpenPackedFile, &store)));
    *output = new ExamplesDataset(data::DatasetContext(c), std::move(arguments), std::move(store));
  }

 private:
  Arguments attributes_;  // and no inputs
};

REGISTER_KERNEL_BUILDER(Name("DpsrExamplesDataset").Device(tensorflow::DEVICE_CPU), ExamplesDatasetOp);

}  // namespace
}  // namespace dpsr
