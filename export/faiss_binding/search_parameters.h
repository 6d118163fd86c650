// The search parameters that one search of a FAISS index may set.
#ifndef DPSR_EXPORT_FAISS_BINDING_SEARCH_PARAMETERS_H_
#define DPSR_EXPORT_FAISS_BINDING_SEARCH_PARAMETERS_H_

#include <cstdint>
#include <string>

#include "common/status.h"

namespace dpsr {

// A parameter that is 0 is not set: the search uses the index's own value.
struct SearchParameters {
  int64_t nprobe = 0;     // number of inverted lists that are searched
  int64_t ef_search = 0;  // efSearch: number of candidates of an HNSW graph
  double k_factor = 0;    // k_factor_rf: k_factor * k candidates are refined
  int64_t max_codes = 0;  // a search ends after it has scored this many codes of inverted lists

  // Reads text such as "nprobe=32,k_factor_rf=4". Empty text sets nothing.
  // Errors: InvalidArgument (an unknown name, a name given twice, a value that is not a number from 1 to 1e9). The
  // message quotes the text.
  static Status Parse(const std::string& text, SearchParameters* parameters);

  // Returns OK when no parameter is above its bound. A bound of 0 forbids the parameter, except max_codes, which only
  // makes a search cheaper.
  // Errors: InvalidArgument, with the value and the bound.
  Status CheckBounds(const SearchParameters& bounds) const;

  // Returns whether nothing is set.
  bool empty() const { return nprobe == 0 && ef_search == 0 && k_factor == 0 && max_codes == 0; }
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_SEARCH_PARAMETERS_H_
