#include "export/faiss_binding/faiss_index.h"

#include <algorithm>
#include <cstring>
#include <ios>
#include <optional>
#include <utility>
#include <vector>

#include "common/packed_file.h"
#include "export/faiss_binding/faiss_functions.h"
#include "export/faiss_binding/faiss_gpu_copy.h"
#include "export/faiss_binding/faiss_layout.h"
#include "export/faiss_binding/faiss_memory_reader.h"
#include "export/faiss_binding/mapped_file.h"
#include "export/faiss_binding/position_selector.h"

namespace dpsr {

using faiss_layout::ReadField;

Status FaissIndex::Read(const FaissLibrary& library, const std::string& path, bool mmap,
                        std::unique_ptr<FaissIndex>* index) {
  const FaissFunctions& faiss = *library.functions_;
  std::unique_ptr<MappedFile> file;
  DPSR_RETURN_IF_ERROR(MappedFile::Open(path, &file));
  const size_t size = file->size();
  faiss::Index* read = nullptr;
  bool overran_end = false;
  DPSR_RETURN_IF_ERROR(CatchExceptions(StatusCode::kDataLoss, StrCat("cannot read the FAISS index ", path), [&] {
    if (!mmap) {
      read = faiss.read_index(path.c_str(), kFaissIoFlags);
      return;
    }
    FaissMemoryReader reader(faiss, file->data(), size);
    read = faiss.read_index_from(reader.get(), kFaissIoFlags);
    overran_end = reader.OverranEnd();
  }));
  if (!mmap) file.reset();
  std::unique_ptr<FaissIndex> created(new FaissIndex(faiss, read, std::move(file)));
  if (overran_end) {
    return MakeStatus(StatusCode::kDataLoss, "cannot read the FAISS index ", path, ": it is truncated, at ", size,
                      " bytes");
  }
  *index = std::move(created);
  return Status();
}

Status FaissIndex::CheckFile(const std::string& path, uint64_t bytes, uint64_t checksum) {
  std::unique_ptr<MappedFile> file;
  DPSR_RETURN_IF_ERROR(MappedFile::Open(path, &file));
  if (file->size() != bytes) {
    return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", path, " has ", file->size(), " bytes, expected ",
                      bytes, ": the file is truncated, or it is another file");
  }
  const uint64_t actual = Checksum(file->data(), file->size());
  if (actual != checksum) {
    return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", path, " has the checksum ", std::hex, actual,
                      ", expected ", checksum, ": the file is damaged, or it is another file");
  }
  return Status();
}

FaissIndex::FaissIndex(const FaissFunctions& faiss, faiss::Index* index, std::unique_ptr<MappedFile> file)
    : faiss_(faiss), file_(std::move(file)), index_(index) {
  FindParts();
}

FaissIndex::~FaissIndex() {
  gpu_.reset();
  faiss_.Delete(index_);
}

void FaissIndex::FindParts() {
  const faiss::Index* part = index_;
  if (faiss_.IsA(part, faiss_.refine_type)) {
    refine_ = part;
    part = ReadField<const faiss::Index*>(part, faiss_layout::kRefineBaseIndex);
  }
  if (faiss_.IsA(part, faiss_.pre_transform_type)) {
    transform_ = part;
    part = ReadField<const faiss::Index*>(part, faiss_layout::kPreTransformIndex);
  }
  if (faiss_.IsA(part, faiss_.hnsw_type)) hnsw_ = part;
  if (!faiss_.IsA(part, faiss_.ivf_type)) return;
  ivf_ = part;
  // Where the transform repeats a vector, the codes are residual codes, which FAISS cannot choose for other vectors.
  const bool repeats = transform_ != nullptr && list_dim() > d();
  if (refine_ == nullptr && !faiss_.IsA(part, faiss_.fast_scan_type) && !repeats) {
    lists_ = ReadField<const faiss::InvertedLists*>(part, faiss_layout::kIvfInvlists);
  }
}

int64_t FaissIndex::d() const { return ReadField<int32_t>(index_, faiss_layout::kIndexD); }
int64_t FaissIndex::ntotal() const { return ReadField<int64_t>(index_, faiss_layout::kIndexNtotal); }
bool FaissIndex::is_trained() const { return ReadField<uint8_t>(index_, faiss_layout::kIndexIsTrained) != 0; }
FaissMetric FaissIndex::metric() const { return ReadField<FaissMetric>(index_, faiss_layout::kIndexMetricType); }

// Search parameters.

bool FaissIndex::obeys_max_codes() const { return ivf_ != nullptr && !faiss_.IsA(ivf_, faiss_.fast_scan_type); }

Status FaissIndex::SetParameters(const std::string& parameters) {
  if (parameters.empty()) return Status();
  if (parameters.find("max_codes") != std::string::npos && !obeys_max_codes()) {
    return MakeStatus(StatusCode::kInvalidArgument, "cannot set the search parameters \"", parameters,
                      "\": max_codes needs inverted lists, and not those of FastScan");
  }
  return CatchExceptions(StatusCode::kInvalidArgument, StrCat("cannot set the search parameters \"", parameters, "\""),
                         [&] { faiss_.SetIndexParameters(index_, parameters.c_str()); });
}

SearchParameters FaissIndex::parameters() const {
  SearchParameters own;
  if (ivf_ != nullptr) own.nprobe = ReadField<int64_t>(ivf_, faiss_layout::kIvfNprobe);
  if (obeys_max_codes()) own.max_codes = ReadField<int64_t>(ivf_, faiss_layout::kIvfMaxCodes);
  if (hnsw_ != nullptr) own.ef_search = ReadField<int32_t>(hnsw_, faiss_layout::kHnswEfSearch);
  if (refine_ != nullptr) own.k_factor = ReadField<float>(refine_, faiss_layout::kRefineKFactor);
  return own;
}

Status FaissIndex::CheckParameters(const SearchParameters& parameters) const {
  struct Parameter {
    const char* name;
    bool is_set;
    bool index_has_it;
  };
  const Parameter all[] = {{"nprobe", parameters.nprobe != 0, ivf_ != nullptr},
                           {"max_codes", parameters.max_codes != 0, obeys_max_codes()},
                           {"efSearch", parameters.ef_search != 0, hnsw_ != nullptr},
                           {"k_factor_rf", parameters.k_factor != 0, refine_ != nullptr}};
  std::string names;
  for (const Parameter& parameter : all) {
    if (parameter.index_has_it) names += (names.empty() ? "" : ", ") + std::string(parameter.name);
  }
  for (const Parameter& parameter : all) {
    if (!parameter.is_set || parameter.index_has_it) continue;
    if (names.empty()) {
      return MakeStatus(StatusCode::kInvalidArgument, "search parameters: this index takes none; leave out ",
                        parameter.name);
    }
    return MakeStatus(StatusCode::kInvalidArgument, "search parameters: this index has no ", parameter.name, ", only ",
                      names);
  }
  return Status();
}

// Search.

// The objects that hold FAISS's search parameters during one call. Each is used by one part of the index.
struct FaissIndex::ParameterObjects {
  std::optional<PositionSelector> selector;
  faiss::SearchParameters plain;
  faiss::SearchParametersIVF ivf;
  faiss::SearchParametersHNSW hnsw;
  faiss::IndexRefineSearchParameters refine;
  faiss::SearchParametersPreTransform transform;
};

// Returns the object that FAISS's search() has to be given, or null when it needs none.
const faiss::SearchParameters* FaissIndex::FillObjects(const SearchParameters& parameters, const PositionSet* allowed,
                                                       ParameterObjects* objects) const {
  if (parameters.empty() && allowed == nullptr) return nullptr;
  const SearchParameters own = this->parameters();
  const faiss::SearchParameters* inner = nullptr;
  if (allowed != nullptr) {
    objects->plain.sel = &objects->selector.emplace(*allowed);
    inner = &objects->plain;
  }
  if (ivf_ != nullptr) {
    objects->ivf.sel = objects->plain.sel;
    objects->ivf.nprobe = static_cast<size_t>(parameters.nprobe != 0 ? parameters.nprobe : own.nprobe);
    objects->ivf.max_codes = static_cast<size_t>(parameters.max_codes != 0 ? parameters.max_codes : own.max_codes);
    inner = &objects->ivf;
  } else if (hnsw_ != nullptr) {
    objects->hnsw.sel = objects->plain.sel;
    objects->hnsw.efSearch = static_cast<int>(parameters.ef_search != 0 ? parameters.ef_search : own.ef_search);
    inner = &objects->hnsw;
  }
  if (transform_ != nullptr) {
    objects->transform.index_params = inner;
    inner = &objects->transform;
  }
  if (refine_ != nullptr) {
    objects->refine.base_index_params = inner;
    objects->refine.k_factor = static_cast<float>(parameters.k_factor != 0 ? parameters.k_factor : own.k_factor);
    inner = &objects->refine;
  }
  return inner;
}

Status FaissIndex::Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads,
                          const SearchParameters& parameters, const PositionSet* allowed) const {
  if (n < 0 || k < 1 || nthreads < 1) {
    return MakeStatus(StatusCode::kInvalidArgument, "search with n = ", n, ", k = ", k, ", nthreads = ", nthreads,
                      ", expected n >= 0, k >= 1, nthreads >= 1");
  }
  if (n == 0) return Status();
  return CatchExceptions(StatusCode::kInternal, "FAISS search failed", [&] {
    const OmpThreads threads(faiss_, nthreads);
    if (gpu_ != nullptr && allowed == nullptr && parameters.empty() && k <= max_gpu_results()) {
      gpu_->Search(n, x, k, distances, labels);
      return;
    }
    ParameterObjects objects;
    faiss_.Search(index_, n, x, k, distances, labels, FillObjects(parameters, allowed, &objects));
  });
}

int64_t FaissIndex::max_gpu_results() const {
  constexpr int64_t kMostWithScales = 512;
  if (ivf_ == nullptr || !faiss_.IsA(ivf_, faiss_.ivf_scalar_type)) return kMaxGpuResults;
  const auto* lists = ReadField<const faiss::InvertedLists*>(ivf_, faiss_layout::kIvfInvlists);
  // Codes of 16-bit floats have no scales, others have one for each dimension.
  const bool has_scales = ReadField<int64_t>(lists, faiss_layout::kInvertedListsCodeSize) < 2 * list_dim();
  return has_scales ? kMostWithScales : kMaxGpuResults;
}

Status FaissIndex::CopyToGpu(int device) {
  if (refine_ != nullptr) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the index has a refinement, which a GPU does not search with");
  }
  if (parameters().max_codes != 0) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the index has the search parameter max_codes=",
                      parameters().max_codes, ", which a search on a GPU does not obey");
  }
  return FaissGpuCopy::Create(faiss_, index_, d(), device, &gpu_);
}

Status FaissIndex::Reconstruct(Span<const int64_t> positions,
                               const std::function<void(int64_t, const float*)>& use) const {
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot reconstruct a vector", [&] {
    const OmpThreads one_thread(faiss_, 1);
    std::vector<float> x(d());
    for (const int64_t position : positions) {
      faiss_.Reconstruct(index_, position, x.data());
      use(position, x.data());
    }
  });
}

// Inverted lists.

int64_t FaissIndex::num_lists() const { return ReadField<int64_t>(ivf_, faiss_layout::kIvfNlist); }

int64_t FaissIndex::list_size(int64_t list) const { return static_cast<int64_t>(faiss_.ListSize(lists_, list)); }

void FaissIndex::ReadListIds(int64_t list, int64_t* ids) const {
  // In a mapped file FAISS's ids are not always aligned, so they are copied.
  const void* const from = faiss_.ListIds(lists_, list);
  const int64_t size = list_size(list);
  if (size > 0) std::memcpy(ids, from, size * sizeof(ids[0]));
}

const uint8_t* FaissIndex::list_codes(int64_t list) const { return faiss_.ListCodes(lists_, list); }

int64_t FaissIndex::code_size() const { return ReadField<int64_t>(lists_, faiss_layout::kInvertedListsCodeSize); }
int64_t FaissIndex::list_dim() const { return ReadField<int32_t>(ivf_, faiss_layout::kIndexD); }

Status FaissIndex::Transform(const float* x, float* y, int64_t n) const {
  if (transform_ == nullptr) {
    std::copy_n(x, n * d(), y);
    return Status();
  }
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot transform a vector", [&] {
    const OmpThreads one_thread(faiss_, 1);
    // FAISS returns x itself, or a new array.
    const float* const transformed = faiss_.apply_chain(transform_, n, x);
    std::copy_n(transformed, n * list_dim(), y);
    if (transformed != x) delete[] transformed;
  });
}

Status FaissIndex::NearestLists(int64_t n, const float* y, int64_t k, int64_t* lists, float* scores) const {
  if (n == 0) return Status();
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot find the nearest lists", [&] {
    const OmpThreads one_thread(faiss_, 1);
    const auto* const quantizer = ReadField<const faiss::Index*>(ivf_, faiss_layout::kIvfQuantizer);
    faiss_.Search(quantizer, n, y, k, scores, lists);
  });
}

Status FaissIndex::SearchLists(const float* y, int64_t k, Span<const int64_t> lists, const float* list_scores,
                               int64_t max_codes, const PositionSet* allowed, float* distances, int64_t* labels) const {
  return CatchExceptions(StatusCode::kInternal, "FAISS search failed", [&] {
    const OmpThreads one_thread(faiss_, 1);
    std::optional<PositionSelector> selector;
    faiss::SearchParametersIVF parameters;
    if (allowed != nullptr) parameters.sel = &selector.emplace(*allowed);
    parameters.nprobe = lists.size();
    parameters.max_codes = static_cast<size_t>(max_codes);
    faiss_.SearchLists(ivf_, 1, y, k, lists.data(), list_scores, distances, labels, &parameters);
  });
}

Status FaissIndex::Encode(int64_t n, const float* y, const int64_t* lists, uint8_t* codes) const {
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot encode vectors", [&] {
    const OmpThreads one_thread(faiss_, 1);
    faiss_.EncodeVectors(ivf_, n, y, lists, codes);
  });
}

Status FaissIndex::Decode(int64_t n, const uint8_t* codes, const int64_t* lists, float* y) const {
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot decode codes", [&] {
    const OmpThreads one_thread(faiss_, 1);
    faiss_.DecodeVectors(ivf_, n, codes, lists, y);
  });
}

Status FaissIndex::ReadCentroids(float* centroids) {
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot reconstruct the centroids", [&] {
    auto* const quantizer = ReadField<faiss::Index*>(ivf_, faiss_layout::kIvfQuantizer);
    // A quantizer that has inverted lists itself needs a table to reconstruct its vectors.
    if (faiss_.IsA(quantizer, faiss_.ivf_type)) faiss_.make_direct_map(quantizer, /*new_maintain=*/true);
    for (int64_t list = 0; list < num_lists(); ++list) {
      faiss_.Reconstruct(quantizer, list, centroids + list * list_dim());
    }
  });
}

}  // namespace dpsr
