// A fingerprint that shows when a file of a servable was replaced by another one.
#ifndef DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_
#define DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_

#include <string>

#include "common/status.h"

namespace dpsr {

// Computes 16 hex digits: the XXH3 hash of the size and the bytes of a file. A file above 64 MiB is sampled, so that a
// large index still loads as fast as it is mapped: 1,024 blocks of 64 KiB at even distances are read, with the first
// and the last block.
// Errors: NotFound (no such file), Internal (it cannot be read).
Status FileFingerprint(const std::string& path, std::string* fingerprint);

}  // namespace dpsr

#endif  // DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_
