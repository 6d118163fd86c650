// The ops of item retrieval: a resource that holds a FAISS index and its item ids, an op that loads it, and an op that
// searches it. Python: dpsr_export.faiss_ops.FaissIndexTable.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "export/faiss_search/faiss_library.h"
#include "export/faiss_search/retrieval.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/mutex.h"
#include "tokenizer_cc/packed_file.h"
#include "tokenizer_cc/tf_status.h"

namespace dpsr {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::TensorShapeUtils;
using ::tensorflow::tstring;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;
namespace errors = ::tensorflow::errors;

// The kind and the section of the packed file that maps positions in the index to item ids.
constexpr char kItemIdsKind[] = "item_ids";
constexpr char kItemIdsSection[] = "id";

// batch * k of one call, which bounds the memory that its results take (16 bytes each).
constexpr int64_t kMaxResultsPerCall = int64_t{1} << 27;
// From this many head searches on a call is spread over the intra-op threads; below, the hand-over costs more.
constexpr int64_t kMinParallelSearches = 8;
// Roughly the time of a search; large enough that each row of a batch becomes its own piece of work.
constexpr int64_t kNanosecondsPerHead = 1000000;

enum LoadInput { kLoadHandle, kLoadIndexFilename, kLoadItemIdsFilename };
enum SearchInput { kSearchHandle, kSearchQueryEmbedding, kSearchK };
enum SearchOutput { kSearchItemIds, kSearchScores, kSearchHeads };

tensorflow::Status CheckK(int64_t k) {
  if (k >= 1 && k <= kMaxResults) return tensorflow::OkStatus();
  return errors::InvalidArgument("k is ", k, ", expected 1 to ", kMaxResults);
}

// A loaded index with the files it came from. Immutable; searched by any number of threads.
struct ItemIndex {
  std::string index_filename;
  std::string item_ids_filename;
  std::string parameters;
  std::unique_ptr<FaissIndex> index;
  std::unique_ptr<PackedFile> item_ids_file;
  Span<const int64_t> item_ids;

  HeadSearch Search() const {
    return [this](const float* query, int64_t k, float* scores, int64_t* labels) {
      return index->Search(1, query, k, scores, labels);
    };
  }
};

// A search of one vector: shows at load what would otherwise fail every request.
Status Probe(const ItemIndex& items) {
  const int64_t dim = items.index->d();
  constexpr int64_t kResults = 10;
  const std::vector<float> query(dim, 1.0f);
  std::vector<int64_t> ids(kResults);
  std::vector<float> scores(kResults);
  std::vector<int32_t> heads(kResults);
  Retriever retriever(items.item_ids, items.Search());
  const Status status = retriever.Retrieve(query.data(), 1, dim, kResults, ids.data(), scores.data(), heads.data());
  if (status.ok()) return status;
  return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", items.index_filename, " with the item ids ",
                    items.item_ids_filename, " cannot be searched: ", status.message());
}

Status LoadItemIndex(const std::string& index_filename, const std::string& item_ids_filename,
                     const std::string& parameters, bool mmap, std::shared_ptr<const ItemIndex>* loaded) {
  const FaissLibrary* faiss = nullptr;
  DPSR_RETURN_IF_ERROR(FaissLibrary::Get(&faiss));
  auto items = std::make_shared<ItemIndex>();
  items->index_filename = index_filename;
  items->item_ids_filename = item_ids_filename;
  items->parameters = parameters;

  DPSR_RETURN_IF_ERROR(FaissIndex::Read(*faiss, index_filename, mmap, &items->index));
  const FaissIndex& index = *items->index;
  if (index.metric() != FaissMetric::kInnerProduct) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS index ", index_filename, " has the metric ",
                      FaissMetricName(index.metric()), ", expected ", FaissMetricName(FaissMetric::kInnerProduct),
                      ": build it with faiss.METRIC_INNER_PRODUCT");
  }
  if (!index.is_trained() || index.d() < 1) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS index ", index_filename, " has d = ", index.d(),
                      index.is_trained() ? "" : " and is not trained", ", expected a trained index with d >= 1");
  }
  DPSR_RETURN_IF_ERROR(items->index->SetParameters(parameters));

  DPSR_RETURN_IF_ERROR(PackedFile::Open(item_ids_filename, kItemIdsKind, /*verify=*/true, &items->item_ids_file));
  DPSR_RETURN_IF_ERROR(items->item_ids_file->Get(kItemIdsSection, &items->item_ids));
  if (static_cast<int64_t>(items->item_ids.size()) != index.ntotal()) {
    return MakeStatus(StatusCode::kFailedPrecondition, item_ids_filename, " holds ", items->item_ids.size(),
                      " item ids, but the FAISS index ", index_filename, " holds ", index.ntotal(),
                      " vectors: they are not of the same export");
  }
  const Status ids_ok = CheckItemIds(items->item_ids);
  if (!ids_ok.ok()) return MakeStatus(ids_ok.code(), item_ids_filename, ": ", ids_ok.message());
  DPSR_RETURN_IF_ERROR(Probe(*items));
  *loaded = std::move(items);
  return Status();
}

// Shared by all sessions that use the handle's name in one resource manager.
class FaissIndexResource : public tensorflow::ResourceBase {
 public:
  std::string DebugString() const override {
    const std::shared_ptr<const ItemIndex> items = Get();
    return items == nullptr ? "FAISS index, not loaded" : StrCat("FAISS index ", items->index_filename);
  }

  // Null before Load has succeeded.
  std::shared_ptr<const ItemIndex> Get() const {
    const tensorflow::tf_shared_lock lock(mutex_);
    return items_;
  }

  // Loading the same files again changes nothing; other files are refused, since searches may be under way and a name
  // that two exports share would silently give one of them the other's items.
  Status Load(const std::string& index_filename, const std::string& item_ids_filename, const std::string& parameters,
              bool mmap) {
    const tensorflow::mutex_lock lock(mutex_);
    if (items_ == nullptr) return LoadItemIndex(index_filename, item_ids_filename, parameters, mmap, &items_);
    if (items_->index_filename == index_filename && items_->item_ids_filename == item_ids_filename &&
        items_->parameters == parameters) {
      return Status();
    }
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot load the FAISS index ", index_filename, " (item ids ",
                      item_ids_filename, ", parameters \"", parameters, "\"): this handle holds ",
                      items_->index_filename, " (", items_->item_ids_filename, ", \"", items_->parameters,
                      "\") already; give each index a handle with its own shared_name");
  }

 private:
  mutable tensorflow::mutex mutex_;
  std::shared_ptr<const ItemIndex> items_ TF_GUARDED_BY(mutex_);
};

class FaissIndexHandleOp : public tensorflow::ResourceOpKernel<FaissIndexResource> {
 public:
  using ResourceOpKernel::ResourceOpKernel;

 private:
  tensorflow::Status CreateResource(FaissIndexResource** resource) override {
    *resource = new FaissIndexResource;
    return tensorflow::OkStatus();
  }
};

class FaissIndexLoadOp : public OpKernel {
 public:
  explicit FaissIndexLoadOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("parameters", &parameters_));
    OP_REQUIRES_OK(context, context->GetAttr("mmap", &mmap_));
  }

  void Compute(OpKernelContext* context) override {
    tensorflow::core::RefCountPtr<FaissIndexResource> resource;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, kLoadHandle), &resource));
    std::string filenames[2];
    for (const int input : {kLoadIndexFilename, kLoadItemIdsFilename}) {
      const Tensor& filename = context->input(input);
      OP_REQUIRES(context, TensorShapeUtils::IsScalar(filename.shape()),
                  errors::InvalidArgument(input == kLoadIndexFilename ? "index_filename" : "item_ids_filename",
                                          " has shape ", filename.shape().DebugString(), ", expected a scalar"));
      filenames[input - kLoadIndexFilename] = filename.scalar<tstring>()();
    }
    OP_REQUIRES_OK(context, ToTensorFlow(resource->Load(filenames[0], filenames[1], parameters_, mmap_)));
  }

 private:
  std::string parameters_;
  bool mmap_;
};

class FaissSearchOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    tensorflow::core::RefCountPtr<FaissIndexResource> resource;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, kSearchHandle), &resource));
    const std::shared_ptr<const ItemIndex> items = resource->Get();
    OP_REQUIRES(context, items != nullptr,
                errors::FailedPrecondition("the FAISS index is not loaded: run the initialization op of the graph "
                                           "(tf.compat.v1.tables_initializer()) first"));

    const Tensor& query_embedding = context->input(kSearchQueryEmbedding);
    const Tensor& k_tensor = context->input(kSearchK);
    OP_REQUIRES(context,
                query_embedding.dims() == 3 && query_embedding.dim_size(1) >= 1 &&
                    query_embedding.dim_size(1) <= kMaxHeads && query_embedding.dim_size(2) == items->index->d(),
                errors::InvalidArgument("query_embedding has shape ", query_embedding.shape().DebugString(),
                                        ", expected [batch, heads, dim] with 1 to ", kMaxHeads,
                                        " heads and the index's dim ", items->index->d()));
    OP_REQUIRES(
        context, TensorShapeUtils::IsScalar(k_tensor.shape()),
        errors::InvalidArgument("k has shape ", k_tensor.shape().DebugString(), ", expected a scalar (one k a call)"));
    const int64_t k = k_tensor.scalar<int32_t>()();
    OP_REQUIRES_OK(context, CheckK(k));
    const int64_t batch = query_embedding.dim_size(0);
    OP_REQUIRES(context, batch <= kMaxResultsPerCall / k,
                errors::InvalidArgument("batch * k is ", batch, " * ", k, ", expected at most ", kMaxResultsPerCall,
                                        " results a call: send fewer queries at once"));

    const TensorShape shape({batch, k});
    Tensor* item_ids = nullptr;
    Tensor* scores = nullptr;
    Tensor* heads = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(kSearchItemIds, shape, &item_ids));
    OP_REQUIRES_OK(context, context->allocate_output(kSearchScores, shape, &scores));
    OP_REQUIRES_OK(context, context->allocate_output(kSearchHeads, shape, &heads));
    OP_REQUIRES_OK(context, ToTensorFlow(SearchBatch(context, *items, query_embedding, k, item_ids, scores, heads)));
  }

 private:
  // Each row is searched by itself, one FAISS thread each, so that an answer does not depend on what else is in the
  // batch (FAISS takes other code paths, with other roundings, for many queries at once).
  static Status SearchBatch(OpKernelContext* context, const ItemIndex& items, const Tensor& query_embedding, int64_t k,
                            Tensor* item_ids, Tensor* scores, Tensor* heads) {
    const int64_t batch = query_embedding.dim_size(0);
    const int64_t num_heads = query_embedding.dim_size(1);
    const int64_t dim = query_embedding.dim_size(2);
    const float* queries = query_embedding.flat<float>().data();
    // Through void*: TensorFlow's own int64 may be another type of the same size.
    int64_t* ids_out = static_cast<int64_t*>(item_ids->data());
    float* scores_out = scores->flat<float>().data();
    int32_t* heads_out = heads->flat<int32_t>().data();

    const auto search_rows = [&](int64_t begin, int64_t end) {
      Retriever retriever(items.item_ids, items.Search());
      for (int64_t row = begin; row < end; ++row) {
        DPSR_RETURN_IF_ERROR(retriever.Retrieve(queries + row * num_heads * dim, num_heads, dim, k, ids_out + row * k,
                                                scores_out + row * k, heads_out + row * k));
      }
      return Status();
    };
    if (batch * num_heads < kMinParallelSearches) return search_rows(0, batch);

    tensorflow::mutex mutex;
    Status first_error;
    context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
        batch, num_heads * kNanosecondsPerHead, [&](int64_t begin, int64_t end) {
          Status status = search_rows(begin, end);
          if (status.ok()) return;
          const tensorflow::mutex_lock lock(mutex);
          if (first_error.ok()) first_error = std::move(status);
        });
    return first_error;
  }
};

REGISTER_OP("DpsrFaissIndexHandle")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .Output("handle: resource")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle to a FAISS index, empty until DpsrFaissIndexLoad has run.

shared_name: Handles of the same name share one index; give each index its own.
handle: The resource.
)doc");

REGISTER_OP("DpsrFaissIndexLoad")
    .Input("handle: resource")
    .Input("index_filename: string")
    .Input("item_ids_filename: string")
    .Attr("parameters: string = ''")
    .Attr("mmap: bool = true")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      for (const int input : {kLoadHandle, kLoadIndexFilename, kLoadItemIdsFilename}) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 0, &scalar));
      }
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Loads an inner-product FAISS index and the item ids of its positions into a handle.

Loading the same files twice is a no-op; loading others into the same handle is FailedPrecondition. Files that are
missing, damaged, or do not belong together are refused.

index_filename: A file that faiss.write_index wrote; positions are its labels.
item_ids_filename: A packed file of the kind "item_ids" with a section "id", int64 [ntotal], all >= 0.
parameters: Search parameters as faiss.ParameterSpace names them, for example "nprobe=32".
mmap: Map the index instead of reading it into memory.
)doc");

REGISTER_OP("DpsrFaissSearch")
    .Input("handle: resource")
    .Input("query_embedding: float")
    .Input("k: int32")
    .Output("item_ids: int64")
    .Output("scores: float")
    .Output("heads: int32")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle unused;
      ShapeHandle query_embedding;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kSearchHandle), 0, &unused));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kSearchQueryEmbedding), 3, &query_embedding));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kSearchK), 0, &unused));
      const Tensor* k_value = c->input_tensor(kSearchK);
      if (k_value != nullptr) TF_RETURN_IF_ERROR(CheckK(k_value->scalar<int32_t>()()));
      tensorflow::shape_inference::DimensionHandle k;
      TF_RETURN_IF_ERROR(c->MakeDimForScalarInput(kSearchK, &k));
      const ShapeHandle results = c->MakeShape({c->Dim(query_embedding, 0), k});
      for (const int output : {kSearchItemIds, kSearchScores, kSearchHeads}) c->set_output(output, results);
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Retrieves the k items with the largest inner products for each query, over all its heads.

Each head retrieves k items; results are united; an item's score is its largest inner product over heads; equal scores
are ordered by ascending item id; the best k remain. Missing results are padded with -1, -inf and -1. A row that holds a
NaN or an infinity, and a head of zeros, retrieve nothing.

query_embedding: [batch, heads, dim]; at most 16 heads.
k: scalar, 1 to 10000.
item_ids: [batch, k], the best first.
scores: [batch, k], inner products.
heads: [batch, k], the head that gave the score, the lowest of those that gave the same.
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrFaissIndexHandle").Device(DEVICE_CPU), FaissIndexHandleOp);
REGISTER_KERNEL_BUILDER(Name("DpsrFaissIndexLoad").Device(DEVICE_CPU), FaissIndexLoadOp);
REGISTER_KERNEL_BUILDER(Name("DpsrFaissSearch").Device(DEVICE_CPU), FaissSearchOp);

}  // namespace
}  // namespace dpsr
