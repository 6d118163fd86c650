// A table of texts (keys) that looks up ids by key and keys by id, in a mapped file. Keys are a shop's own item ids, or
// values of features.
//
// A key table is a packed file of any kind with these sections. The items.dpsr of a shop with text ids is one.
//   id               int64 [keys]         KeyId of each key, distinct
//   id_index.splits  int32 [2^k + 1]      see dpsr_tf/ops/item_table.h
//   id_index.rows    int32 [keys]
//   key.splits       int64 [keys + 1]     row splits of key.bytes
//   key.bytes        uint8                the keys, UTF-8
//   code             int32 [keys]         optional, the code of each key
#ifndef DPSR_EXPORT_REQUEST_TABLES_KEY_TABLE_H_
#define DPSR_EXPORT_REQUEST_TABLES_KEY_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "dpsr_tf/ops/id_index.h"
#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// Returns the id that DPSR uses for a text id: its BLAKE2b digest of 8 bytes (RFC 7693) as a big-endian number without
// the sign bit, as in dpsr_tf/data/encode.py.
int64_t KeyId(std::string_view key);

// Returns `text` without white space at its ends, Unicode's (such as U+3000) included, as ingest does with ids and
// values.
std::string_view Trimmed(std::string_view text);

// Immutable after Open, and thread-safe.
class KeyTable {
 public:
  // Maps `path` and checks the sections. Errors: NotFound (no such file), DataLoss (damaged, sections are missing or
  // differ in length), FailedPrecondition (not a packed file of this version).
  static Status Open(const std::string& path, std::unique_ptr<KeyTable>* table);

  int64_t size() const { return static_cast<int64_t>(index_.ids().size()); }
  // Returns the row of a key or of an id, or -1 when there is none.
  int32_t Find(std::string_view key) const;
  int32_t FindId(int64_t id) const { return index_.Find(id); }
  int64_t id(int32_t row) const { return index_.ids()[row]; }
  std::string_view key(int32_t row) const;
  // Returns the code of a key, or 0 if the file has no codes.
  int32_t code(int32_t row) const { return codes_.empty() ? 0 : codes_[row]; }

 private:
  KeyTable() = default;

  std::unique_ptr<PackedFile> file_;
  IdIndex index_;
  Span<const int64_t> splits_;
  Span<const uint8_t> bytes_;
  Span<const int32_t> codes_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_REQUEST_TABLES_KEY_TABLE_H_
