#include "export/faiss_binding/self_test.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "export/faiss_binding/faiss_layout.h"
#include "export/faiss_binding/faiss_memory_reader.h"
#include "export/faiss_binding/position_selector.h"

namespace dpsr {
namespace {

using faiss_layout::ReadField;

// Deletes an index through FAISS.
struct IndexDeleter {
  const FaissFunctions* faiss;
  void operator()(faiss::Index* index) const { faiss->Delete(index); }
};
using OwnedIndex = std::unique_ptr<faiss::Index, IndexDeleter>;

// Throws what FAISS throws, as all of the tests below.
OwnedIndex MakeIndex(const FaissFunctions& faiss, int d, const char* description,
                     FaissMetric metric = FaissMetric::kInnerProduct) {
  return OwnedIndex(faiss.index_factory(d, description, metric, /*own_inverted_lists=*/true), IndexDeleter{&faiss});
}

// Each of the tests returns what is not as expected, or "".

std::string TestIndexFields(const FaissFunctions& faiss, FaissMetric metric) {
  constexpr int kDim = 3;
  constexpr float kVectors[2 * kDim] = {1, 0, 0, 0, 1, 0};
  const OwnedIndex index = MakeIndex(faiss, kDim, "Flat", metric);
  if (ReadField<int32_t>(index.get(), faiss_layout::kIndexD) != kDim ||
      ReadField<int64_t>(index.get(), faiss_layout::kIndexNtotal) != 0 ||
      ReadField<uint8_t>(index.get(), faiss_layout::kIndexIsTrained) != 1 ||
      ReadField<FaissMetric>(index.get(), faiss_layout::kIndexMetricType) != metric) {
    return "the fields of an index are not where they are expected";
  }
  faiss.flat_add(index.get(), 2, kVectors);
  if (ReadField<int64_t>(index.get(), faiss_layout::kIndexNtotal) != 2) return "ntotal is not where it is expected";
  const OwnedIndex untrained = MakeIndex(faiss, 2, "IVF2,Flat");
  if (ReadField<uint8_t>(untrained.get(), faiss_layout::kIndexIsTrained) != 0) {
    return "an untrained index says that it is trained";
  }
  return "";
}

std::string TestSearch(const FaissFunctions& faiss, FaissMetric metric) {
  constexpr int kDim = 3;
  constexpr int64_t kVectors = 4;
  constexpr int64_t kResults = 5;  // one more than there are vectors: the last result is padding
  constexpr float kVector[kVectors * kDim] = {1, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0};
  constexpr float kQuery[kDim] = {1, .75f, .25f};
  using Labels = std::array<int64_t, kResults>;
  const bool inner_product = metric == FaissMetric::kInnerProduct;
  const Labels expected = inner_product ? Labels{3, 0, 1, 2, -1} : Labels{0, 1, 3, 2, -1};
  const float expected_best = inner_product ? 2.0f : 0.625f;

  const OwnedIndex index = MakeIndex(faiss, kDim, "Flat", metric);
  faiss.flat_add(index.get(), kVectors, kVector);
  const OmpThreads one_thread(faiss, 1);
  std::array<float, kResults> distances = {};
  Labels labels = {};
  faiss.Search(index.get(), 1, kQuery, kResults, distances.data(), labels.data());
  if (labels != expected || distances[0] != expected_best) {
    return StrCat("a search by ", FaissMetricName(metric), " gave a wrong result");
  }

  constexpr uint64_t kFirstTwo = 0b0011;
  const PositionSelector selector(Span<const uint64_t>(&kFirstTwo, 1));
  faiss::SearchParameters parameters;
  parameters.sel = &selector;
  faiss.Search(index.get(), 1, kQuery, 2, distances.data(), labels.data(), &parameters);
  std::array<float, kDim> second = {};
  faiss.Reconstruct(index.get(), 1, second.data());
  if (labels[0] != 0 || labels[1] != 1 || second != std::array<float, kDim>{0, 1, 0}) {
    return StrCat("a search among some vectors, by ", FaissMetricName(metric), ", gave a wrong result");
  }
  return "";
}

std::string TestMemoryReader(const FaissFunctions& faiss) {
  constexpr uint32_t kItems[2] = {0, 0};
  // The first reader has room for two items, and nothing is left of a third.
  FaissMemoryReader whole(faiss, kItems, sizeof(kItems));
  void* view = nullptr;
  const bool reads_all = whole.View(&view, sizeof(uint32_t), 2) == 2 && view == kItems &&
                         whole.View(&view, sizeof(uint32_t), 1) == 0 && !whole.OverranEnd();
  // The second item of the other reader is cut short: reading it overruns the end.
  FaissMemoryReader partial(faiss, kItems, sizeof(kItems) - 1);
  const bool tells_overrun = partial.View(&view, sizeof(uint32_t), 2) == 2 && partial.OverranEnd();
  if (!reads_all || !tells_overrun || !whole.Fits()) return "its ZeroCopyIOReader is not as expected";

  FaissMemoryReader not_an_index(faiss, kItems, sizeof(kItems));
  const Status thrown = CatchExceptions(StatusCode::kDataLoss, "", [&] {
    faiss.Delete(faiss.read_index_from(not_an_index.get(), kFaissIoFlags));
  });
  return thrown.code() == StatusCode::kDataLoss ? "" : "it reads an index where there is none";
}

// The tests of fields set a parameter to this with FAISS and look for it at its offset.
constexpr int64_t kParameter = 77;

std::string TestIvfFields(const FaissFunctions& faiss) {
  const OwnedIndex index = MakeIndex(faiss, 4, "IVF3,SQ8");
  faiss.SetIndexParameters(index.get(), "nprobe=77,max_codes=78");
  const bool types = faiss.IsA(index.get(), faiss.ivf_type) && !faiss.IsA(index.get(), faiss.hnsw_type) &&
                     !faiss.IsA(index.get(), faiss.fast_scan_type) &&
                     faiss.IsA(index.get(), faiss.ivf_scalar_type);
  if (!types || ReadField<int64_t>(index.get(), faiss_layout::kIvfNlist) != 3 ||
      ReadField<int64_t>(index.get(), faiss_layout::kIvfNprobe) != kParameter ||
      ReadField<int64_t>(index.get(), faiss_layout::kIvfMaxCodes) != kParameter + 1) {
    return "the fields of IndexIVF are not where they are expected";
  }
  const auto* quantizer = ReadField<const faiss::Index*>(index.get(), faiss_layout::kIvfQuantizer);
  const auto* lists = ReadField<const faiss::InvertedLists*>(index.get(), faiss_layout::kIvfInvlists);
  if (ReadField<int32_t>(quantizer, faiss_layout::kIndexD) != 4 ||
      ReadField<int64_t>(lists, faiss_layout::kInvertedListsNlist) != 3 ||
      ReadField<int64_t>(lists, faiss_layout::kInvertedListsCodeSize) != 4 || faiss.ListSize(lists, 2) != 0) {
    return "the fields of IndexIVF are not where they are expected";
  }
  return "";
}

std::string TestHnswFields(const FaissFunctions& faiss) {
  const OwnedIndex index = MakeIndex(faiss, 4, "HNSW4");
  faiss.SetIndexParameters(index.get(), "efSearch=77");
  if (faiss.IsA(index.get(), faiss.hnsw_type) &&
      ReadField<int32_t>(index.get(), faiss_layout::kHnswEfSearch) == kParameter) {
    return "";
  }
  return "the fields of IndexHNSW are not where they are expected";
}

std::string TestPreTransformFields(const FaissFunctions& faiss) {
  const OwnedIndex index = MakeIndex(faiss, 4, "PCA2,Flat");
  if (faiss.IsA(index.get(), faiss.pre_transform_type)) {
    const auto* inner = ReadField<const faiss::Index*>(index.get(), faiss_layout::kPreTransformIndex);
    if (ReadField<int32_t>(inner, faiss_layout::kIndexD) == 2) return "";
  }
  return "the fields of IndexPreTransform are not where they are expected";
}

std::string TestRefineFields(const FaissFunctions& faiss) {
  const OwnedIndex index = MakeIndex(faiss, 4, "SQ8,RFlat");
  faiss.SetIndexParameters(index.get(), "k_factor_rf=77");
  if (faiss.IsA(index.get(), faiss.refine_type) &&
      ReadField<float>(index.get(), faiss_layout::kRefineKFactor) == kParameter) {
    const auto* base = ReadField<const faiss::Index*>(index.get(), faiss_layout::kRefineBaseIndex);
    if (ReadField<int32_t>(base, faiss_layout::kIndexD) == 4) return "";
  }
  return "the fields of IndexRefine are not where they are expected";
}

// Passes parameters with a value that FAISS refuses, then with one that it accepts, to see that it finds the value.
std::string TestSearchParameters(const FaissFunctions& faiss) {
  constexpr float kQuery[4] = {1, 0, 0, 0};
  float distance = 0;
  int64_t label = 0;
  const auto accepts = [&](const OwnedIndex& index, const faiss::SearchParameters& parameters) {
    const Status status = CatchExceptions(StatusCode::kInvalidArgument, "", [&] {
      faiss.Search(index.get(), 1, kQuery, 1, &distance, &label, &parameters);
    });
    return status.ok();
  };
  const OwnedIndex ivf = MakeIndex(faiss, 4, "IVF1,Flat");
  const OmpThreads one_thread(faiss, 1);
  // FAISS prints a warning when it has fewer vectors than this for one centroid.
  constexpr int64_t kTrain = 39;
  const std::array<float, 4 * kTrain> vectors = {1, 0, 0, 0};
  faiss.ivf_train(ivf.get(), kTrain, vectors.data());
  faiss::SearchParametersIVF ivf_parameters;
  ivf_parameters.nprobe = 0;
  const bool refuses_nprobe = !accepts(ivf, ivf_parameters);
  ivf_parameters.nprobe = 1;
  faiss.ivf_add(ivf.get(), 2, vectors.data());
  // Returns the number of results of a search that may score this many codes.
  const auto found_within = [&](size_t max_codes) {
    ivf_parameters.max_codes = max_codes;
    std::array<float, 2> distances = {};
    std::array<int64_t, 2> labels = {};
    faiss.Search(ivf.get(), 1, kQuery, 2, distances.data(), labels.data(), &ivf_parameters);
    return std::count_if(labels.begin(), labels.end(), [](int64_t position) { return position >= 0; });
  };
  const bool has_budget = found_within(1) == 1 && found_within(0) == 2;
  const OwnedIndex refine = MakeIndex(faiss, 4, "Flat,RFlat");
  faiss::IndexRefineSearchParameters refine_parameters;
  refine_parameters.k_factor = 0.5f;
  const bool refuses_k_factor = !accepts(refine, refine_parameters);
  refine_parameters.k_factor = 1;
  if (refuses_nprobe && has_budget && accepts(ivf, ivf_parameters) && refuses_k_factor && accepts(refine, refine_parameters)) {
    return "";
  }
  return "its search parameters are not as expected";
}

// FAISS reports errors by exceptions. They have to arrive here as std::exception, with their text.
std::string TestExceptions(const FaissFunctions& faiss) {
  const Status thrown =
      CatchExceptions(StatusCode::kInvalidArgument, "", [&] { MakeIndex(faiss, 2, "no_such_index"); });
  if (thrown.code() == StatusCode::kInvalidArgument && thrown.message().find("no_such_index") != std::string::npos) {
    return "";
  }
  return "its exceptions do not arrive as expected";
}

}  // namespace

Status SelfTest(const FaissFunctions& faiss) {
  // Later tests rely on what earlier ones have proved.
  std::string problem;
  DPSR_RETURN_IF_ERROR(
      CatchExceptions(StatusCode::kFailedPrecondition, faiss.path() + ": self-test", [&faiss, &problem] {
        for (const FaissMetric metric : {FaissMetric::kInnerProduct, FaissMetric::kL2}) {
          if (problem.empty()) problem = TestIndexFields(faiss, metric);
          if (problem.empty()) problem = TestSearch(faiss, metric);
        }
        for (const auto test : {TestMemoryReader, TestIvfFields, TestHnswFields, TestPreTransformFields,
                                TestRefineFields, TestSearchParameters, TestExceptions}) {
          if (problem.empty()) problem = test(faiss);
        }
      }));
  return problem.empty() ? Status() : faiss.Refuse("self-test: " + problem);
}

}  // namespace dpsr
