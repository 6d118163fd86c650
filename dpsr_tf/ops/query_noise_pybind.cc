// Adapts query_noise.h to arrays.
#include "dpsr_tf/ops/query_noise.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/status.h"
#include "dpsr_tf/ops/native_pybind.h"

namespace py = pybind11;

namespace dpsr {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Raises ValueError unless 0 <= rate <= 1.
void CheckRate(const char* name, double rate) {
  if (!(rate >= 0 && rate <= 1)) throw py::value_error(StrCat(name, " is ", rate, ", expected 0 to 1"));
}

// The texts of two arrays: their UTF-8 bytes uint8 [total], and row splits int64 [num_texts + 1].
class TextArrays {
 public:
  // Raises ValueError unless there is a seed for each text, and the splits ascend within the bytes.
  TextArrays(const Array<uint8_t>& bytes, const Array<int64_t>& splits, const Array<uint64_t>& seeds)
      : bytes_(reinterpret_cast<const char*>(bytes.data())), splits_(splits.data()), size_(seeds.size()) {
    if (bytes.ndim() != 1 || splits.ndim() != 1 || seeds.ndim() != 1 || splits.size() != size_ + 1) {
      throw py::value_error(StrCat("got ", splits.size(), " splits for ", size_, " seeds, expected vectors and one more"));
    }
    int64_t before = 0;
    for (py::ssize_t i = 0; i <= size_; ++i) {
      if (splits_[i] < before || splits_[i] > bytes.size()) {
        throw py::value_error(StrCat("split ", i, " is ", splits_[i], ", expected ", before, " to ", bytes.size()));
      }
      before = splits_[i];
    }
  }
  size_t size() const { return static_cast<size_t>(size_); }
  std::string_view operator[](size_t i) const {
    return std::string_view(bytes_ + splits_[i], static_cast<size_t>(splits_[i + 1] - splits_[i]));
  }

 private:
  const char* bytes_;
  const int64_t* splits_;
  py::ssize_t size_;
};

py::list ToList(const std::vector<std::string>& texts) {
  py::list list(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) list[i] = py::bytes(texts[i]);
  return list;
}

py::list ShortenedTexts(const Array<uint8_t>& bytes, const Array<int64_t>& splits, const Array<uint64_t>& seeds,
                        double drop_rate, double typo_rate) {
  CheckRate("drop_rate", drop_rate);
  CheckRate("typo_rate", typo_rate);
  const TextArrays texts(bytes, splits, seeds);
  std::vector<std::string> noisy(texts.size());
  {
    const py::gil_scoped_release release;
    for (size_t i = 0; i < texts.size(); ++i) {
      RandomStream random(seeds.data()[i]);
      noisy[i] = Shortened(texts[i], drop_rate, typo_rate, &random);
    }
  }
  return ToList(noisy);
}

// Makes queries of titles.
class TitlePieces {
 public:
  explicit TitlePieces(std::unordered_map<std::string, double> keep_rates) : keep_rates_(std::move(keep_rates)) {
    for (const auto& [word, rate] : keep_rates_) CheckRate(word.c_str(), rate);
  }

  py::tuple operator()(const Array<uint8_t>& bytes, const Array<int64_t>& splits, const Array<uint64_t>& seeds,
                       double typo_rate) const {
    CheckRate("typo_rate", typo_rate);
    const TextArrays texts(bytes, splits, seeds);
    std::vector<std::string> pieces(texts.size()), noisy(texts.size());
    {
      const py::gil_scoped_release release;
      KeepRate keep_rate;
      if (!keep_rates_.empty()) {
        keep_rate = [this](std::string_view word) {
          const auto found = keep_rates_.find(std::string(word));
          return found == keep_rates_.end() ? 1.0 : found->second;
        };
      }
      for (size_t i = 0; i < texts.size(); ++i) {
        RandomStream random(seeds.data()[i]);
        pieces[i] = PieceOf(texts[i], keep_rate, /*typo_rate=*/0, &random);
        noisy[i] = Misspelt(pieces[i], typo_rate, &random);
      }
    }
    return py::make_tuple(ToList(pieces), ToList(noisy));
  }

 private:
  std::unordered_map<std::string, double> keep_rates_;
};

}  // namespace

void DefineQueryNoise(py::module_& m) {
  m.def("shortened", &ShortenedTexts, py::arg("bytes"), py::arg("splits"), py::arg("seeds"), py::kw_only(),
        py::arg("drop_rate"), py::arg("typo_rate"),
        R"(Returns texts with typing errors and without some words, as a list of bytes. See query_noise.h.

bytes: uint8 [total], the texts in UTF-8, one after another.
splits: int64 [num_texts + 1], where each begins, and where the last ends.
seeds: uint64 [num_texts]. The result for a text depends on the text, its seed and the rates only.
drop_rate: probability that a word is left out, 0 to 1.
typo_rate: probability that a word of four or more letters gets a typing error, 0 to 1.

Raises ValueError for arrays that do not fit, and for a rate out of range.)");
  py::class_<TitlePieces>(m, "TitlePieces", R"(Makes queries of titles. Immutable, thread-safe.

keep_rates: the probability that a word stays in a title, 0 to 1; 1 for all other words.)")
      .def(py::init<std::unordered_map<std::string, double>>(), py::arg("keep_rates"))
      .def("__call__", &TitlePieces::operator(), py::arg("bytes"), py::arg("splits"), py::arg("seeds"), py::kw_only(),
           py::arg("typo_rate"),
           R"(Returns a piece of each title, and the piece with typing errors, as two lists of bytes.

The arguments are those of `shortened`. A title without words has an empty piece.)");
}

}  // namespace dpsr
