// A tf.data source over the files of a store (DPSR section 5.1.2), each element of which is a complete training batch:
// a thin adapter of BatchSampler and TrainingStore. The Python wrapper is dpsr_tf/data/examples_dataset.py.

#include <deque>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tf_op.h"
#include "common/tf_packed_file.h"
#include "dpsr_tf/ops/batch_components.h"
#include "dpsr_tf/ops/batch_options.h"
#include "dpsr_tf/ops/batch_sampler.h"
#include "dpsr_tf/ops/tf_columns.h"
#include "dpsr_tf/ops/training_store.h"
#include "tensorflow/core/framework/dataset.h"
#include "tensorflow/core/framework/partial_tensor_shape.h"

namespace dpsr {
namespace {

namespace data = ::tensorflow::data;
using ::tensorflow::Allocator;
using ::tensorflow::DataTypeVector;
using ::tensorflow::PartialTensorShape;

// TensorFlow requires the name of a dataset op to end in "Dataset".
enum Input { kUsers, kItems, kInteractions, kQueries, kTitles, kVocabulary, kGraph, kFirstStep };
constexpr const char* kInputNames[] = {"users",      "items", "interactions", "queries", "titles",
                                       "vocabulary", "graph", "first_step"};

REGISTER_OP("DpsrExamplesDataset")
    .Input("users: string")         // files of the store
    .Input("items: string")
    .Input("interactions: string")  // [files]
    .Input("queries: int64")        // [files], number of queries of each interactions file; [0] if it is not known
    .Input("titles: string")        // read for title queries only
    .Input("vocabulary: string")    // read for title queries and for logged queries with typing errors only
    .Input("graph: string")         // [files]; read for neighbours only
    .Input("first_step: int64")     // number of the first batch
    .Attr("options: string")        // JSON, see batch_options.h
    .Output("handle: variant")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      for (int i = 0; i < c->num_inputs(); ++i) {
        tensorflow::shape_inference::ShapeHandle checked;
        const bool is_list = i == kInteractions || i == kQueries || i == kGraph;
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), is_list ? 1 : 0, &checked));
      }
      c->set_output(0, c->Scalar());
      return tensorflow::OkStatus();
    });

// Queries between a prefetch and its use.
constexpr size_t kAhead = 8;

// What the op was given.
struct Arguments {
  std::string options_json;
  BatchOptions options;
  TrainingStore::Options store;
  int64_t first_step = 0;
};

class ExamplesDataset : public data::DatasetBase {
 public:
  ExamplesDataset(data::DatasetContext&& context, Arguments arguments, std::unique_ptr<TrainingStore> store)
      : DatasetBase(std::move(context)),
        arguments_(std::move(arguments)),
        store_(std::move(store)),
        sampler_(*store_, arguments_.options) {
    for (const BatchComponent& component : BatchComponents(arguments_.options)) {
      tensorflow::DataType dtype = tensorflow::DT_INVALID;
      tensorflow::DataTypeFromString(component.dtype, &dtype);
      dtypes_.push_back(dtype);
      shapes_.emplace_back(component.shape);
    }
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
    const TrainingStore::Options& files = arguments_.store;
    const std::vector<tstring> interactions(files.interactions.begin(), files.interactions.end());
    const std::vector<tstring> graph(files.graph.begin(), files.graph.end());
    std::vector<tensorflow::Node*> nodes(std::size(kInputNames));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(files.users), &nodes[kUsers]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(files.items), &nodes[kItems]));
    TF_RETURN_IF_ERROR(b->AddVector(interactions, &nodes[kInteractions]));
    TF_RETURN_IF_ERROR(b->AddVector(files.queries, &nodes[kQueries]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(files.titles), &nodes[kTitles]));
    TF_RETURN_IF_ERROR(b->AddScalar(tstring(files.vocabulary), &nodes[kVocabulary]));
    TF_RETURN_IF_ERROR(b->AddVector(graph, &nodes[kGraph]));
    TF_RETURN_IF_ERROR(b->AddScalar(arguments_.first_step, &nodes[kFirstStep]));
    tensorflow::AttrValue options;
    b->BuildAttrValue(arguments_.options_json, &options);
    return b->AddDataset(this, nodes, {{"options", options}}, output);
  }

 private:
  // A batch that is assembled ahead, by the runner or, if that has not begun, by the thread that needs it.
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
    // After this no thread works on the batch.
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
    // Waits for a thread that is assembling the batch. That takes little time, so there is no cancellation.
    void Wait() {
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
      const int64_t parallel = d.arguments_.options.num_parallel_calls;
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
            // The runner may start after the slot was taken or abandoned, and then does nothing. It needs the dataset
            // only while it assembles a batch, and the destructor of the iterator waits for that.
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
      if (step < 0 || step > kMaxStep) {
        return errors::DataLoss("the saved iterator is at step ", step, ", expected 0 to ", kMaxStep);
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

  // Visits the components of a batch (see batch_components.h) to make their tensors.
  class TensorMaker {
   public:
    TensorMaker(const ExamplesDataset& dataset, Batch* batch, Allocator* allocator, std::vector<Tensor>* tensors)
        : store_(*dataset.store_), sampler_(dataset.sampler_), batch_(batch), allocator_(allocator), tensors_(tensors) {}

    template <typename T>
    void Vector(const char*, int64_t, std::vector<T> Batch::*values) {
      const std::vector<T>& from = batch_->*values;
      Tensor tensor(allocator_, tensorflow::DataTypeToEnum<T>::value, {static_cast<int64_t>(from.size())});
      std::copy(from.begin(), from.end(), tensor.flat<T>().data());
      tensors_->push_back(std::move(tensor));
    }
    // The texts as the log has them, then those that the sampler made.
    void PairQueries(const char*, int64_t) {
      const size_t num_made = batch_->made_splits.size() - 1;
      FindQueryTexts({batch_->query.data(), batch_->query.size() - num_made});
      for (size_t i = 0; i < num_made; ++i) {
        const int64_t begin = batch_->made_splits[i], end = batch_->made_splits[i + 1];
        batch_->texts.emplace_back(batch_->made_tokens.data() + begin, static_cast<size_t>(end - begin));
      }
      AppendTexts();
    }
    void LogQueries(const char*, int64_t, std::vector<int32_t> Batch::*rows) {
      FindQueryTexts(View(batch_->*rows));
      AppendTexts();
    }
    void ItemTexts(const char*, int64_t, std::vector<int32_t> Batch::*rows) {
      AppendLists(store_.items().text(), rows == nullptr ? Span<const int32_t>() : View(batch_->*rows));
    }
    void Features(const char*, int64_t, const FeatureNames&, const FeatureColumns& (TrainingStore::*columns)() const,
                  std::vector<int32_t> Batch::*rows) {
      const FeatureColumns& features = (store_.*columns)();
      tensors_->push_back(GatherCodesTensor(features, View(batch_->*rows), allocator_));
      for (const RaggedColumn& column : features.lists) AppendLists(column, View(batch_->*rows));
    }
    void NegativeMask(const char*, int64_t rows, int64_t columns) {
      bool* mask = AppendMask(rows, columns);
      if (columns > 0) sampler_.NegativeMask(batch_, mask);
    }
    void OwnNegativeMask(const char*, int64_t rows, int64_t columns) {
      std::copy(batch_->own_negative_mask.begin(), batch_->own_negative_mask.end(), AppendMask(rows, columns));
    }

   private:
    static Span<const int32_t> View(const std::vector<int32_t>& rows) { return {rows.data(), rows.size()}; }

    bool* AppendMask(int64_t rows, int64_t columns) {
      tensors_->emplace_back(allocator_, tensorflow::DT_BOOL, tensorflow::TensorShape({rows, columns}));
      return tensors_->back().flat<bool>().data();
    }
    void AppendLists(const RaggedColumn& column, Span<const int32_t> rows) {
      Tensor values, splits;
      GatherTokens(column, rows, allocator_, &values, &splits);
      tensors_->push_back(std::move(values));
      tensors_->push_back(std::move(splits));
    }
    // Lets batch_->texts be the tokens of these queries, which may lie in several files.
    void FindQueryTexts(Span<const int32_t> queries) {
      batch_->texts.resize(queries.size());
      for (size_t i = 0; i < queries.size(); ++i) {
        if (i + kAhead < queries.size()) store_.PrefetchQuery(queries[i + kAhead]);
        batch_->texts[i] = store_.query_tokens(queries[i]);
        __builtin_prefetch(batch_->texts[i].data());
      }
    }
    void AppendTexts() {
      const std::vector<Span<const int32_t>>& texts = batch_->texts;
      Tensor splits(allocator_, tensorflow::DT_INT64, {static_cast<int64_t>(texts.size()) + 1});
      int64_t* split = splits.flat<int64_t>().data();
      *split = 0;
      for (const Span<const int32_t>& text : texts) {
        split[1] = split[0] + static_cast<int64_t>(text.size());
        ++split;
      }
      Tensor values(allocator_, tensorflow::DT_INT32, {*split});
      int32* value = values.flat<int32>().data();
      for (const Span<const int32_t>& text : texts) value = std::copy(text.begin(), text.end(), value);
      tensors_->push_back(std::move(values));
      tensors_->push_back(std::move(splits));
    }

    const TrainingStore& store_;
    const BatchSampler& sampler_;
    Batch* const batch_;
    Allocator* const allocator_;
    std::vector<Tensor>* const tensors_;
  };

  // Makes the tensors of batch `step`.
  void Assemble(int64_t step, Allocator* allocator, std::vector<Tensor>* out) const {
    std::unique_ptr<Batch> batch = TakeBatch();
    sampler_.Sample(step, batch.get());
    out->clear();
    out->reserve(dtypes_.size());
    TensorMaker maker(*this, batch.get(), allocator, out);
    VisitBatchComponents(arguments_.options, &maker);
    ReturnBatch(std::move(batch));
  }

  // Batches keep their memory from one step to the next. There are as many as are assembled at the same time.
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
    OP_REQUIRES_OK(c, c->GetAttr("options", &options_json_));
    OP_REQUIRES_OK(c, ToTensorFlow(BatchOptions::Parse(options_json_, &options_)));
  }

  void MakeDataset(OpKernelContext* c, data::DatasetBase** output) override {
    Arguments arguments{options_json_, options_, {}, 0};
    OP_REQUIRES_OK(c, ReadInputs(c, &arguments));
    TrainingStore::Options& files = arguments.store;
    files.user_features = options_.user_features;
    files.item_features = options_.item_features;
    files.history_features = options_.history_features;
    files.has_titles = options_.num_title_queries > 0 || options_.pretrain_steps > 0;
    files.has_query_texts = options_.query_typo_rate > 0;
    files.reads_log = options_.num_title_queries < options_.batch_size;
    files.events = options_.history_length > 0 || options_.query_history_length > 0;
    files.event_queries = options_.query_history_length > 0;
    files.impressions = options_.num_own_negatives > 0 && !options_.own_labels();
    files.impressions_if_any = options_.num_own_negatives > 0 && options_.own_impressions();
    files.has_graph = !options_.graph_fan_out.empty();
    files.graph_attributes = options_.graph_attributes;
    files.all_queries = options_.query_history_length > 0 || files.has_graph;
    files.shard_index = options_.shard_index;
    files.num_shards = options_.num_shards;
    std::unique_ptr<TrainingStore> store;
    OP_REQUIRES_OK(c, ToTensorFlow(TrainingStore::Open(files, OpenPackedFile, &store)));
    *output = new ExamplesDataset(data::DatasetContext(c), std::move(arguments), std::move(store));
  }

 private:
  static tensorflow::Status ReadInputs(OpKernelContext* c, Arguments* arguments) {
    TrainingStore::Options& files = arguments->store;
    for (auto [input, path] : {std::pair{kUsers, &files.users}, {kItems, &files.items}, {kTitles, &files.titles},
                               {kVocabulary, &files.vocabulary}}) {
      tstring value;
      TF_RETURN_IF_ERROR(data::ParseScalarArgument<tstring>(c, kInputNames[input], &value));
      *path = value;
    }
    for (auto [input, paths] : {std::pair{kInteractions, &files.interactions}, {kGraph, &files.graph}}) {
      std::vector<tstring> values;
      TF_RETURN_IF_ERROR(data::ParseVectorArgument<tstring>(c, kInputNames[input], &values));
      paths->assign(values.begin(), values.end());
    }
    TF_RETURN_IF_ERROR(data::ParseVectorArgument<int64_t>(c, kInputNames[kQueries], &files.queries));
    TF_RETURN_IF_ERROR(data::ParseScalarArgument<int64_t>(c, kInputNames[kFirstStep], &arguments->first_step));
    if (arguments->first_step >= 0 && arguments->first_step <= kMaxStep) return tensorflow::OkStatus();
    return errors::InvalidArgument("first_step is ", arguments->first_step, ", expected 0 to ", kMaxStep);
  }

  std::string options_json_;
  BatchOptions options_;
};

REGISTER_KERNEL_BUILDER(Name("DpsrExamplesDataset").Device(tensorflow::DEVICE_CPU), ExamplesDatasetOp);

}  // namespace
}  // namespace dpsr

// DescribeBatchComponents for Python's ctypes. The text is valid until the thread calls this again.
extern "C" __attribute__((visibility("default"))) const char* DpsrDescribeBatchComponents(const char* options) {
  thread_local std::string description;
  description = dpsr::DescribeBatchComponents(options);
  return description.c_str();
}
