#include "tokenizer_cc/vocabulary.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <system_error>
#include <thread>
#include <utility>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "tokenizer_cc/token_scanner.h"

namespace dpsr {
namespace {

constexpr int64_t kLayoutVersion = 1;

uint64_t Hash(std::string_view token) { return XXH3_64bits(token.data(), token.size()); }

// Returns whether `count` tokens fill more than 70 % of a table with this many slots.
bool IsTooFull(size_t count, size_t slots) { return count * 10 > slots * 7; }

uint64_t MakeSlot(uint64_t hash, uint32_t id) { return (hash >> 32 << 32) | (id + 1); }

template <typename T>
Status AddSection(std::string_view name, const std::vector<T>& values, PackedFileWriter* writer) {
  return writer->Add(name, DataTypeOf<T>::value, values.data(), values.size() * sizeof(T));
}

// Convert between ids and the numbers in the cache, where 0 is an empty entry.
constexpr uint32_t ToCached(int32_t id) { return static_cast<uint32_t>(id) + 2; }
constexpr int32_t FromCached(uint32_t cached) { return static_cast<int32_t>(cached - 2); }

}  // namespace

// Threads fill the cache without locks: each entry is one atomic number that also identifies its token, and the id of a
// token never changes.
struct Vocabulary::Cache {
  static constexpr size_t kCharacters = 0x10000;
  static constexpr int kPairBits = 17;

  std::array<std::atomic<uint32_t>, kAsciiTrigrams> trigrams;
  std::array<std::atomic<uint32_t>, kCharacters> characters;  // index: code point
  // Index: a hash of the pair. Entry: both code points (16 bits each) << 32 | id.
  std::array<std::atomic<uint64_t>, size_t{1} << kPairBits> pairs;
};

// Appends the id of each token.
class Vocabulary::IdEmitter {
 public:
  IdEmitter(const Vocabulary& vocabulary, std::vector<int32_t>* ids)
      : vocabulary_(vocabulary), cache_(*vocabulary.cache_), ids_(*ids) {}

  void Token(std::string_view token) { Append(vocabulary_.Lookup(token)); }

  void AsciiTrigram(const char* token, uint32_t index) {
    Append(Cached(&cache_.trigrams[index], [&] { return vocabulary_.Lookup(std::string_view(token, 4)); }));
  }

  void Character(uint32_t c) {
    const auto lookup = [&] {
      char token[4];
      return vocabulary_.Lookup(std::string_view(token, EncodeUtf8(c, token)));
    };
    Append(c < Cache::kCharacters ? Cached(&cache_.characters[c], lookup) : lookup());
  }

  void CharacterPair(uint32_t first, uint32_t second) {
    const auto lookup = [&] {
      char token[8];
      const size_t length = EncodeUtf8(first, token);
      return vocabulary_.Lookup(std::string_view(token, length + EncodeUtf8(second, token + length)));
    };
    if (first >= Cache::kCharacters || second >= Cache::kCharacters) return Append(lookup());
    const uint32_t key = first << 16 | second;
    std::atomic<uint64_t>& place = cache_.pairs[key * 0x9E3779B1u >> (32 - Cache::kPairBits)];
    const uint64_t held = place.load(std::memory_order_relaxed);
    if (held >> 32 == key && static_cast<uint32_t>(held) != 0) return Append(FromCached(static_cast<uint32_t>(held)));
    const int32_t id = lookup();
    place.store(uint64_t{key} << 32 | ToCached(id), std::memory_order_relaxed);
    Append(id);
  }

 private:
  template <typename Lookup>
  static int32_t Cached(std::atomic<uint32_t>* place, Lookup lookup) {
    const uint32_t held = place->load(std::memory_order_relaxed);
    if (held != 0) return FromCached(held);
    const int32_t id = lookup();
    place->store(ToCached(id), std::memory_order_relaxed);
    return id;
  }
  void Append(int32_t id) {
    if (id >= 0) ids_.push_back(id);
  }

  const Vocabulary& vocabulary_;
  Cache& cache_;
  std::vector<int32_t>& ids_;
};

Vocabulary::Vocabulary() : cache_(new Cache()) {}
Vocabulary::~Vocabulary() = default;

namespace {

// A token and how often it was counted. Another object owns the text.
struct Counted {
  std::string_view token;
  int64_t count;
};

// A hash table of token counts with open addressing. The text of the tokens is in one string.
class CountTable {
 public:
  void Add(std::string_view token, int64_t count) {
    if (IsTooFull(entries_.size() + 1, slots_.size())) Grow();
    const uint64_t hash = Hash(token);
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash & mask;; i = (i + 1) & mask) {
      if (slots_[i] == 0) {
        entries_.push_back({hash, bytes_.size(), token.size(), count});
        bytes_ += token;
        slots_[i] = entries_.size();
        return;
      }
      Entry& entry = entries_[slots_[i] - 1];
      if (entry.hash == hash && TokenOf(entry) == token) {
        entry.count += count;
        return;
      }
    }
  }

  bool empty() const { return entries_.empty(); }
  int64_t memory() const {
    return static_cast<int64_t>(bytes_.capacity() + entries_.capacity() * sizeof(Entry) +
                                slots_.capacity() * sizeof(uint64_t));
  }
  // Returns the counts by ascending bytes of the tokens, as views of the table.
  std::vector<Counted> Sorted() const {
    std::vector<Counted> sorted;
    sorted.reserve(entries_.size());
    for (const Entry& entry : entries_) sorted.push_back({TokenOf(entry), entry.count});
    std::sort(sorted.begin(), sorted.end(), [](const Counted& a, const Counted& b) { return a.token < b.token; });
    return sorted;
  }

 private:
  struct Entry {
    uint64_t hash;
    uint64_t offset;  // position in bytes_
    uint64_t size;
    int64_t count;
  };

  std::string_view TokenOf(const Entry& entry) const {
    return std::string_view(bytes_).substr(entry.offset, entry.size);
  }
  void Grow() {
    slots_.assign(std::max<size_t>(1024, slots_.size() * 2), 0);
    const size_t mask = slots_.size() - 1;
    for (size_t e = 0; e < entries_.size(); ++e) {
      size_t i = entries_[e].hash & mask;
      while (slots_[i] != 0) i = (i + 1) & mask;
      slots_[i] = e + 1;
    }
  }

  std::string bytes_;            // the distinct tokens, in the order of entries_
  std::vector<Entry> entries_;   // in the order of their first occurrence
  std::vector<uint64_t> slots_;  // index into entries_ + 1, or 0; the size is a power of two
};

// A file without a name for sorted runs of counted tokens. Each token is written as u64 size, i64 count, bytes.
class RunFile {
 public:
  struct Run {
    int64_t begin;
    int64_t end;
  };

  RunFile() = default;
  ~RunFile() {
    if (fd_ >= 0) close(fd_);
  }
  RunFile(const RunFile&) = delete;
  RunFile& operator=(const RunFile&) = delete;

  Status Append(const std::string& directory, const std::vector<Counted>& sorted) {
    if (fd_ < 0) DPSR_RETURN_IF_ERROR(Create(directory));
    const int64_t begin = size_;
    std::string buffer;
    for (const Counted& each : sorted) {
      const uint64_t size = each.token.size();
      buffer.append(reinterpret_cast<const char*>(&size), sizeof(size));
      buffer.append(reinterpret_cast<const char*>(&each.count), sizeof(each.count));
      buffer += each.token;
      if (buffer.size() >= kBuffer) DPSR_RETURN_IF_ERROR(Flush(&buffer));
    }
    DPSR_RETURN_IF_ERROR(Flush(&buffer));
    runs_.push_back({begin, size_});
    return Status();
  }

  const std::vector<Run>& runs() const { return runs_; }

  Status Read(int64_t offset, char* data, size_t size) const {
    while (size > 0) {
      const ssize_t got = pread(fd_, data, size, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return Error("read");
      if (got == 0) return MakeStatus(StatusCode::kDataLoss, path_, ": the temporary file is truncated");
      data += got;
      size -= static_cast<size_t>(got);
      offset += got;
    }
    return Status();
  }

  static constexpr size_t kBuffer = 1 << 16;

 private:
  Status Create(const std::string& directory) {
    path_ = directory + "/dpsr_vocabulary.XXXXXX";
    fd_ = mkostemp(path_.data(), O_CLOEXEC);
    if (fd_ < 0) return Error("create");
    unlink(path_.c_str());
    return Status();
  }

  Status Flush(std::string* buffer) {
    for (size_t done = 0; done < buffer->size();) {
      const ssize_t written = write(fd_, buffer->data() + done, buffer->size() - done);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return Error("write");
      done += static_cast<size_t>(written);
    }
    size_ += static_cast<int64_t>(buffer->size());
    buffer->clear();
    return Status();
  }

  Status Error(const char* what) const {
    const int error = errno;
    const StatusCode code = error == ENOENT || error == ENOTDIR    ? StatusCode::kNotFound
                            : error == ENOSPC || error == EDQUOT ? StatusCode::kResourceExhausted
                                                                 : StatusCode::kInternal;
    return MakeStatus(code, path_, ": cannot ", what, " a temporary file: ", std::strerror(error),
                      "; free space, give another temporary_directory, or raise max_memory_bytes");
  }

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  std::vector<Run> runs_;
};

// Reads sorted counts one after another, from memory or from a run.
class CountSource {
 public:
  explicit CountSource(std::vector<Counted> sorted) : sorted_(std::move(sorted)) {}
  CountSource(const RunFile* file, RunFile::Run run) : file_(file), position_(run.begin), end_(run.end) {}

  // Moves to the next count. Sets *more to false after the last one.
  Status Next(bool* more) {
    if (file_ == nullptr) {
      *more = next_ < sorted_.size();
      if (*more) current_ = sorted_[next_++];
      return Status();
    }
    *more = position_ < end_;
    if (!*more) return Status();
    uint64_t size = 0;
    DPSR_RETURN_IF_ERROR(Read(reinterpret_cast<char*>(&size), sizeof(size)));
    DPSR_RETURN_IF_ERROR(Read(reinterpret_cast<char*>(&current_.count), sizeof(current_.count)));
    token_.resize(size);
    DPSR_RETURN_IF_ERROR(Read(token_.data(), size));
    current_.token = token_;
    return Status();
  }
  const Counted& current() const { return current_; }

 private:
  Status Read(char* data, size_t size) {
    while (size > 0) {
      if (used_ == buffer_.size()) {
        buffer_.resize(std::min<size_t>(RunFile::kBuffer, static_cast<size_t>(end_ - position_)));
        if (buffer_.empty()) return MakeStatus(StatusCode::kInternal, "a run of counted tokens ends within a token");
        DPSR_RETURN_IF_ERROR(file_->Read(position_, buffer_.data(), buffer_.size()));
        used_ = 0;
      }
      const size_t part = std::min(size, buffer_.size() - used_);
      std::memcpy(data, buffer_.data() + used_, part);
      data += part;
      used_ += part;
      size -= part;
      position_ += static_cast<int64_t>(part);
    }
    return Status();
  }

  std::vector<Counted> sorted_;
  size_t next_ = 0;
  const RunFile* file_ = nullptr;
  int64_t position_ = 0;  // of the next byte to return
  int64_t end_ = 0;
  std::string buffer_;
  size_t used_ = 0;
  std::string token_;
  Counted current_ = {};
};

// Counts the tokens of one thread.
class Counter {
 public:
  Counter(const TokenizerConfig& config, int64_t max_memory_bytes, std::string directory)
      : config_(config),
        max_memory_bytes_(max_memory_bytes),
        directory_(std::move(directory)),
        trigrams_(kAsciiTrigrams, 0),
        characters_(kCharacters, 0) {}

  Status Add(std::string_view text) {
    TokenScanner<Counter>(config_, this).Scan(text);
    return table_.memory() > max_memory_bytes_ ? Spill() : Status();
  }

  Status AddCount(std::string_view token, int64_t count) {
    table_.Add(token, count);
    return table_.memory() > max_memory_bytes_ ? Spill() : Status();
  }

  // Appends sources with all counts so far. They refer to this object.
  void AppendSources(std::vector<std::unique_ptr<CountSource>>* sources) {
    Fold();
    for (RunFile::Run run : runs_.runs()) sources->push_back(std::make_unique<CountSource>(&runs_, run));
    if (!table_.empty()) sources->push_back(std::make_unique<CountSource>(table_.Sorted()));
  }

  void Token(std::string_view token) { table_.Add(token, 1); }
  void AsciiTrigram(const char*, uint32_t index) { ++trigrams_[index]; }
  void Character(uint32_t c) {
    if (c < kCharacters) {
      ++characters_[c];
    } else {
      AddCharacter(c, 1);
    }
  }
  void CharacterPair(uint32_t first, uint32_t second) {
    char token[8];
    const size_t length = EncodeUtf8(first, token);
    table_.Add(std::string_view(token, length + EncodeUtf8(second, token + length)), 1);
  }

 private:
  static constexpr uint32_t kCharacters = 0x10000;

  void AddCharacter(uint32_t c, int64_t count) {
    char token[4];
    table_.Add(std::string_view(token, EncodeUtf8(c, token)), count);
  }

  // Moves the counts of trigrams and characters into the table.
  void Fold() {
    char symbols[kAsciiSymbols] = {'#'};
    for (int c = 0; c < 128; ++c) {
      if (kAscii.symbol[c] != 0) symbols[kAscii.symbol[c]] = static_cast<char>(CodePointOf(kAscii.unit[c]));
    }
    for (uint32_t i = 0; i < kAsciiTrigrams; ++i) {
      if (trigrams_[i] == 0) continue;
      const char token[4] = {'#', symbols[i / (kAsciiSymbols * kAsciiSymbols)],
                             symbols[i / kAsciiSymbols % kAsciiSymbols], symbols[i % kAsciiSymbols]};
      table_.Add(std::string_view(token, sizeof(token)), trigrams_[i]);
      trigrams_[i] = 0;
    }
    for (uint32_t c = 0; c < kCharacters; ++c) {
      if (characters_[c] != 0) AddCharacter(c, characters_[c]);
      characters_[c] = 0;
    }
  }

  Status Spill() {
    Fold();
    DPSR_RETURN_IF_ERROR(runs_.Append(directory_, table_.Sorted()));
    table_ = CountTable();
    return Status();
  }

  const TokenizerConfig& config_;
  const int64_t max_memory_bytes_;
  const std::string directory_;
  CountTable table_;
  // Trigrams are most tokens of English text, and characters are half the tokens of Chinese text. Both are counted by
  // index.
  std::vector<int64_t> trigrams_;
  std::vector<int64_t> characters_;
  RunFile runs_;
};

// Calls function(index) for each index below `count`, each in a thread of its own as long as the system provides
// threads.
template <typename Function>
void RunInThreads(size_t count, const Function& function) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  size_t started = 1;
  try {
    for (; started < count; ++started) threads.emplace_back([&function, started] { function(started); });
  } catch (const std::system_error&) {
    // The system has no more threads, so this thread does the rest.
  }
  function(0);
  for (size_t i = started; i < count; ++i) function(i);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

struct VocabularyBuilder::Impl {
  TokenizerConfig config;
  Status error;
  std::vector<std::unique_ptr<Counter>> counters;

  // Calls use(token, count) for each distinct token in ascending order.
  template <typename Use>
  Status Merge(const Use& use) {
    std::vector<std::vector<std::unique_ptr<CountSource>>> parts(counters.size());
    RunInThreads(counters.size(), [&](size_t i) { counters[i]->AppendSources(&parts[i]); });
    std::vector<std::unique_ptr<CountSource>> sources;
    for (auto& part : parts) std::move(part.begin(), part.end(), std::back_inserter(sources));
    std::vector<CountSource*> heap;  // with the smallest token on top
    const auto is_after = [](const CountSource* a, const CountSource* b) {
      return a->current().token > b->current().token;
    };
    for (const auto& source : sources) {
      bool more = false;
      DPSR_RETURN_IF_ERROR(source->Next(&more));
      if (more) heap.push_back(source.get());
    }
    std::make_heap(heap.begin(), heap.end(), is_after);
    std::string token;
    while (!heap.empty()) {
      token = heap.front()->current().token;
      int64_t count = 0;
      while (!heap.empty() && heap.front()->current().token == token) {
        std::pop_heap(heap.begin(), heap.end(), is_after);
        CountSource* source = heap.back();
        count += source->current().count;
        bool more = false;
        DPSR_RETURN_IF_ERROR(source->Next(&more));
        if (more) {
          std::push_heap(heap.begin(), heap.end(), is_after);
        } else {
          heap.pop_back();
        }
      }
      use(std::string_view(token), count);
    }
    return Status();
  }
};

VocabularyBuilder::VocabularyBuilder(const TokenizerConfig& config) : VocabularyBuilder(config, Options()) {}

VocabularyBuilder::VocabularyBuilder(const TokenizerConfig& config, const Options& options) : impl_(new Impl) {
  constexpr int kMaxThreads = 1024;
  impl_->config = config;
  if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
    impl_->error = MakeStatus(StatusCode::kInvalidArgument, "num_threads is ", options.num_threads, ", expected 0 to ",
                              kMaxThreads, " (0: one for each core)");
    return;
  }
  if (options.max_memory_bytes < 1) {
    impl_->error = MakeStatus(StatusCode::kInvalidArgument, "max_memory_bytes is ", options.max_memory_bytes,
                              ", expected at least 1");
    return;
  }
  std::string directory = options.temporary_directory;
  if (directory.empty()) {
    const char* set = std::getenv("TMPDIR");
    directory = set != nullptr && *set != '\0' ? set : "/tmp";
  }
  const int cores = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, unsigned{kMaxThreads}));
  const int threads = options.num_threads > 0 ? options.num_threads : cores;
  for (int i = 0; i < threads; ++i) {
    impl_->counters.push_back(std::make_unique<Counter>(impl_->config, options.max_memory_bytes / threads, directory));
  }
}

VocabularyBuilder::~VocabularyBuilder() = default;
VocabularyBuilder::VocabularyBuilder(VocabularyBuilder&& other) noexcept = default;

const TokenizerConfig& VocabularyBuilder::config() const { return impl_->config; }
const Status& VocabularyBuilder::status() const { return impl_->error; }

Status VocabularyBuilder::Add(Span<const std::string_view> texts) {
  constexpr size_t kTextsAtATime = 64;
  // Fewer bytes are counted faster than a thread starts.
  constexpr size_t kBytesForAThread = 1 << 16;
  DPSR_RETURN_IF_ERROR(impl_->error);
  size_t bytes = 0;
  for (std::string_view text : texts) bytes += text.size();
  const size_t threads = std::min(impl_->counters.size(), 1 + bytes / kBytesForAThread);
  std::atomic<size_t> next{0};
  std::vector<Status> errors(threads);
  RunInThreads(threads, [&](size_t thread) {
    while (errors[thread].ok()) {
      const size_t begin = next.fetch_add(kTextsAtATime);
      if (begin >= texts.size()) return;
      const size_t end = std::min(begin + kTextsAtATime, texts.size());
      for (size_t i = begin; i < end && errors[thread].ok(); ++i) {
        errors[thread] = impl_->counters[thread]->Add(texts[i]);
      }
    }
  });
  for (const Status& error : errors) {
    if (!error.ok() && impl_->error.ok()) impl_->error = error;
  }
  return impl_->error;
}

Status VocabularyBuilder::AddCounts(const Vocabulary& vocabulary) {
  DPSR_RETURN_IF_ERROR(impl_->error);
  const std::string expected = config().Serialize(), got = vocabulary.config().Serialize();
  if (got != expected) {
    return MakeStatus(StatusCode::kInvalidArgument, vocabulary.path(), ": was counted with the tokenizer \"", got,
                      "\", expected \"", expected, "\"; count all texts with the same tokenizer");
  }
  for (int32_t id = 0; id < vocabulary.size() && impl_->error.ok(); ++id) {
    impl_->error = impl_->counters[0]->AddCount(vocabulary.Token(id), vocabulary.Count(id));
  }
  return impl_->error;
}

Status VocabularyBuilder::NumTokens(int64_t* count) const {
  DPSR_RETURN_IF_ERROR(impl_->error);
  *count = 0;
  return impl_->Merge([count](std::string_view, int64_t) { ++*count; });
}

Status VocabularyBuilder::Write(const std::string& path, int64_t min_count, int64_t max_size,
                                int64_t num_oov_buckets) const {
  DPSR_RETURN_IF_ERROR(impl_->error);
  const auto check = [&path](const char* name, int64_t value, int64_t least) {
    if (value >= least && value <= Vocabulary::kMaxIds) return Status();
    return MakeStatus(StatusCode::kInvalidArgument, path, ": ", name, " is ", value, ", expected ", least, " to ",
                      Vocabulary::kMaxIds);
  };
  DPSR_RETURN_IF_ERROR(check("min_count", min_count, 1));
  DPSR_RETURN_IF_ERROR(check("max_size", max_size, 0));
  DPSR_RETURN_IF_ERROR(check("num_oov_buckets", num_oov_buckets, 0));

  // The max_size most frequent tokens so far. When there are that many, this is a heap with the rarest token on top.
  struct Kept {
    int64_t count;
    std::string token;
  };
  std::vector<Kept> kept;
  const auto is_better = [](int64_t count, std::string_view token, const Kept& other) {
    return count != other.count ? count > other.count : token < other.token;
  };
  const auto by_id = [&](const Kept& a, const Kept& b) { return is_better(a.count, a.token, b); };
  const auto limit = static_cast<size_t>(max_size);
  int64_t num_tokens = 0;
  DPSR_RETURN_IF_ERROR(impl_->Merge([&](std::string_view token, int64_t count) {
    ++num_tokens;
    if (count < min_count || limit == 0) return;
    if (kept.size() < limit) {
      kept.push_back({count, std::string(token)});
      if (kept.size() == limit) std::make_heap(kept.begin(), kept.end(), by_id);
    } else if (is_better(count, token, kept.front())) {
      std::pop_heap(kept.begin(), kept.end(), by_id);
      kept.back().count = count;
      kept.back().token = token;
      std::push_heap(kept.begin(), kept.end(), by_id);
    }
  }));
  std::sort(kept.begin(), kept.end(), by_id);
  if (kept.size() > static_cast<size_t>(Vocabulary::kMaxIds - num_oov_buckets)) {
    return MakeStatus(StatusCode::kInvalidArgument, path, ": ", kept.size(), " tokens and ", num_oov_buckets,
                      " buckets are more than ", Vocabulary::kMaxIds, " ids; lower max_size");
  }
  if (kept.empty() && num_oov_buckets == 0) {
    return MakeStatus(StatusCode::kInvalidArgument, path, ": none of the ", num_tokens, " tokens is kept (min_count ",
                      min_count, ", max_size ", max_size,
                      ") and num_oov_buckets is 0, so the vocabulary would be empty");
  }

  std::vector<uint8_t> token_bytes;
  std::vector<uint64_t> token_offsets = {0};
  std::vector<int64_t> counts;
  size_t slots = 2;
  while (IsTooFull(kept.size(), slots)) slots *= 2;
  std::vector<uint64_t> table(slots, 0);
  const size_t mask = table.size() - 1;
  for (size_t id = 0; id < kept.size(); ++id) {
    const std::string_view token = kept[id].token;
    token_bytes.insert(token_bytes.end(), token.begin(), token.end());
    token_offsets.push_back(token_bytes.size());
    counts.push_back(kept[id].count);
    const uint64_t hash = Hash(token);
    size_t i = hash & mask;
    while (table[i] != 0) i = (i + 1) & mask;
    table[i] = MakeSlot(hash, static_cast<uint32_t>(id));
  }
  const std::vector<int64_t> meta = {kLayoutVersion, num_oov_buckets};
  const std::string config = impl_->config.Serialize();
  PackedFileWriter writer(path, Vocabulary::kKind);
  DPSR_RETURN_IF_ERROR(writer.Open());
  DPSR_RETURN_IF_ERROR(AddSection("meta", meta, &writer));
  DPSR_RETURN_IF_ERROR(writer.Add("config", DataType::kUint8, config.data(), config.size()));
  DPSR_RETURN_IF_ERROR(AddSection("token_bytes", token_bytes, &writer));
  DPSR_RETURN_IF_ERROR(AddSection("token_offsets", token_offsets, &writer));
  DPSR_RETURN_IF_ERROR(AddSection("counts", counts, &writer));
  DPSR_RETURN_IF_ERROR(AddSection("hash_table", table, &writer));
  return writer.Finish();
}

Status Vocabulary::Open(const std::string& path, bool verify, std::unique_ptr<Vocabulary>* vocabulary) {
  std::unique_ptr<PackedFile> file;
  DPSR_RETURN_IF_ERROR(PackedFile::Open(path, kKind, verify, &file));
  return Open(std::move(file), vocabulary);
}

Status Vocabulary::Open(std::unique_ptr<PackedFile> packed, std::unique_ptr<Vocabulary>* vocabulary) {
  std::unique_ptr<Vocabulary> opened(new Vocabulary);
  opened->file_ = std::move(packed);
  const PackedFile& file = *opened->file_;
  const std::string& path = file.path();
  const auto corrupt = [&path](const auto&... args) {
    return MakeStatus(StatusCode::kDataLoss, path, ": ", args..., "; the file is not a valid vocabulary");
  };

  Span<const int64_t> meta;
  DPSR_RETURN_IF_ERROR(file.Get("meta", &meta));
  if (meta.empty()) return corrupt("section \"meta\" is empty");
  if (meta[0] != kLayoutVersion) {
    return MakeStatus(StatusCode::kFailedPrecondition, path, ": vocabulary layout version ", meta[0],
                      ", this build reads version ", kLayoutVersion);
  }
  if (meta.size() != 2) return corrupt("section \"meta\" has ", meta.size(), " numbers, expected 2");
  Span<const uint8_t> config_text;
  DPSR_RETURN_IF_ERROR(file.Get("config", &config_text));
  TokenizerConfig config;
  const Status parsed = TokenizerConfig::Parse(
      std::string_view(reinterpret_cast<const char*>(config_text.data()), config_text.size()), &config);
  if (parsed.code() == StatusCode::kInvalidArgument) return corrupt(parsed.message());
  if (!parsed.ok()) return MakeStatus(parsed.code(), path, ": ", parsed.message());
  opened->tokenizer_ = Tokenizer(config);

  DPSR_RETURN_IF_ERROR(file.Get("token_bytes", &opened->token_bytes_));
  DPSR_RETURN_IF_ERROR(file.Get("token_offsets", &opened->token_offsets_));
  DPSR_RETURN_IF_ERROR(file.Get("counts", &opened->counts_));
  DPSR_RETURN_IF_ERROR(file.Get("hash_table", &opened->hash_table_));
  // The contents of the arrays are checked when they are used: offsets in Token(), slots in Lookup().
  const size_t size = opened->counts_.size();
  const size_t slots = opened->hash_table_.size();
  if (meta[1] < 0 || meta[1] > kMaxIds || size > static_cast<size_t>(kMaxIds - meta[1])) {
    return corrupt(size, " tokens and ", meta[1], " buckets, expected at most ", kMaxIds, " ids");
  }
  if (opened->token_offsets_.size() != size + 1) {
    return corrupt(opened->token_offsets_.size(), " token offsets for ", size, " counts, expected one more");
  }
  if (slots == 0 || (slots & (slots - 1)) != 0) {
    return corrupt("a hash table of ", slots, " slots, expected a power of two");
  }
  opened->size_ = static_cast<int32_t>(size);
  opened->num_oov_buckets_ = static_cast<int32_t>(meta[1]);
  *vocabulary = std::move(opened);
  return Status();
}

int32_t Vocabulary::Lookup(std::string_view token) const {
  const uint64_t hash = Hash(token);
  const size_t mask = hash_table_.size() - 1;
  // A table that the builder wrote has an empty slot. The limit is for other tables.
  for (size_t probes = 0, i = hash & mask; probes <= mask; ++probes, i = (i + 1) & mask) {
    const uint64_t slot = hash_table_[i];
    if (slot == 0) break;
    if (slot >> 32 != hash >> 32) continue;
    const uint32_t id = static_cast<uint32_t>(slot) - 1;
    if (id < static_cast<uint32_t>(size_) && Token(static_cast<int32_t>(id)) == token) return static_cast<int32_t>(id);
  }
  if (num_oov_buckets_ == 0) return -1;
  return size_ + static_cast<int32_t>(hash % static_cast<uint32_t>(num_oov_buckets_));
}

std::string_view Vocabulary::Token(int32_t id) const {
  if (id < 0 || id >= size_) return {};
  const uint64_t begin = token_offsets_[static_cast<size_t>(id)];
  const uint64_t end = token_offsets_[static_cast<size_t>(id) + 1];
  if (begin > end || end > token_bytes_.size()) return {};
  return std::string_view(reinterpret_cast<const char*>(token_bytes_.data()) + begin, end - begin);
}

int64_t Vocabulary::Count(int32_t id) const {
  return id < 0 || id >= size_ ? 0 : counts_[static_cast<size_t>(id)];
}

void Vocabulary::Encode(std::string_view text, std::vector<int32_t>* ids) const {
  IdEmitter emitter(*this, ids);
  TokenScanner<IdEmitter>(config(), &emitter).Scan(text);
}

}  // namespace dpsr
