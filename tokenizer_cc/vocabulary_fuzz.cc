// A libFuzzer target: a vocabulary or packed file with any content is opened or refused, and all functions of an open
// one stay within its memory. The input is a byte, then the file. If the byte is odd, the checksums of header and table
// are corrected first, so that mutations reach the code behind these checks.
#define XXH_INLINE_ALL
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/packed_file.h"
#include "tokenizer_cc/vocabulary.h"
#include "tokenizer_cc/word_sequences.h"

namespace {

void Check(bool condition) {
  if (!condition) std::abort();
}

// packed_file.h has the offsets.
void MendChecksums(std::string* file) {
  constexpr size_t kHeader = 64, kEntry = 64, kSectionCount = 12, kTableOffset = 16, kTableChecksum = 48;
  constexpr size_t kHeaderChecksum = 56;
  if (file->size() < kHeader) return;
  uint32_t sections;
  uint64_t offset;
  std::memcpy(&sections, file->data() + kSectionCount, sizeof(sections));
  std::memcpy(&offset, file->data() + kTableOffset, sizeof(offset));
  const uint64_t bytes = uint64_t{sections} * kEntry;
  if (offset <= file->size() && bytes <= file->size() - offset) {
    const uint64_t checksum = XXH3_64bits(file->data() + offset, bytes);
    std::memcpy(file->data() + kTableChecksum, &checksum, sizeof(checksum));
  }
  const uint64_t checksum = XXH3_64bits(file->data(), kHeaderChecksum);
  std::memcpy(file->data() + kHeaderChecksum, &checksum, sizeof(checksum));
}

void UseVocabulary(const std::string& path, bool verify) {
  std::unique_ptr<dpsr::Vocabulary> vocabulary;
  if (!dpsr::Vocabulary::Open(path, verify, &vocabulary).ok()) return;
  std::vector<int32_t> ids;
  for (const char* text : {"red running shoes", "12mm 1,000w", "iPhone手机壳", "straße\xFF", ""}) {
    vocabulary->Encode(text, &ids);
  }
  for (int32_t id : ids) Check(id >= 0 && id < vocabulary->num_ids());
  for (int32_t id = -1; id <= vocabulary->size() && id < 1000; ++id) {
    const int32_t found = vocabulary->Lookup(vocabulary->Token(id));
    Check(found >= -1 && found < vocabulary->num_ids());
    (void)vocabulary->Count(id);
    std::string text = "a";
    dpsr::AppendWord(vocabulary->Token(id), &text);
    int32_t pieces[3];
    dpsr::PiecesOfWord(vocabulary->Token(id), 3, 10, pieces);
    for (int32_t piece : pieces) Check(piece >= 0 && piece < 10);
  }
  if (!dpsr::WordSequences::Check(*vocabulary).ok()) return;
  int32_t words[4];
  const dpsr::WordSequences sequences(*vocabulary);
  sequences.Encode("red 手机 shoes", 4, /*ends=*/true, words);
  for (int32_t word : words) Check(word >= 0 && word < sequences.num_ids());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  std::string file(reinterpret_cast<const char*>(data) + 1, size - 1);
  if ((data[0] & 1) != 0) MendChecksums(&file);
  // One file in memory for all runs.
  static const int fd = memfd_create("vocabulary", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  Check(fd >= 0 && ftruncate(fd, 0) == 0);
  Check(pwrite(fd, file.data(), file.size(), 0) == static_cast<ssize_t>(file.size()));
  std::unique_ptr<dpsr::PackedFile> packed;
  if (dpsr::PackedFile::Open(path, "", /*verify=*/true, &packed).ok()) {
    Check(packed->Find("no such section") == nullptr);
    for (const dpsr::PackedFile::Section& section : packed->sections()) Check(packed->Find(section.name) == &section);
  }
  for (bool verify : {true, false}) UseVocabulary(path, verify);
  return 0;
}
