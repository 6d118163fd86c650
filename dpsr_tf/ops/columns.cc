#include "dpsr_tf/ops/columns.h"

#include <cstring>

namespace dpsr {
namespace {

// Number of rows between a prefetch and its use. A cache miss takes as long as about ten rows.
constexpr size_t kAhead = 12;

template <typename T>
void GatherColumn(const T* column, Span<const int32_t> rows, size_t width, int32_t* out) {
  for (size_t i = 0; i < rows.size(); ++i, out += width) *out = rows[i] < 0 ? 0 : column[rows[i]];
}

}  // namespace

Status SectionReader::Numbers(const std::string& name, int64_t rows, NumberColumn* column) const {
  const std::string values = name + ".values";
  if (!Has(values)) return Array(name, rows, &column->values);
  DPSR_RETURN_IF_ERROR(Array(name, rows, &column->codes));
  DPSR_RETURN_IF_ERROR(Array(values, kAnyLength, &column->values));
  for (size_t i = 0; i < column->codes.size(); ++i) {
    if (column->codes[i] >= column->values.size()) {
      return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " row ", i, " is code ",
                        int{column->codes[i]}, " of ", column->values.size(), " values; ingest the log again");
    }
  }
  return Status();
}

Status SectionReader::Codes(const std::string& section, int64_t rows, CodeColumn* column) const {
  const PackedFile::Section* found = file_.Find(section);
  if (found != nullptr && found->dtype == DataType::kUint8) return Array(section, rows, &column->bytes);
  return Array(section, rows, &column->words);
}

Status SectionReader::Ragged(const std::string& splits, const std::string& values, int64_t rows,
                             RaggedColumn* column) const {
  DPSR_RETURN_IF_ERROR(Array(values, kAnyLength, &column->values));
  return Splits(splits, rows, static_cast<int64_t>(column->values.size()), &column->splits);
}

Status SectionReader::Splits(const std::string& name, int64_t rows, int64_t values, Span<const int64_t>* out) const {
  DPSR_RETURN_IF_ERROR(Array(name, rows == kAnyLength ? rows : rows + 1, out));
  const Span<const int64_t>& splits = *out;
  if (splits.empty() || splits[0] != 0 || splits[splits.size() - 1] != values) {
    return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " does not span its ", values,
                      " values; ingest the log again");
  }
  for (size_t i = 1; i < splits.size(); ++i) {
    if (splits[i] < splits[i - 1]) {
      return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " falls from ", splits[i - 1], " to ",
                        splits[i], " at row ", i, "; ingest the log again");
    }
  }
  return Status();
}

Status SectionReader::CheckRows(const std::string& name, Span<const int32_t> rows, int64_t table_size,
                                const char* table, int32_t minimum) const {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < minimum || rows[i] >= table_size) {
      return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " row ", i, " refers to row ", rows[i],
                        " of ", table_size, " ", table, "; the files of one store belong together, ingest the log again");
    }
  }
  return Status();
}

Status SectionReader::CheckAscending(const std::string& name, const RaggedColumn& column) const {
  for (int64_t row = 0; row < column.rows(); ++row) {
    for (int64_t i = column.splits[row] + 1; i < column.splits[row + 1]; ++i) {
      if (column.values[i] <= column.values[i - 1]) {
        return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " row ", i, " is ", column.values[i],
                          " after ", column.values[i - 1], ", expected ascending rows; ingest the log again");
      }
    }
  }
  return Status();
}

Status SectionReader::CheckTypes(const std::string& name, Span<const uint8_t> types) const {
  for (size_t i = 0; i < types.size(); ++i) {
    if (types[i] >= kNumEventTypes) {
      return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " row ", i, " is ", int{types[i]},
                        ", expected the code of an interaction type, 0 to ", kNumEventTypes - 1,
                        "; ingest the log again");
    }
  }
  return Status();
}

Status SectionReader::Features(const FeatureNames& names, int64_t rows, const char* table,
                               FeatureColumns* columns) const {
  for (const std::string& name : names.fixed) {
    const std::string section = "feature." + name;
    if (!Has(section)) {
      return MakeStatus(StatusCode::kNotFound, file_.path(), ": no ", table, " feature '", name, "' with one code a row",
                        "; name it in the schema's ", table, "s.features and ingest again, or drop it from the config");
    }
    CodeColumn& column = columns->fixed.emplace_back();
    DPSR_RETURN_IF_ERROR(Codes(section, rows, &column));
    DPSR_RETURN_IF_ERROR(CheckCodes(name, section, column.bytes));
    DPSR_RETURN_IF_ERROR(CheckCodes(name, section, column.words));
  }
  for (const std::string& name : names.lists) {
    const std::string section = "feature." + name;
    if (!Has(section + ".splits")) {
      return MakeStatus(StatusCode::kNotFound, file_.path(), ": no ", table, " feature '", name, "' with lists",
                        "; name it in the schema's ", table, "s.features and ingest again, or drop it from the config");
    }
    RaggedColumn& column = columns->lists.emplace_back();
    const PackedFile::Section* values = file_.Find(section + ".values");
    if (values != nullptr && values->dtype == DataType::kFloat32) {
      DPSR_RETURN_IF_ERROR(Vectors(section, rows, &column));
      continue;
    }
    DPSR_RETURN_IF_ERROR(Ragged(section + ".splits", section + ".values", rows, &column));
    DPSR_RETURN_IF_ERROR(CheckCodes(name, section + ".values", column.values));
  }
  return Status();
}

Status SectionReader::Vectors(const std::string& section, int64_t rows, RaggedColumn* column) const {
  Span<const float> numbers;
  DPSR_RETURN_IF_ERROR(Array(section + ".values", kAnyLength, &numbers));
  column->values = {reinterpret_cast<const int32_t*>(numbers.data()), numbers.size()};
  return Splits(section + ".splits", rows, static_cast<int64_t>(numbers.size()), &column->splits);
}

// Codes are rows of an embedding table: 0, and one for each value of the feature if the store lists its values.
template <typename T>
Status SectionReader::CheckCodes(const std::string& feature, const std::string& section, Span<const T> codes) const {
  int64_t limit = int64_t{1} << 31;
  const PackedFile::Section* values = file_.Find("values." + feature + ".splits");
  if (values != nullptr) limit = static_cast<int64_t>(values->count);  // values + 1, and codes from 0 to values
  for (size_t i = 0; i < codes.size(); ++i) {
    if (codes[i] < 0 || codes[i] >= limit) {
      return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", section, " row ", i, " is code ",
                        int64_t{codes[i]}, ", expected 0 to ", limit - 1, "; ingest the log again");
    }
  }
  return Status();
}

Status SectionReader::CheckLength(const std::string& name, size_t got, int64_t expected) const {
  if (expected == kAnyLength || static_cast<int64_t>(got) == expected) return Status();
  return MakeStatus(StatusCode::kDataLoss, file_.path(), ": section ", name, " has ", got, " rows, expected ", expected,
                    "; ingest the log again");
}

int64_t GatherSplits(const RaggedColumn& column, Span<const int32_t> rows, int64_t* splits) {
  const int64_t* from = column.splits.data();
  int64_t end = splits[0] = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i + kAhead < rows.size() && rows[i + kAhead] >= 0) __builtin_prefetch(from + rows[i + kAhead]);
    if (rows[i] >= 0) end += from[rows[i] + 1] - from[rows[i]];
    splits[i + 1] = end;
  }
  return end;
}

void GatherValues(const RaggedColumn& column, Span<const int32_t> rows, int32_t* values) {
  const int64_t* from = column.splits.data();
  const int32_t* data = column.values.data();
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i + kAhead < rows.size() && rows[i + kAhead] >= 0) {
      const char* begin = reinterpret_cast<const char*>(data + from[rows[i + kAhead]]);
      __builtin_prefetch(begin);
      __builtin_prefetch(begin + 64);
    }
    if (rows[i] < 0) continue;
    const int64_t begin = from[rows[i]], size = from[rows[i] + 1] - begin;
    if (size > 0) std::memcpy(values, data + begin, static_cast<size_t>(size) * sizeof(int32_t));
    values += size;
  }
}

void GatherCodes(const std::vector<CodeColumn>& columns, Span<const int32_t> rows, int32_t* codes) {
  const size_t width = columns.size();
  // One column at a time, so that loads do not wait for each other and few columns are in use at once.
  for (size_t c = 0; c < width; ++c) {
    if (columns[c].words.empty()) {
      GatherColumn(columns[c].bytes.data(), rows, width, codes + c);
    } else {
      GatherColumn(columns[c].words.data(), rows, width, codes + c);
    }
  }
}

}  // namespace dpsr
