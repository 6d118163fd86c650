#include "export/faiss_binding/faiss_list_scanner.h"

#include "export/faiss_binding/faiss_functions.h"
#include "export/faiss_binding/faiss_layout.h"

namespace dpsr {

using faiss_layout::VirtualFunction;

Status FaissListScanner::Create(const FaissIndex& index, std::unique_ptr<FaissListScanner>* scanner) {
  faiss::InvertedListScanner* created = nullptr;
  DPSR_RETURN_IF_ERROR(CatchExceptions(StatusCode::kInternal, "FAISS cannot scan the lists of this index",
                                       [&] { created = index.faiss_.NewListScanner(index.ivf_); }));
  scanner->reset(new FaissListScanner(created));
  return Status();
}

FaissListScanner::FaissListScanner(faiss::InvertedListScanner* scanner)
    : scanner_(scanner),
      set_query_(VirtualFunction<SetQueryFunction>(scanner, faiss_layout::kScannerSetQuery)),
      set_list_(VirtualFunction<SetListFunction>(scanner, faiss_layout::kScannerSetList)),
      score_(VirtualFunction<ScoreFunction>(scanner, faiss_layout::kScannerDistanceToCode)) {}

FaissListScanner::~FaissListScanner() {
  using DeleteFunction = void(faiss::InvertedListScanner*);
  VirtualFunction<DeleteFunction>(scanner_, faiss_layout::kScannerDelete)(scanner_);
}

Status FaissListScanner::SetQuery(const float* y) {
  return CatchExceptions(StatusCode::kInternal, "FAISS cannot scan for a query", [&] { set_query_(scanner_, y); });
}

}  // namespace dpsr
