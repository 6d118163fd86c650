// libFuzzer: an attribute file of any content is opened or refused, and any filter on an open one is answered or
// refused without leaving its memory. Input: a filter expression, a zero byte, then the file; checksums are mended
// first, so that mutations reach what lies behind them.
#define XXH_INLINE_ALL
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "export/faiss_search/item_filter.h"

namespace {

constexpr int64_t kItems = 70;
constexpr uint64_t kFingerprint = 1;

void Check(bool condition) {
  if (!condition) std::abort();
}

// The attributes that are there where the input holds no file: a category, a number, several values.
std::string WholeFile() {
  std::string folder = std::filesystem::temp_directory_path() / "item_filter_fuzz_XXXXXX";
  Check(mkdtemp(folder.data()) != nullptr);  // puts a name of its own in the place of the X
  const std::string name = folder + "/file";
  dpsr::PackedFileWriter writer(name, "item_attributes");
  Check(writer.Open().ok());
  const int64_t splits[] = {0, 1, 3};
  const uint64_t fingerprint = kFingerprint;
  uint8_t codes[kItems];
  float numbers[kItems];
  int64_t tag_splits[kItems + 1] = {0};
  for (int64_t i = 0; i < kItems; ++i) {
    codes[i] = static_cast<uint8_t>(i % 3);
    numbers[i] = static_cast<float>(i);
    tag_splits[i + 1] = i + 1;
  }
  using dpsr::DataType;
  Check(writer.Add("item_ids.fingerprint", DataType::kUint64, &fingerprint, 8).ok());
  for (const std::string attribute : {"a", "t"}) {
    Check(writer.Add("value." + attribute, DataType::kUint8, codes, sizeof(codes)).ok());
    Check(writer.Add("text." + attribute + ".splits", DataType::kInt64, splits, sizeof(splits)).ok());
    Check(writer.Add("text." + attribute + ".bytes", DataType::kUint8, "xyz", 3).ok());
  }
  Check(writer.Add("splits.t", DataType::kInt64, tag_splits, sizeof(tag_splits)).ok());
  Check(writer.Add("value.n", DataType::kFloat32, numbers, sizeof(numbers)).ok());
  Check(writer.Finish().ok());
  std::string bytes;
  std::FILE* file = std::fopen(name.c_str(), "rb");
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) bytes.push_back(static_cast<char>(c));
  std::fclose(file);
  std::filesystem::remove_all(folder);
  return bytes;
}

// See packed_file.h for the places.
void MendChecksums(std::string* file) {
  constexpr size_t kHeader = 64, kEntry = 64;
  if (file->size() < kHeader) return;
  uint32_t sections;
  uint64_t table;
  std::memcpy(&sections, file->data() + 12, sizeof(sections));
  std::memcpy(&table, file->data() + 16, sizeof(table));
  const uint64_t bytes = uint64_t{sections} * kEntry;
  if (table <= file->size() && bytes <= file->size() - table) {
    for (uint64_t entry = table; entry < table + bytes; entry += kEntry) {
      uint64_t place[2];
      std::memcpy(place, file->data() + entry + 40, sizeof(place));
      if (place[0] > file->size() || place[1] > file->size() - place[0]) continue;
      const uint64_t checksum = XXH3_64bits(file->data() + place[0], place[1]);
      std::memcpy(file->data() + entry + 56, &checksum, sizeof(checksum));
    }
    const uint64_t checksum = XXH3_64bits(file->data() + table, bytes);
    std::memcpy(file->data() + 48, &checksum, sizeof(checksum));
  }
  const uint64_t checksum = XXH3_64bits(file->data(), 56);
  std::memcpy(file->data() + 56, &checksum, sizeof(checksum));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string* whole = new std::string(WholeFile());
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = std::min(input.find('\0'), size);
  const std::string_view text = input.substr(0, zero);
  // Where there is no file behind the filter, bytes of the whole one are replaced: place (two bytes) and value.
  std::string file(input.substr(std::min(zero + 1, size)));
  if (file.size() < 64) {
    const std::string changes = file;
    file = *whole;
    for (size_t i = 0; i + 3 <= changes.size(); i += 3) {
      const size_t place = static_cast<uint8_t>(changes[i]) + 256 * static_cast<uint8_t>(changes[i + 1]);
      file[place % file.size()] = changes[i + 2];
    }
  }
  MendChecksums(&file);
  static const int fd = memfd_create("attributes", 0);
  Check(fd >= 0 && ftruncate(fd, 0) == 0);
  Check(pwrite(fd, file.data(), file.size(), 0) == static_cast<ssize_t>(file.size()));
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  dpsr::ItemOrder reversed;
  for (int32_t i = kItems; i > 0; --i) reversed.positions.push_back(i - 1);
  reversed.group_begins = {0, 13, kItems};
  for (const dpsr::ItemOrder& order : {dpsr::ItemOrder(), reversed}) {
    std::unique_ptr<dpsr::ItemFilters> filters;
    if (!dpsr::ItemFilters::Open(path, kItems, kFingerprint, order, &filters).ok()) continue;
    std::shared_ptr<const dpsr::ItemMask> included, excluded;
    const bool ok = filters->Apply({text}, {}, &included).ok();
    Check(filters->Apply({}, {text}, &excluded).ok() == ok);
    if (ok && !text.empty()) Check(included->count + excluded->count == kItems);
    for (const char* other : {"a=x", "t=yz|x", "n=..3|60..", "n=5"}) (void)filters->Apply({other}, {text}, &included);
  }
  return 0;
}
