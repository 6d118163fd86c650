// Scores single codes of the inverted lists of a FAISS index.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_LIST_SCANNER_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_LIST_SCANNER_H_

#include <cstdint>
#include <memory>

#include "common/status.h"
#include "export/faiss_binding/faiss_index.h"

namespace faiss {
struct InvertedListScanner;
}  // namespace faiss

namespace dpsr {

// A scanner of an index that has_lists(). It keeps its working memory, so it is for one thread at a time.
class FaissListScanner {
 public:
  // The index must outlive the scanner. Errors of this and of SetQuery: Internal (FAISS failed).
  static Status Create(const FaissIndex& index, std::unique_ptr<FaissListScanner>* scanner);
  ~FaissListScanner();
  FaissListScanner(const FaissListScanner&) = delete;
  FaissListScanner& operator=(const FaissListScanner&) = delete;

  // Sets the query y [list_dim]. The array must live until the next call of SetQuery.
  Status SetQuery(const float* y);
  // Sets the list whose codes are scored next. `centroid_score` is the inner product of the query and its centroid.
  void SetList(int64_t list, float centroid_score) { set_list_(scanner_, list, centroid_score); }
  // Returns the inner product of the query and the item with this code, as the index's own search computes it.
  float Score(const uint8_t* code) const { return score_(scanner_, code); }

 private:
  using SetQueryFunction = void(faiss::InvertedListScanner*, const float*);
  using SetListFunction = void(faiss::InvertedListScanner*, int64_t, float);
  using ScoreFunction = float(const faiss::InvertedListScanner*, const uint8_t*);

  explicit FaissListScanner(faiss::InvertedListScanner* scanner);

  faiss::InvertedListScanner* const scanner_;
  // Virtual functions of scanner_. They are looked up once because Score is called for each item.
  SetQueryFunction* const set_query_;
  SetListFunction* const set_list_;
  ScoreFunction* const score_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_LIST_SCANNER_H_
