// Internal to export/faiss_binding/. Proves that a FAISS library behaves as faiss_layout.h assumes.
#ifndef DPSR_EXPORT_FAISS_BINDING_SELF_TEST_H_
#define DPSR_EXPORT_FAISS_BINDING_SELF_TEST_H_

#include "common/status.h"
#include "export/faiss_binding/faiss_functions.h"

namespace dpsr {

// Builds small indexes with FAISS, and compares what the binding reads of them, and what searches return, with what is
// known to be right. Takes a few milliseconds.
// Errors: FailedPrecondition, with what is not as expected.
Status SelfTest(const FaissFunctions& faiss);

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_SELF_TEST_H_
