// The ops of item retrieval: a resource with a FAISS index and its item ids, an op that loads it, and an op that
// searches it. Python: dpsr_export.faiss_search.FaissIndexTable.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/current_request.h"
#include "common/packed_file.h"
#include "common/tf_op.h"
#include "export/faiss_search/tf_index_resource.h"
#include "tensorflow/core/framework/resource_op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/platform/mutex.h"

namespace dpsr {
namespace {

// Kind and sections of the packed file with the item ids of the positions. It also identifies the index file.
constexpr char kItemIdsKind[] = "item_ids";
constexpr char kItemIdsSection[] = "id";
constexpr char kIndexBytesSection[] = "index.bytes";
constexpr char kIndexChecksumSection[] = "index.checksum";
constexpr char kIndexEntriesSection[] = "index.entries";  // may be absent
// These may be absent too: the mean squared distance of the vectors to what their codes stand for; the last versions of
// changes, of the items and of ids that are not in the index.
constexpr char kIndexResidualSection[] = "index.residual";
constexpr char kVersionSection[] = "version";
constexpr char kHiddenIdSection[] = "hidden.id";
constexpr char kHiddenVersionSection[] = "hidden.version";

constexpr char kDeviceVariable[] = "DPSR_FAISS_DEVICE";

// Largest batch * k of one call, unless the environment variable says another number. It bounds the work of a request,
// and the memory for its results, which take 16 bytes each.
constexpr int64_t kDefaultMaxResults = 1'000'000;
constexpr char kMaxResultsVariable[] = "DPSR_MAX_RESULTS";
constexpr char kRequestIsOver[] = "the search stopped, because the request was cancelled or its deadline has passed";
// With at least this many searches (rows * heads), a call uses the intra-op threads. With fewer, handing over costs
// more than it gains.
constexpr int64_t kMinParallelSearches = 8;
// Largest number of lists that an item may be in.
constexpr uint64_t kMaxEntries = 2;
// The rough time of a search. It is large enough for each row of a batch to become its own piece of work.
constexpr int64_t kNanosecondsPerHead = 1000000;

enum LoadInput { kLoadHandle, kLoadIndexFilename, kLoadItemIdsFilename, kLoadAttributesFilename };
enum SearchInput {
  kSearchHandle,
  kSearchQueryEmbedding,
  kSearchK,
  kSearchParameters,
  kSearchInclude,
  kSearchExclude,
  kSearchExcludedItemIds
};
enum SearchOutput { kSearchItemIds, kSearchScores, kSearchHeads };

int64_t MaxResultsPerCall() {
  const char* const given = std::getenv(kMaxResultsVariable);
  const std::string_view text = given == nullptr ? "" : given;
  int64_t number = 0;
  const auto read = std::from_chars(text.data(), text.data() + text.size(), number);
  return read.ec == std::errc() && number > 0 ? number : kDefaultMaxResults;
}

// Says whether a request is over. Made in the thread that calls the op; then thread-safe.
class RequestState {
 public:
  explicit RequestState(OpKernelContext* context)
      : cancellation_(context->cancellation_manager()),
        request_(&DpsrCurrentRequest == nullptr ? nullptr : DpsrCurrentRequest()) {}
  bool IsOver() const {
    return (cancellation_ != nullptr && cancellation_->IsCancelled()) ||
           (request_ != nullptr && request_->is_over(request_->state));
  }

 private:
  tensorflow::CancellationManager* const cancellation_;
  const DpsrRequest* const request_;
};

tensorflow::Status CheckK(int64_t k) {
  if (k >= 1 && k <= kMaxResults) return tensorflow::OkStatus();
  return errors::InvalidArgument("k is ", k, ", expected 1 to ", kMaxResults);
}

// Searches for one vector, so that an error that would fail every request shows when the index is loaded.
Status Probe(const ItemIndex& items) {
  const int64_t dim = items.index->d();
  constexpr int64_t kResults = 10;
  const std::vector<float> query(dim, 1.0f);
  std::vector<int64_t> ids(kResults);
  std::vector<float> scores(kResults);
  std::vector<int32_t> heads(kResults);
  const auto search = [&](const float* x, int64_t k, float* found_scores, int64_t* labels) {
    return items.index->Search(1, x, k, found_scores, labels);
  };
  Retriever retriever(items.item_ids, search);
  const Status status = retriever.Retrieve(query.data(), 1, dim, kResults, ids.data(), scores.data(), heads.data());
  if (status.ok()) return status;
  return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", items.arguments.index_filename,
                    " with the item ids ", items.arguments.item_ids_filename, " cannot be searched: ", status.message());
}

// Reads the item ids, and checks that they were written for this index file.
Status OpenItemIds(const LoadArguments& arguments, ItemIndex* items) {
  const std::string& filename = arguments.item_ids_filename;
  DPSR_RETURN_IF_ERROR(PackedFile::Open(filename, kItemIdsKind, /*verify=*/true, &items->item_ids_file));
  const PackedFile& file = *items->item_ids_file;
  Span<const int64_t> ids;
  DPSR_RETURN_IF_ERROR(file.Get(kItemIdsSection, &ids));
  Span<const uint64_t> bytes;
  Span<const uint64_t> checksum;
  if (file.Find(kIndexBytesSection) == nullptr || file.Find(kIndexChecksumSection) == nullptr) {
    return MakeStatus(StatusCode::kFailedPrecondition, filename,
                      ": was written by an older version and does not identify its index; run `dpsr index` again");
  }
  DPSR_RETURN_IF_ERROR(file.Get(kIndexBytesSection, &bytes));
  DPSR_RETURN_IF_ERROR(file.Get(kIndexChecksumSection, &checksum));
  if (bytes.size() != 1 || checksum.size() != 1) {
    return MakeStatus(StatusCode::kDataLoss, filename, ": ", kIndexBytesSection, " and ", kIndexChecksumSection,
                      " have ", bytes.size(), " and ", checksum.size(), " values, expected one each");
  }
  int64_t entries = 1;
  if (file.Find(kIndexEntriesSection) != nullptr) {
    Span<const uint64_t> section;
    DPSR_RETURN_IF_ERROR(file.Get(kIndexEntriesSection, &section));
    if (section.size() != 1 || section[0] < 1 || section[0] > kMaxEntries) {
      return MakeStatus(StatusCode::kDataLoss, filename, ": ", kIndexEntriesSection, " has ", section.size(),
                        " values", section.size() == 1 ? StrCat(", ", section[0]) : "",
                        ", expected one value from 1 to ", kMaxEntries);
    }
    entries = static_cast<int64_t>(section[0]);
  }
  DPSR_RETURN_IF_ERROR(FaissIndex::CheckFile(arguments.index_filename, bytes[0], checksum[0]));
  const Status ids_ok = ItemIds::Check(ids, &items->item_ids);
  items->item_ids.entries = entries;
  return ids_ok.ok() ? ids_ok : MakeStatus(ids_ok.code(), filename, ": ", ids_ok.message());
}

// Prints a warning for operators. TensorFlow's log would not show it, because the model server turns that log off.
void Warn(const std::string& message) {
  const std::string line = StrCat("W ", message, "\n");
  std::fputs(line.c_str(), stderr);
}

// Copies the index to a GPU if the environment variable DPSR_FAISS_DEVICE asks for one. Its values are cpu (the
// default), gpu, and gpu:N. If the GPU cannot be used, a warning says why, and searches run on the CPU.
Status UseDevice(FaissIndex* index) {
  const char* const given = std::getenv(kDeviceVariable);
  const std::string_view device = given == nullptr ? "" : given;
  if (device.empty() || device == "cpu") return Status();
  int number = 0;
  const std::string_view digits = device.substr(std::min<size_t>(device.size(), 4));
  const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  const bool is_numbered = device.substr(0, 4) == "gpu:" && read.ec == std::errc() && number >= 0 &&
                           read.ptr == digits.data() + digits.size();
  if (device != "gpu" && !is_numbered) {
    return MakeStatus(StatusCode::kInvalidArgument, kDeviceVariable, " is \"", device,
                      "\", expected cpu, gpu, or gpu:N, where N is the number of a device");
  }
  const Status copied = index->CopyToGpu(device == "gpu" ? 0 : number);
  if (!copied.ok()) {
    Warn(StrCat(kDeviceVariable, "=", device, ": ", copied.message(), "; the CPU is used"));
  } else if (index->max_gpu_results() < FaissIndex::kMaxGpuResults) {
    Warn(StrCat(kDeviceVariable, "=", device, ": the codes of this index allow at most ", index->max_gpu_results(),
                " results on the GPU; the CPU searches for more. To get up to ", FaissIndex::kMaxGpuResults,
                " on the GPU, build the index with SQfp16 or Flat codes"));
  }
  return Status();
}

// Creates what takes changes of the items.
Status MakeFreshIndex(ItemIndex* items) {
  const LoadArguments& arguments = items->arguments;
  const PackedFile& file = *items->item_ids_file;
  FreshIndex::Options options;
  options.offset = arguments.changes_offset;
  options.shard = arguments.shard;
  options.num_shards = arguments.num_shards;
  if (file.Find(kIndexResidualSection) != nullptr) {
    Span<const double> residual;
    DPSR_RETURN_IF_ERROR(file.Get(kIndexResidualSection, &residual));
    if (residual.size() == 1 && residual[0] > 0) options.base_residual = residual[0];
  }
  items->fresh = std::make_unique<FreshIndex>(items->index.get(), items->filtered.get(), items->item_ids,
                                              items->filters.get(), options);
  const auto set_versions = [&](const char* section, Span<const int64_t> ids) -> Status {
    Span<const int64_t> versions;
    DPSR_RETURN_IF_ERROR(file.Get(section, &versions));
    if (versions.size() != ids.size()) {
      return MakeStatus(StatusCode::kDataLoss, arguments.item_ids_filename, ": ", section, " has ", versions.size(),
                        " values, expected ", ids.size());
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      if (versions[i] > 0) items->fresh->SetVersion(ids[i], versions[i]);
    }
    return Status();
  };
  if (file.Find(kVersionSection) != nullptr) DPSR_RETURN_IF_ERROR(set_versions(kVersionSection, items->item_ids.ids));
  if (file.Find(kHiddenIdSection) == nullptr) return Status();
  Span<const int64_t> hidden;
  DPSR_RETURN_IF_ERROR(file.Get(kHiddenIdSection, &hidden));
  return set_versions(kHiddenVersionSection, hidden);
}

Status LoadItemIndex(const LoadArguments& arguments, std::shared_ptr<const ItemIndex>* loaded) {
  const FaissLibrary* faiss = nullptr;
  DPSR_RETURN_IF_ERROR(FaissLibrary::Get(&faiss));
  auto items = std::make_shared<ItemIndex>();
  items->arguments = arguments;
  const std::string& index_filename = arguments.index_filename;
  DPSR_RETURN_IF_ERROR(OpenItemIds(arguments, items.get()));

  DPSR_RETURN_IF_ERROR(FaissIndex::Read(*faiss, index_filename, arguments.mmap, &items->index));
  FaissIndex& index = *items->index;
  if (index.metric() != FaissMetric::kInnerProduct) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS index ", index_filename, " has the metric ",
                      FaissMetricName(index.metric()), ", expected ", FaissMetricName(FaissMetric::kInnerProduct),
                      ": build it with faiss.METRIC_INNER_PRODUCT");
  }
  if (!index.is_trained() || index.d() < 1) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS index ", index_filename, " has d = ", index.d(),
                      index.is_trained() ? "" : " and is not trained", ", expected a trained index with d >= 1");
  }
  if (arguments.dim != 0 && arguments.dim != index.d()) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS index ", index_filename, " has the dimension ",
                      index.d(), ", but queries have ", arguments.dim, ": it was made from another model");
  }
  DPSR_RETURN_IF_ERROR(index.SetParameters(arguments.parameters));
  DPSR_RETURN_IF_ERROR(SearchParameters::Parse(arguments.max_parameters, &items->max_parameters));
  DPSR_RETURN_IF_ERROR(index.CheckParameters(items->max_parameters));
  const auto num_items = static_cast<int64_t>(items->item_ids.ids.size());
  const int64_t entries = items->item_ids.entries;
  if (num_items * entries != index.ntotal()) {
    return MakeStatus(StatusCode::kFailedPrecondition, arguments.item_ids_filename, " holds ", num_items,
                      " item ids", entries > 1 ? StrCat(" with ", entries, " entries each") : "",
                      ", but the FAISS index ", index_filename, " holds ", index.ntotal(),
                      " vectors: they belong to different exports");
  }
  const Status lists_ok = FilteredSearch::Create(&index, &items->filtered, entries);
  if (!lists_ok.ok()) {
    return MakeStatus(lists_ok.code(), "the FAISS index ", index_filename, ": ", lists_ok.message());
  }
  DPSR_RETURN_IF_ERROR(ItemFilters::Open(arguments.attributes_filename, num_items,
                                         items->item_ids_file->fingerprint(), items->filtered->order(),
                                         &items->filters));
  DPSR_RETURN_IF_ERROR(UseDevice(&index));
  DPSR_RETURN_IF_ERROR(Probe(*items));
  DPSR_RETURN_IF_ERROR(MakeFreshIndex(items.get()));
  *loaded = std::move(items);
  return Status();
}

}  // namespace

std::string FaissIndexResource::DebugString() const {
  const std::shared_ptr<const ItemIndex> items = Get();
  return items == nullptr ? "FAISS index, not loaded" : StrCat("FAISS index ", items->arguments.index_filename);
}

Status FaissIndexResource::Load(const LoadArguments& arguments) {
  const tensorflow::mutex_lock lock(mutex_);
  if (items_ == nullptr) return LoadItemIndex(arguments, &items_);
  const LoadArguments& here = items_->arguments;
  if (here == arguments) return Status();
  return MakeStatus(StatusCode::kFailedPrecondition, "cannot load the FAISS index ", arguments.index_filename,
                    " (item ids ", arguments.item_ids_filename, ", parameters \"", arguments.parameters,
                    "\"): this handle holds ", here.index_filename, " (", here.item_ids_filename, ", \"",
                    here.parameters, "\") already; give each index a handle with its own shared_name");
}

namespace {

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
    OP_REQUIRES_OK(context, context->GetAttr("parameters", &arguments_.parameters));
    OP_REQUIRES_OK(context, context->GetAttr("max_parameters", &arguments_.max_parameters));
    int dim = 0;
    OP_REQUIRES_OK(context, context->GetAttr("dim", &dim));
    arguments_.dim = dim;
    OP_REQUIRES_OK(context, context->GetAttr("mmap", &arguments_.mmap));
    tensorflow::int64 changes_offset = 0;
    OP_REQUIRES_OK(context, context->GetAttr("changes_offset", &changes_offset));
    int shard = 0;
    OP_REQUIRES_OK(context, context->GetAttr("shard", &shard));
    int num_shards = 1;
    OP_REQUIRES_OK(context, context->GetAttr("num_shards", &num_shards));
    OP_REQUIRES(context, changes_offset >= 0 && num_shards >= 1 && shard >= 0 && shard < num_shards,
                errors::InvalidArgument("changes_offset is ", changes_offset, ", shard ", shard, ", num_shards ",
                                        num_shards, ", expected an offset >= 0 and a shard from 0 to num_shards - 1"));
    arguments_.changes_offset = changes_offset;
    arguments_.shard = shard;
    arguments_.num_shards = num_shards;
  }

  void Compute(OpKernelContext* context) override {
    tensorflow::core::RefCountPtr<FaissIndexResource> resource;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, kLoadHandle), &resource));
    constexpr const char* kNames[] = {"index_filename", "item_ids_filename", "attributes_filename"};
    LoadArguments arguments = arguments_;
    std::string* const filenames[] = {&arguments.index_filename, &arguments.item_ids_filename,
                                      &arguments.attributes_filename};
    for (const int input : {kLoadIndexFilename, kLoadItemIdsFilename, kLoadAttributesFilename}) {
      const Tensor& filename = context->input(input);
      OP_REQUIRES(context, TensorShapeUtils::IsScalar(filename.shape()),
                  errors::InvalidArgument(kNames[input - kLoadIndexFilename], " has shape ",
                                          filename.shape().DebugString(), ", expected a scalar"));
      *filenames[input - kLoadIndexFilename] = filename.scalar<tstring>()();
    }
    OP_REQUIRES_OK(context, ToTensorFlow(resource->Load(arguments)));
  }

 private:
  LoadArguments arguments_;
};

class FaissSearchOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<const ItemIndex> items;
    OP_REQUIRES_OK(context, LoadedIndex(context, &items));

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
    const int64_t max_results = MaxResultsPerCall();
    OP_REQUIRES(context, batch <= max_results / k,
                errors::InvalidArgument("batch * k is ", batch, " * ", k, ", expected at most ", max_results,
                                        " results a call: send fewer queries at once, or raise the limit "
                                        "(--max_results_per_request of the server, or ", kMaxResultsVariable, ")"));

    SearchParameters parameters;
    OP_REQUIRES_OK(context, ReadParameters(context->input(kSearchParameters), *items, &parameters));
    for (const int input : {kSearchInclude, kSearchExclude, kSearchExcludedItemIds}) {
      const Tensor& given = context->input(input);
      OP_REQUIRES(context, IsAbsent(given) || (given.dims() == 2 && given.dim_size(0) == batch),
                  errors::InvalidArgument(kFilterNames[input - kSearchInclude], " has shape ",
                                          given.shape().DebugString(), ", expected [batch, n] with the batch of ", batch,
                                          " of query_embedding, or no elements"));
    }

    const TensorShape shape({batch, k});
    Tensor* item_ids = nullptr;
    Tensor* scores = nullptr;
    Tensor* heads = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(kSearchItemIds, shape, &item_ids));
    OP_REQUIRES_OK(context, context->allocate_output(kSearchScores, shape, &scores));
    OP_REQUIRES_OK(context, context->allocate_output(kSearchHeads, shape, &heads));
    const RequestState request(context);
    const Status searched = SearchBatch(context, request, *items, k, parameters, item_ids, scores, heads);
    OP_REQUIRES(context, searched.ok() || !request.IsOver(), errors::Cancelled(kRequestIsOver));
    OP_REQUIRES_OK(context, ToTensorFlow(searched));
  }

 private:
  static constexpr const char* kFilterNames[] = {"include", "exclude", "excluded_item_ids"};

  static bool IsAbsent(const Tensor& tensor) { return tensor.NumElements() == 0; }

  static tensorflow::Status ReadParameters(const Tensor& given, const ItemIndex& items, SearchParameters* parameters) {
    if (!TensorShapeUtils::IsScalar(given.shape())) {
      return errors::InvalidArgument("parameters has shape ", given.shape().DebugString(), ", expected a scalar");
    }
    const auto read = [&]() -> Status {
      DPSR_RETURN_IF_ERROR(SearchParameters::Parse(given.scalar<tstring>()(), parameters));
      DPSR_RETURN_IF_ERROR(items.index->CheckParameters(*parameters));
      return parameters->CheckBounds(items.max_parameters);
    };
    return ToTensorFlow(read());
  }

  // Returns the texts in a row of [batch, n] strings that are not empty.
  static std::vector<std::string_view> Expressions(const Tensor& given, int64_t row) {
    std::vector<std::string_view> expressions;
    if (IsAbsent(given)) return expressions;
    const auto texts = given.matrix<tstring>();
    for (int64_t i = 0; i < given.dim_size(1); ++i) {
      if (!texts(row, i).empty()) expressions.emplace_back(texts(row, i).data(), texts(row, i).size());
    }
    return expressions;
  }

  // What one row of the batch is searched among.
  struct RowFilter {
    std::shared_ptr<const ItemMask> mask;  // null if there is no filter
    FreshRowMasks added;                   // with a filter, the added items that pass
  };

  // Computes the items that pass the filters of a row, and passes its excluded ids to `retriever`.
  static Status ReadFilters(OpKernelContext* context, const ItemIndex& items, const FreshItems* fresh, int64_t row,
                            RowFilter* filter, Retriever* retriever) {
    const auto include = Expressions(context->input(kSearchInclude), row);
    const auto exclude = Expressions(context->input(kSearchExclude), row);
    filter->mask.reset();
    if (!include.empty() || !exclude.empty()) {
      DPSR_RETURN_IF_ERROR(items.filters->Apply(include, exclude, &filter->mask,
                                                fresh == nullptr ? nullptr : fresh->attributes()));
      if (fresh != nullptr && fresh->has_added()) {
        std::shared_ptr<const ItemFilters::Predicates> predicates;
        DPSR_RETURN_IF_ERROR(items.filters->Compile(include, exclude, &predicates));
        filter->added = fresh->FindRows(*predicates);
      }
    }
    const Tensor& excluded = context->input(kSearchExcludedItemIds);
    if (IsAbsent(excluded)) return Status();
    const int64_t count = excluded.dim_size(1);
    return retriever->Exclude({static_cast<const int64_t*>(excluded.data()) + row * count, static_cast<size_t>(count)});
  }

  // Says once that the CPU searches an index that is on a GPU, because a GPU cannot leave out hidden items.
  static void WarnIfNotOnGpu(const ItemIndex& items, const FreshItems* fresh) {
    if (fresh == nullptr || fresh->num_hidden() == 0 || !items.index->is_on_gpu()) return;
    static const bool warned = [] {
      Warn(StrCat(kDeviceVariable, ": items have been replaced or deleted, so the CPU searches; merge the changes into ",
                  "the index to search on the GPU again"));
      return true;
    }();
    static_cast<void>(warned);
  }

  // The results of one GPU search for all heads of a batch.
  struct GpuResults {
    int64_t k = 0;                // 0 if there was no search
    std::vector<float> scores;    // [batch * heads, k]
    std::vector<int64_t> labels;  // [batch * heads, k]
  };

  // Searches for all heads of a batch at once, if the index is on a GPU and the GPU can search for all of them: no row
  // has filters or excluded ids, and all numbers are finite.
  static Status SearchOnGpu(OpKernelContext* context, const ItemIndex& items, int64_t k,
                            const SearchParameters& parameters, GpuResults* results) {
    const Tensor& query_embedding = context->input(kSearchQueryEmbedding);
    const auto queries = query_embedding.flat<float>();
    const int64_t searches = query_embedding.dim_size(0) * query_embedding.dim_size(1);
    const int64_t wanted = items.item_ids.entries * std::min(k, items.item_ids.size());
    if (!items.index->is_on_gpu() || searches < 2 || wanted < 1 || wanted > items.index->max_gpu_results() ||
        !parameters.empty() || !IsAbsent(context->input(kSearchInclude)) ||
        !IsAbsent(context->input(kSearchExclude)) || !IsAbsent(context->input(kSearchExcludedItemIds)) ||
        !std::all_of(queries.data(), queries.data() + queries.size(), [](float x) { return std::isfinite(x); })) {
      return Status();
    }
    results->k = wanted;
    results->scores.resize(searches * wanted);
    results->labels.resize(searches * wanted);
    return items.index->Search(searches, queries.data(), wanted, results->scores.data(), results->labels.data());
  }

  // Each row is searched separately, on one FAISS thread. So a result does not depend on the rest of the batch: for
  // many queries at once FAISS uses other code, which rounds differently. A GPU searches for all rows at once, because
  // this takes hardly longer than for one.
  static Status SearchBatch(OpKernelContext* context, const RequestState& request, const ItemIndex& items, int64_t k,
                            const SearchParameters& parameters, Tensor* item_ids, Tensor* scores, Tensor* heads) {
    const Tensor& query_embedding = context->input(kSearchQueryEmbedding);
    const int64_t batch = query_embedding.dim_size(0);
    const int64_t num_heads = query_embedding.dim_size(1);
    const int64_t dim = query_embedding.dim_size(2);
    const float* queries = query_embedding.flat<float>().data();
    // The cast goes through void*, because TensorFlow's int64 may be another type of the same size.
    int64_t* ids_out = static_cast<int64_t*>(item_ids->data());
    float* scores_out = scores->flat<float>().data();
    int32_t* heads_out = heads->flat<int32_t>().data();

    // All rows see the same changes.
    const std::shared_ptr<const FreshItems> fresh = items.fresh->items();
    WarnIfNotOnGpu(items, fresh.get());
    GpuResults on_gpu;
    if (fresh == nullptr) DPSR_RETURN_IF_ERROR(SearchOnGpu(context, items, k, parameters, &on_gpu));
    const auto search_rows = [&](int64_t begin, int64_t end) {
      RowFilter filter;
      const auto search = [&](const float* query, int64_t wanted, float* found_scores, int64_t* labels) {
        const ItemMask* const mask = filter.mask.get();
        if (fresh != nullptr) {
          return fresh->Search(query, wanted, parameters, mask, mask == nullptr ? nullptr : &filter.added, found_scores,
                               labels);
        }
        if (mask != nullptr) return items.filtered->Search(query, wanted, *mask, parameters, found_scores, labels);
        if (wanted == on_gpu.k) {
          const int64_t first = (query - queries) / dim * wanted;
          std::copy_n(&on_gpu.scores[first], wanted, found_scores);
          std::copy_n(&on_gpu.labels[first], wanted, labels);
          return Status();
        }
        return items.index->Search(1, query, wanted, found_scores, labels, /*nthreads=*/1, parameters);
      };
      Retriever retriever(fresh != nullptr ? fresh->item_ids() : items.item_ids, search);
      for (int64_t row = begin; row < end; ++row) {
        if (request.IsOver()) return Status(StatusCode::kInternal, kRequestIsOver);
        DPSR_RETURN_IF_ERROR(ReadFilters(context, items, fresh.get(), row, &filter, &retriever));
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
Creates a handle to a FAISS index. It is empty until DpsrFaissIndexLoad has run.

shared_name: Handles with the same name share one index. Give each index its own name.
handle: The resource.
)doc");

REGISTER_OP("DpsrFaissIndexLoad")
    .Input("handle: resource")
    .Input("index_filename: string")
    .Input("item_ids_filename: string")
    .Input("attributes_filename: string")
    .Attr("parameters: string = ''")
    .Attr("max_parameters: string = ''")
    .Attr("dim: int = 0")
    .Attr("mmap: bool = true")
    .Attr("changes_offset: int = 0")
    .Attr("shard: int = 0")
    .Attr("num_shards: int = 1")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      for (const int input : {kLoadHandle, kLoadIndexFilename, kLoadItemIdsFilename, kLoadAttributesFilename}) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 0, &scalar));
      }
      return tensorflow::OkStatus();
    })
    .Doc(R"doc(
Loads an inner-product FAISS index and the item ids of its positions into a handle.

Loading the same files again does nothing. Loading other files into the same handle is FailedPrecondition. Files that
are missing, damaged, or do not belong together are refused.

index_filename: A file that faiss.write_index wrote; positions are its labels.
item_ids_filename: A packed file of the kind "item_ids" with sections "id", int64 [ntotal], all >= 0, and "index.bytes"
  and "index.checksum", uint64 [1]: size and XXH3 of the index file. If the index holds each position in two lists,
  "index.entries", uint64 [1], is 2.
attributes_filename: A packed file of the kind "item_attributes", which filters are evaluated on; empty if there is
  none.
parameters: Search parameters as faiss.ParameterSpace names them, for example "nprobe=32".
max_parameters: The parameters that a request may set (nprobe, max_codes, efSearch, k_factor_rf), with their largest
  values; empty means none. max_codes may always be set if the index has lists that obey it.
dim: The dimension of the queries. An index with another dimension is refused. 0 accepts any dimension.
mmap: Map the index instead of reading it into memory.
changes_offset: The index has all changes before this one: the first DpsrItemChangesApply has this offset.
shard: The number of this index among the shards that split the items.
num_shards: The number of these shards. With several, an item that changes put is added to the shard
  Mix64(id) % num_shards, and hidden in the others.
)doc");

REGISTER_OP("DpsrFaissSearch")
    .Input("handle: resource")
    .Input("query_embedding: float")
    .Input("k: int32")
    .Input("parameters: string")
    .Input("include: string")
    .Input("exclude: string")
    .Input("excluded_item_ids: int64")
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
      TF_RETURN_IF_ERROR(c->WithRank(c->input(kSearchParameters), 0, &unused));
      for (const int input : {kSearchInclude, kSearchExclude, kSearchExcludedItemIds}) {
        TF_RETURN_IF_ERROR(c->WithRankAtMost(c->input(input), 2, &unused));
      }
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

Items that DpsrItemChangesApply has put are found too, and those that it has deleted are not. All rows of a call see the
same changes.

Each head retrieves k items, and the results are united. The score of an item is its largest inner product over the
heads. Equal scores are ordered by ascending item id, and the best k remain. Missing results are padded with -1, -inf
and -1. A row that holds a NaN or an infinity retrieves nothing, and neither does a head of zeros.

Only items that pass the filters of their row are retrieved. An expression is NAME=VALUE, NAME=A|B|C or, for a number,
NAME=LOW..HIGH. Each filter input may be absent, which is a tensor without elements.

query_embedding: [batch, heads, dim]; at most 16 heads.
k: scalar, 1 to 10000.
parameters: scalar, search parameters of this call, for example "nprobe=64"; empty means those of the index.
include: [batch, n], expressions; an item has to meet all of its row. "" is padding.
exclude: [batch, n], expressions; an item must not meet any of its row. "" is padding.
excluded_item_ids: [batch, n], at most 10000 in each row. -1 is padding.
item_ids: [batch, k], best first.
scores: [batch, k], inner products.
heads: [batch, k], the head that gave the score, the lowest one if several gave the same.
)doc");

REGISTER_KERNEL_BUILDER(Name("DpsrFaissIndexHandle").Device(DEVICE_CPU), FaissIndexHandleOp);
REGISTER_KERNEL_BUILDER(Name("DpsrFaissIndexLoad").Device(DEVICE_CPU), FaissIndexLoadOp);
REGISTER_KERNEL_BUILDER(Name("DpsrFaissSearch").Device(DEVICE_CPU), FaissSearchOp);

}  // namespace
}  // namespace dpsr
