// A FAISS index, read from a file.
//
// Names and conventions are FAISS's: matrices are row-major, n is the number of queries, d the dimension, k the number
// of results for each query; distances and labels are [n, k], best first. Missing results have the label -1.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_INDEX_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_INDEX_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "common/span.h"
#include "common/status.h"
#include "export/faiss_binding/faiss_library.h"
#include "export/faiss_binding/faiss_metric.h"
#include "export/faiss_binding/search_parameters.h"

namespace faiss {
struct Index;
struct InvertedLists;
struct SearchParameters;
}  // namespace faiss

namespace dpsr {

class FaissGpuCopy;
class MappedFile;

// The positions that a search may return, one bit for each. Position i is bit i % 64 of word i / 64.
using PositionSet = Span<const uint64_t>;

// Search and the other const methods are safe from any number of threads. The others are to be called before.
class FaissIndex {
 public:
  // Reads an index file into memory or, with `mmap`, maps its large arrays read-only. Mapping takes milliseconds, and
  // processes share the pages (FastScan lists and small arrays are copied all the same). A mapped file must not change
  // while the index lives: replace it by renaming another file over it.
  // Errors: NotFound (no such file), DataLoss (not an index, truncated, corrupt), ResourceExhausted.
  static Status Read(const FaissLibrary& library, const std::string& path, bool mmap,
                     std::unique_ptr<FaissIndex>* index);
  // Returns OK when the file has this size and this Checksum (common/packed_file.h).
  // Errors: NotFound (no such file), DataLoss (another size or checksum), with the expected and the actual value.
  static Status CheckFile(const std::string& path, uint64_t bytes, uint64_t checksum);
  ~FaissIndex();
  FaissIndex(const FaissIndex&) = delete;
  FaissIndex& operator=(const FaissIndex&) = delete;

  int64_t d() const;
  int64_t ntotal() const;
  bool is_trained() const;
  FaissMetric metric() const;

  // Sets search parameters, in the syntax of faiss::ParameterSpace: "nprobe=32", "efSearch=64",
  // "nprobe=64,max_codes=20000", "nprobe=64,k_factor_rf=4". Empty text changes nothing. Errors: InvalidArgument, with
  // FAISS's own words (or a max_codes, which FastScan lists do not obey).
  Status SetParameters(const std::string& parameters);
  // Returns the parameters in force. Those that this kind of index does not have are 0.
  SearchParameters parameters() const;
  // Returns OK when the index has each parameter that is set. Errors: InvalidArgument, with the names that it has.
  Status CheckParameters(const SearchParameters& parameters) const;

  // Copies the index to a GPU, which then searches it. The GPU runs one search at a time, and callers that wait share
  // the next one. The CPU still searches among allowed positions, with parameters for one call, and for more than
  // max_gpu_results() results. To be called at most once, before any search. Errors: FailedPrecondition (a FAISS
  // without GPUs, no such device, no memory, an index with a refinement or of a kind that GPUs do not have, a max_codes
  // of the index, which a GPU does not obey); the index is then as before.
  Status CopyToGpu(int device);
  // The largest k of a search on a GPU, for any index.
  static constexpr int64_t kMaxGpuResults = 2048;
  // Returns the largest k of a search of this index on a GPU. It is 512 for lists with the codes SQ8, SQ6 and SQ4, and
  // otherwise kMaxGpuResults. FAISS keeps the scales of these codes in the GPU's shared memory. With a larger k this
  // memory is too small, and FAISS ends the process: https://github.com/facebookresearch/faiss/issues/3207
  int64_t max_gpu_results() const;

  // Searches for the k best vectors for each query: x [n, d] -> distances [n, k], labels [n, k]. Uses `nthreads` OpenMP
  // threads, and leaves the calling thread's own setting as it was. `parameters` hold for this call; those that the
  // index does not have are ignored. With `allowed`, which has a bit for each of the ntotal positions, only allowed
  // positions are returned; an approximate index may miss some of them.
  // Errors: InvalidArgument (n < 0, k < 1, nthreads < 1), Internal (FAISS failed).
  Status Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads = 1,
                const SearchParameters& parameters = {}, const PositionSet* allowed = nullptr) const;

  // Returns whether Reconstruct works. It does not for inverted lists, which would need a table for it.
  bool can_reconstruct() const { return ivf_ == nullptr || refine_ != nullptr; }
  // Calls use(position, x [d]) with the vector of each position, as the index holds it. Errors: Internal (FAISS
  // failed).
  Status Reconstruct(Span<const int64_t> positions, const std::function<void(int64_t, const float*)>& use) const;

  // Inverted lists. All of the following but is_ivf need has_lists(). FastScan lists, whose codes are interleaved, cannot be read; neither
  // are the lists below a refinement, because their codes do not decide the final score.
  bool has_lists() const { return lists_ != nullptr; }
  // Returns whether CopyToGpu has succeeded.
  bool is_on_gpu() const { return gpu_ != nullptr; }
  // Returns whether there are inverted lists of any kind.
  bool is_ivf() const { return ivf_ != nullptr; }
  int64_t num_lists() const;
  int64_t list_size(int64_t list) const;
  // Copies the positions of the items in a list to ids [list_size].
  void ReadListIds(int64_t list, int64_t* ids) const;
  // Returns the codes of the items in a list, [list_size, code_size].
  const uint8_t* list_codes(int64_t list) const;
  int64_t code_size() const;
  // Returns the dimension of the vectors in the lists. It is d(), unless a transform such as PCA comes before the
  // lists.
  int64_t list_dim() const;
  // Applies the transforms before the lists, if there are any: x [n, d] -> y [n, list_dim].
  Status Transform(const float* x, float* y, int64_t n = 1) const;
  // Finds the k lists whose centroids have the largest inner products with each vector, as a search or an addition
  // does: y [n, list_dim] -> lists [n, k], scores [n, k], best first. A missing list is -1.
  Status NearestLists(int64_t n, const float* y, int64_t k, int64_t* lists, float* scores) const;
  // Searches for one vector y [list_dim] in given lists, as Search does after it has found the nearest ones: lists
  // [nprobe], list_scores [nprobe] -> distances [k], labels [k].
  Status SearchLists(const float* y, int64_t k, Span<const int64_t> lists, const float* list_scores, int64_t max_codes,
                     const PositionSet* allowed, float* distances, int64_t* labels) const;
  // Computes the codes that the vectors would have in the given lists: y [n, list_dim], lists [n] -> codes [n,
  // code_size]. The list -1 gives an unspecified code.
  Status Encode(int64_t n, const float* y, const int64_t* lists, uint8_t* codes) const;
  // Computes the vectors that codes stand for: codes [n, code_size], lists [n] -> y [n, list_dim].
  Status Decode(int64_t n, const uint8_t* codes, const int64_t* lists, float* y) const;
  // Copies the centroids of the lists to centroids [num_lists, list_dim]. To be called at most once, before any search.
  // Errors: Internal (FAISS failed).
  Status ReadCentroids(float* centroids);

 private:
  friend class FaissListScanner;
  struct ParameterObjects;

  FaissIndex(const FaissFunctions& faiss, faiss::Index* index, std::unique_ptr<MappedFile> file);
  void FindParts();
  // Returns whether searches obey max_codes. FastScan scores the codes of a list in blocks, and does not count them.
  bool obeys_max_codes() const;
  const faiss::SearchParameters* FillObjects(const SearchParameters& parameters, const PositionSet* allowed,
                                             ParameterObjects* objects) const;

  const FaissFunctions& faiss_;
  const std::unique_ptr<MappedFile> file_;  // index_ points into it; null when the index is in memory
  faiss::Index* const index_;
  // The parts that index_ consists of, from the outside to the inside. A part that it does not have is null.
  const faiss::Index* refine_ = nullptr;     // IndexRefine
  const faiss::Index* transform_ = nullptr;  // IndexPreTransform
  const faiss::Index* hnsw_ = nullptr;       // IndexHNSW
  const faiss::Index* ivf_ = nullptr;        // IndexIVF
  const faiss::InvertedLists* lists_ = nullptr;  // of ivf_, if they can be read
  std::unique_ptr<FaissGpuCopy> gpu_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_INDEX_H_
