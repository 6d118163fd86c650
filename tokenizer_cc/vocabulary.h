// Tokens and their ids. A vocabulary is counted once over a corpus, and written as a packed file that also contains the
// tokenizer configuration. Every program that turns text into ids opens this file, which alone decides the ids of a
// text.
//
//   VocabularyBuilder builder{TokenizerConfig()};
//   for (const std::vector<std::string_view>& batch : corpus) {
//     DPSR_RETURN_IF_ERROR(builder.Add(Span<const std::string_view>(batch.data(), batch.size())));
//   }
//   DPSR_RETURN_IF_ERROR(builder.Write("vocabulary.dpsr", /*min_count=*/2, /*max_size=*/1000000,
//                                      /*num_oov_buckets=*/64));
//
//   std::unique_ptr<Vocabulary> vocabulary;
//   DPSR_RETURN_IF_ERROR(Vocabulary::Open("vocabulary.dpsr", /*verify=*/true, &vocabulary));
//   std::vector<int32_t> ids;
//   vocabulary->Encode("red running shoes", &ids);
//
// Ids: [0, size) are the tokens of the file, by descending count; equal counts are ordered by ascending bytes. [size,
// size + num_oov_buckets) are the hash buckets of all other tokens. Without buckets, unknown tokens have no id and are
// dropped.
//
// The file is a packed file of kind "vocabulary" with the sections
//
//   meta           int64 [2]          version of this layout (1), num_oov_buckets
//   config         uint8 [n]          TokenizerConfig::Serialize()
//   token_bytes    uint8 [n]          the tokens, one after another, in the order of their ids
//   token_offsets  uint64 [size + 1]  where each token begins in token_bytes, and where the last one ends
//   counts         int64 [size]       how often each token was counted
//   hash_table     uint64 [2^n]       open addressing, linear probing from slot xxh3(token) mod 2^n: 0 is an empty
//                                     slot, otherwise (high half of the hash) << 32 | id + 1
#ifndef DPSR_TOKENIZER_CC_VOCABULARY_H_
#define DPSR_TOKENIZER_CC_VOCABULARY_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"
#include "tokenizer_cc/tokenizer.h"

namespace dpsr {

class Vocabulary;

// Counts tokens with several threads in limited memory. The number of threads and the memory do not change the file
// that it writes. Not thread-safe: allows one caller at a time.
class VocabularyBuilder {
 public:
  struct Options {
    int num_threads = 0;  // 0: one for each core
    // Tables larger than this are written to temporary files as sorted runs, which Write merges. Some megabytes for
    // each thread and the tokens that Write keeps need additional memory.
    int64_t max_memory_bytes = int64_t{1} << 30;
    // The folder for temporary files; empty: the system's folder ($TMPDIR). The files have no name, so they vanish when
    // the process ends, even if it is killed.
    std::string temporary_directory;
  };

  explicit VocabularyBuilder(const TokenizerConfig& config);
  VocabularyBuilder(const TokenizerConfig& config, const Options& options);
  ~VocabularyBuilder();
  VocabularyBuilder(VocabularyBuilder&& other) noexcept;

  const TokenizerConfig& config() const;
  // The first error: InvalidArgument for invalid options, or the error of Add.
  const Status& status() const;
  // Counts every token of the texts. Threads share a batch of some hundred kilobytes or more.
  // Errors: NotFound, ResourceExhausted, Internal (a temporary file cannot be written; every later Add fails, too).
  Status Add(Span<const std::string_view> texts);
  Status Add(std::string_view text) { return Add(Span<const std::string_view>(&text, 1)); }
  // Adds the counts of a vocabulary that another builder has written, as if this one had counted its texts. Only tokens
  // that the vocabulary kept are added: write it with min_count 1 and without a limit. Errors: InvalidArgument (its
  // tokenizer has other switches), and the errors of Add.
  Status AddCounts(const Vocabulary& vocabulary);
  // Returns the number of distinct tokens so far. Takes about as long as Write.
  Status NumTokens(int64_t* count) const;

  // Writes the tokens that were counted at least `min_count` times, at most the `max_size` most frequent ones. May be
  // called several times, also after more texts were added. Errors: InvalidArgument (min_count < 1, max_size < 0,
  // num_oov_buckets < 0, more than 2^31 - 1 ids, or no id at all), and the errors of Add and of PackedFileWriter.
  Status Write(const std::string& path, int64_t min_count, int64_t max_size, int64_t num_oov_buckets) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// An open vocabulary file, memory-mapped. Immutable and thread-safe.
class Vocabulary {
 public:
  ~Vocabulary();
  static constexpr char kKind[] = "vocabulary";
  static constexpr int64_t kMaxIds = std::numeric_limits<int32_t>::max();

  // Opens `path`. Apart from the checksums (`verify`), the time does not depend on the size of the file. Errors: the
  // ones of PackedFile::Open; DataLoss (not a valid vocabulary); FailedPrecondition (a vocabulary of another version).
  static Status Open(const std::string& path, bool verify, std::unique_ptr<Vocabulary>* vocabulary);
  // Opens a vocabulary in a packed file of kind kKind that is open already.
  static Status Open(std::unique_ptr<PackedFile> file, std::unique_ptr<Vocabulary>* vocabulary);

  const std::string& path() const { return file_->path(); }
  const TokenizerConfig& config() const { return tokenizer_.config(); }
  // Identifies the content. A model that was trained with one vocabulary must not be served with another.
  uint64_t fingerprint() const { return file_->fingerprint(); }
  int32_t size() const { return size_; }
  int32_t num_oov_buckets() const { return num_oov_buckets_; }
  int32_t num_ids() const { return size_ + num_oov_buckets_; }

  // Returns the id of `token`, or -1 if it is unknown and there are no buckets.
  int32_t Lookup(std::string_view token) const;
  // Returns the token of an id in [0, size()), and an empty view for any other id. Valid as long as the vocabulary
  // lives.
  std::string_view Token(int32_t id) const;
  // Returns how often the token was counted; 0 for an id outside [0, size()).
  int64_t Count(int32_t id) const;
  // Appends the ids of the tokens of `text` to `ids`, in the order of the tokens.
  void Encode(std::string_view text, std::vector<int32_t>* ids) const;

 private:
  // Ids that Encode has looked up, so that it need not hash and compare the same tokens again.
  struct Cache;
  class IdEmitter;

  Vocabulary();

  std::unique_ptr<PackedFile> file_;
  Tokenizer tokenizer_;
  int32_t size_ = 0;
  int32_t num_oov_buckets_ = 0;
  Span<const uint8_t> token_bytes_;
  Span<const uint64_t> token_offsets_;
  Span<const int64_t> counts_;
  Span<const uint64_t> hash_table_;
  std::unique_ptr<Cache> cache_;
};

}  // namespace dpsr

#endif  // DPSR_TOKENIZER_CC_VOCABULARY_H_
