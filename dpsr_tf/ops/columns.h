// Columns of a store's tables, read from packed files and checked, and the gathers that turn them into tensors.
// Training and serving use the same gathers, so that they see the same item.
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

// One code for each row, from 0; in bytes if all of them fit.
struct CodeColumn {
  Span<const uint8_t> bytes;  // one of the two is empty
  Span<const int32_t> words;
};

// One number for each row: codes if there are few different numbers, otherwise the numbers themselves.
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

// Names of features of one table, split by how the store holds them.
struct FeatureNames {
  std::vector<std::string> fixed;  // kinds categorical and number: one code for each row
  // Kinds multi and text: a list of codes or token ids for each row. Kind vector: the bits of its numbers, or nothing.
  std::vector<std::string> lists;
};

// The features themselves, in the order of their names.
struct FeatureColumns {
  std::vector<CodeColumn> fixed;
  std::vector<RaggedColumn> lists;
};

// Reads sections of one packed file. A section is verified when it is read, so other sections take no time. Errors:
// DataLoss, with file, section and row, for sections that are damaged, missing, or do not fit together.
class SectionReader {
 public:
  static constexpr int64_t kAnyLength = -1;

  explicit SectionReader(const PackedFile& file) : file_(file) {}

  const PackedFile& file() const { return file_; }
  bool Has(const std::string& name) const { return file_.Find(name) != nullptr; }
  // Reads a section of `rows` elements.
  template <typename T>
  Status Array(const std::string& name, int64_t rows, Span<const T>* array) const {
    DPSR_RETURN_IF_ERROR(file_.Get(name, array));
    DPSR_RETURN_IF_ERROR(file_.Verify(*file_.Find(name)));
    return CheckLength(name, array->size(), rows);
  }
  // Reads `rows` numbers: the section `name` has codes of the values in the section `name`.values, or the numbers.
  Status Numbers(const std::string& name, int64_t rows, NumberColumn* column) const;
  // Reads a ragged column of `rows` rows. Its splits start at 0, never fall, and end with the values.
  Status Ragged(const std::string& splits, const std::string& values, int64_t rows, RaggedColumn* column) const;
  // Reads and checks splits over the `values` elements of other sections.
  Status Splits(const std::string& name, int64_t rows, int64_t values, Span<const int64_t>* splits) const;
  // Checks that each row refers to one of `table_size` rows of a table. `minimum` -1 allows rows that refer to none.
  Status CheckRows(const std::string& name, Span<const int32_t> rows, int64_t table_size, const char* table,
                   int32_t minimum = 0) const;
  // Checks that the values of each row ascend without repeats.
  Status CheckAscending(const std::string& name, const RaggedColumn& column) const;
  // Checks that each type is the code of an interaction type.
  Status CheckTypes(const std::string& name, Span<const uint8_t> types) const;
  // Reads features of a table of `rows` rows, named `table` ("item"). NotFound for a feature that it does not have.
  Status Features(const FeatureNames& names, int64_t rows, const char* table, FeatureColumns* columns) const;

 private:
  Status CheckLength(const std::string& name, size_t got, int64_t expected) const;
  Status Codes(const std::string& section, int64_t rows, CodeColumn* column) const;
  // Reads lists of numbers. The column holds their bits: the gathers copy values and look at none of them.
  Status Vectors(const std::string& section, int64_t rows, RaggedColumn* column) const;
  template <typename T>
  Status CheckCodes(const std::string& feature, const std::string& section, Span<const T> codes) const;

  const PackedFile& file_;
};

// Types of interactions: impression, skip, click, cart, order. A code is the index in dpsr_tf.data.schema.EVENT_TYPES.
constexpr uint8_t kNumEventTypes = 5;
constexpr uint8_t kClick = 2;

// The gathers. Row -1 stands for a row that the table does not have: its texts and lists are empty, its codes 0.

// Writes splits[0] = 0, splits[i + 1] = splits[i] + length of rows[i], and returns the last one. `splits` has
// rows.size() + 1 elements.
int64_t GatherSplits(const RaggedColumn& column, Span<const int32_t> rows, int64_t* splits);
// Writes the values of all rows, one row after the other: as many as GatherSplits returned.
void GatherValues(const RaggedColumn& column, Span<const int32_t> rows, int32_t* values);
// Writes codes [rows.size(), columns.size()], row by row.
void GatherCodes(const std::vector<CodeColumn>& columns, Span<const int32_t> rows, int32_t* codes);

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_COLUMNS_H_
