// Texts that stand for something: a shop's own item ids, and the values of features. Text by id and id by text, straight
// from a mapped file.
//
// A key table is a packed file of any kind with these sections; items.dpsr of a shop with text ids is one.
//   id               int64 [keys]         KeyId of each key, distinct
//   id_index.splits  int32 [2^k + 1]      see dpsr_tf/ops/item_table.h
//   id_index.rows    int32 [keys]
//   key.splits       int64 [keys + 1]     row splits of
//   key.bytes        uint8                the keys, UTF-8
//   code             int32 [keys]         may be left out: what each key stands for
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

// The id of a text id everywhere in DPSR: its BLAKE2b digest of 8 bytes (RFC 7693) as a big-endian number without sign
// bit, as in dpsr_tf/data/encode.py.
int64_t KeyId(std::string_view key);

// `text` without white space at its ends, that of Unicode too (U+3000): what ingest does with ids and values.
std::string_view Trimmed(std::string_view text);

// Immutable after Open, so thread-safe.
class KeyTable {
 public:
  // Maps `path` and checks the sections. Errors: NotFound (no such file), DataLoss (damaged, sections missing or not of
  // one length), FailedPrecondition (not a packed file of this version).
  static Status Open(const std::string& path, std::unique_ptr<KeyTable>* table);

  int64_t size() const { return static_cast<int64_t>(index_.ids().size()); }
  // The row of a key or of an id, -1 when there is none.
  int32_t Find(std::string_view key) const;
  int32_t FindId(int64_t id) const { return index_.Find(id); }
  int64_t id(int32_t row) const { return index_.ids()[row]; }
  std::string_view key(int32_t row) const;
  // What the key stands for; 0 where the file does not say.
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
