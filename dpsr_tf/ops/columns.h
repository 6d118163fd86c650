// Columns of a store's tables, read from packed files and checked, and the gathers that make tensors of them. Training
// and serving use the same gathers, so an item looks the same to both.
#ifndef DPSR_DPSR_TF_OPS_COLUMNS_H_
#define DPSR_DPSR_TF_OPS_COLUMNS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// Rows of variable length: row i is values[splits[i]] up to values[splits[i + 1]].
struct RaggedColumn {
  Span<const int64_t> splits;
  Span<const int32_t> values;

  int64_t rows() const { return static_cast<int64_t>(splits.size()) - 1; }
  int64_t length(int64_t row) const { return splits[row + 1] - splits[row]; }
  Span<const int32_t> operator[](int64_t row) const { return {values.data() + splits[row], size_t(length(row))}; }
};

// Codes from 0, one a row: in bytes where all of them fit.
struct CodeColumn {
  Span<const uint8_t> bytes;  // one of the two is empty
  Span<const int32_t> words;
};

// Numbers, one a row: codes of a few values where there are few, otherwise the numbers themselves.
struct NumberColumn {
  Span<const uint8_t> codes;  // may be empty
  Span<const float> values;

  bool empty() const { return values.empty(); }
  float operator[](int64_t row) const { return values[codes.empty() ? static_cast<size_t>(row) : codes[row]]; }
  void Prefetch(int64_t row) const {
    if (!codes.empty()) {
      __builtin_prefetch(&codes[row]);
    } else if (!values.empty()) {
      __builtin_prefetch(&values[row]);
    }
  }
};

// Names of features of one table, by how the store holds them.
struct FeatureNames {
  std::vector<std::string> fixed;  // kinds categorical and number: one code a row
  std::vector<std::string> lists;  // kinds multi and text: a list of codes or token ids a row
};

// The features themselves, in the order of their names.
struct FeatureColumns {
  std::vector<CodeColumn> fixed;
  std::vector<RaggedColumn> lists;
};

// Reads sections of one packed file; each is verified when it is read, so sections nobody asks for cost nothing.
// Errors: DataLoss, with file, section and row, for what is damaged, missing, or does not fit together.
class SectionReader {
 public:
  static constexpr int64_t kAnyLength = -1;

  explicit SectionReader(const PackedFile& file) : file_(file) {}

  const PackedFile& file() const { return file_; }
  bool Has(const std::string& name) const { return file_.Find(name) != nullptr; }
  // The section, which has `rows` elements.
  template <typename T>
  Status Array(const std::string& name, int64_t rows, Span<const T>* array) const {
    DPSR_RETURN_IF_ERROR(file_.Get(name, array));
    DPSR_RETURN_IF_ERROR(file_.Verify(*file_.Find(name)));
    return CheckLength(name, array->size(), rows);
  }
  // The section `name` of `rows` codes of the values in section `name`.values, or of the numbers themselves.
  Status Numbers(const std::string& name, int64_t rows, NumberColumn* column) const;
  // The ragged column of `rows` rows; its splits start at 0, never fall, and end with the values.
  Status Ragged(const std::string& splits, const std::string& values, int64_t rows, RaggedColumn* column) const;
  // The same without values: splits over the `values` elements of other sections.
  Status Splits(const std::string& name, int64_t rows, int64_t values, Span<const int64_t>* splits) const;
  // Each row refers to one of `table_size` rows of a table. `minimum` -1 allows for rows that refer to none.
  Status CheckRows(const std::string& name, Span<const int32_t> rows, int64_t table_size, const char* table,
                   int32_t minimum = 0) const;
  // Each row's values ascend without repeats.
  Status CheckAscending(const std::string& name, const RaggedColumn& column) const;
  // Each type is the code of an interaction type.
  Status CheckTypes(const std::string& name, Span<const uint8_t> types) const;
  // The features of a table of `rows` rows. NotFound for one that the table does not have; `table` is its name ("item").
  Status Features(const FeatureNames& names, int64_t rows, const char* table, FeatureColumns* columns) const;

 private:
  Status CheckLength(const std::string& name, size_t got, int64_t expected) const;
  Status Codes(const std::string& section, int64_t rows, CodeColumn* column) const;
  template <typename T>
  Status CheckCodes(const std::string& feature, const std::string& section, Span<const T> codes) const;

  const PackedFile& file_;
};

// What an interaction can be; the code is the index in dpsr_tf.data.schema.EVENT_TYPES: impression, skip, click, cart,
// order.
constexpr uint8_t kNumEventTypes = 5;
constexpr uint8_t kClick = 2;

// The gathers. A row of -1 is one that the table does not have: its texts and lists are empty, its codes 0.

// splits[0] = 0, splits[i + 1] = splits[i] + length of rows[i]; returns the last. `splits` has rows.size() + 1 elements.
int64_t GatherSplits(const RaggedColumn& column, Span<const int32_t> rows, int64_t* splits);
// The values of all rows, one row after the other: as many as GatherSplits returned.
void GatherValues(const RaggedColumn& column, Span<const int32_t> rows, int32_t* values);
// codes [rows.size(), columns.size()], row by row.
void GatherCodes(const std::vector<CodeColumn>& columns, Span<const int32_t> rows, int32_t* codes);

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_COLUMNS_H_
