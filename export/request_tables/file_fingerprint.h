// What tells a file of a servable from another that was put in its place.
#ifndef DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_
#define DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_

#include <string>

#include "common/status.h"

namespace dpsr {

// 16 hex digits: the XXH3 hash of the size and the bytes of a file; of one above 64 MiB, of 1,024 blocks of 64 KiB at
// even distances, the first and the last among them, so that a large index loads as fast as it is mapped.
// Errors: NotFound (no such file), Internal (it cannot be read).
Status FileFingerprint(const std::string& path, std::string* fingerprint);

}  // namespace dpsr

#endif  // DPSR_EXPORT_REQUEST_TABLES_FILE_FINGERPRINT_H_
