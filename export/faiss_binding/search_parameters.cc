#include "export/faiss_binding/search_parameters.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <system_error>

namespace dpsr {
namespace {

constexpr double kLargestValue = 1e9;

// Reads one "name=value" into `parameters`. Returns what is wrong with it, or "".
std::string ParseOne(const std::string& part, SearchParameters* parameters) {
  const size_t equals = std::min(part.find('='), part.size());
  const std::string name = part.substr(0, equals);
  // All of them are whole numbers, except k_factor_rf.
  int64_t* const whole = name == "nprobe"      ? &parameters->nprobe
                         : name == "efSearch"  ? &parameters->ef_search
                         : name == "max_codes" ? &parameters->max_codes
                                               : nullptr;
  if (whole == nullptr && name != "k_factor_rf") {
    return StrCat("\"", name, "\" is not one of nprobe, max_codes, efSearch, k_factor_rf");
  }
  double value = 0;
  const char* const first = part.data() + std::min(equals + 1, part.size());
  const char* const last = part.data() + part.size();
  const auto read = std::from_chars(first, last, value);
  const bool is_number = read.ec == std::errc() && read.ptr == last && value >= 1 && value <= kLargestValue;
  if (!is_number || (whole != nullptr && value != std::floor(value))) {
    return StrCat(name, " is not a ", whole == nullptr ? "" : "whole ", "number from 1 to 1e9");
  }
  if (whole == nullptr ? parameters->k_factor != 0 : *whole != 0) return StrCat(name, " is given twice");
  if (whole == nullptr) {
    parameters->k_factor = value;
  } else {
    *whole = static_cast<int64_t>(value);
  }
  return "";
}

// `bound` 0 forbids the parameter.
template <typename Number>
Status CheckBound(const char* name, Number value, Number bound) {
  if (value == 0 || value <= bound) return Status();
  if (bound == 0) {
    return MakeStatus(StatusCode::kInvalidArgument, "search parameters: ", name, " cannot be set by a request here");
  }
  return MakeStatus(StatusCode::kInvalidArgument, "search parameters: ", name, " is ", value, ", expected at most ",
                    bound);
}

}  // namespace

Status SearchParameters::Parse(const std::string& text, SearchParameters* parameters) {
  *parameters = {};
  std::string problem;
  for (size_t begin = 0; begin < text.size() && problem.empty();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    begin = end + 1;
    problem = begin == text.size() ? "it ends in a comma" : ParseOne(part, parameters);
  }
  if (problem.empty()) return Status();
  return MakeStatus(StatusCode::kInvalidArgument, "search parameters are \"", text, "\": ", problem,
                    "; expected, for example, \"nprobe=32\" or \"nprobe=32,k_factor_rf=4\"");
}

Status SearchParameters::CheckBounds(const SearchParameters& bounds) const {
  DPSR_RETURN_IF_ERROR(CheckBound("nprobe", nprobe, bounds.nprobe));
  if (bounds.max_codes != 0) DPSR_RETURN_IF_ERROR(CheckBound("max_codes", max_codes, bounds.max_codes));
  DPSR_RETURN_IF_ERROR(CheckBound("efSearch", ef_search, bounds.ef_search));
  return CheckBound("k_factor_rf", k_factor, bounds.k_factor);
}

}  // namespace dpsr
