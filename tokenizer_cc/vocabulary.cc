#include "tokenizer_cc/vocabulary.h"

#include <algorithm>
#include <utility>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace dpsr {
namespace {

constexpr int64_t kLayoutVersion = 1;

uint64_t Hash(std::string_view token) { return XXH3_64bits(token.data(), token.size()); }

// Whether `count` tokens are too many for a table of `slots`: more than 70 % full.
bool IsTooFull(size_t count, size_t slots) { return count * 10 > slots * 7; }

uint64_t MakeSlot(uint64_t hash, uint32_t id) { return (hash >> 32 << 32) | (id + 1); }

template <typename T>
Status AddSection(std::string_view name, const std::vector<T>& values, PackedFileWriter* writer) {
  return writer->Add(name, DataTypeOf<T>::value, values.data(), values.size() * sizeof(T));
}

}  // namespace

void VocabularyBuilder::Add(std::string_view text) {
  tokenizer_.Tokenize(text, [this](std::string_view token) { Count(token); });
}

void VocabularyBuilder::Count(std::string_view token) {
  if (IsTooFull(entries_.size() + 1, slots_.size())) Grow();
  const uint64_t hash = Hash(token);
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash & mask;; i = (i + 1) & mask) {
    if (slots_[i] == 0) {
      entries_.push_back({hash, bytes_.size(), token.size(), 1});
      bytes_ += token;
      slots_[i] = entries_.size();
      return;
    }
    Entry& entry = entries_[slots_[i] - 1];
    if (entry.hash == hash && TokenOf(entry) == token) {
      ++entry.count;
      return;
    }
  }
}

void VocabularyBuilder::Grow() {
  slots_.assign(std::max<size_t>(1024, slots_.size() * 2), 0);
  const size_t mask = slots_.size() - 1;
  for (size_t e = 0; e < entries_.size(); ++e) {
    size_t i = entries_[e].hash & mask;
    while (slots_[i] != 0) i = (i + 1) & mask;
    slots_[i] = e + 1;
  }
}

Status VocabularyBuilder::Write(const std::string& path, int64_t min_count, int64_t max_size,
                                int64_t num_oov_buckets) const {
  const auto check = [&path](const char* name, int64_t value, int64_t least) {
    if (value >= least && value <= Vocabulary::kMaxIds) return Status();
    return MakeStatus(StatusCode::kInvalidArgument, path, ": ", name, " is ", value, ", expected ", least, " to ",
                      Vocabulary::kMaxIds);
  };
  DPSR_RETURN_IF_ERROR(check("min_count", min_count, 1));
  DPSR_RETURN_IF_ERROR(check("max_size", max_size, 0));
  DPSR_RETURN_IF_ERROR(check("num_oov_buckets", num_oov_buckets, 0));

  std::vector<const Entry*> kept;
  for (const Entry& entry : entries_) {
    if (entry.count >= min_count) kept.push_back(&entry);
  }
  std::sort(kept.begin(), kept.end(), [this](const Entry* a, const Entry* b) {
    return a->count != b->count ? a->count > b->count : TokenOf(*a) < TokenOf(*b);
  });
  if (kept.size() > static_cast<size_t>(max_size)) kept.resize(static_cast<size_t>(max_size));
  if (kept.size() > static_cast<size_t>(Vocabulary::kMaxIds - num_oov_buckets)) {
    return MakeStatus(StatusCode::kInvalidArgument, path, ": ", kept.size(), " tokens and ", num_oov_buckets,
                      " buckets are more than ", Vocabulary::kMaxIds, " ids; lower max_size");
  }
  if (kept.empty() && num_oov_buckets == 0) {
    return MakeStatus(StatusCode::kInvalidArgument, path, ": none of the ", entries_.size(),
                      " tokens is kept (min_count ", min_count, ", max_size ", max_size,
                      ") and num_oov_buckets is 0: the vocabulary would be empty");
  }

  std::vector<uint8_t> token_bytes;
  std::vector<uint64_t> token_offsets = {0};
  std::vector<int64_t> counts;
  size_t slots = 2;
  while (IsTooFull(kept.size(), slots)) slots *= 2;
  std::vector<uint64_t> table(slots, 0);
  const size_t mask = table.size() - 1;
  for (size_t id = 0; id < kept.size(); ++id) {
    const std::string_view token = TokenOf(*kept[id]);
    token_bytes.insert(token_bytes.end(), token.begin(), token.end());
    token_offsets.push_back(token_bytes.size());
    counts.push_back(kept[id]->count);
    size_t i = kept[id]->hash & mask;
    while (table[i] != 0) i = (i + 1) & mask;
    table[i] = MakeSlot(kept[id]->hash, static_cast<uint32_t>(id));
  }
  const std::vector<int64_t> meta = {kLayoutVersion, num_oov_buckets};
  const std::string config = tokenizer_.config().Serialize();
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
  std::unique_ptr<Vocabulary> opened(new Vocabulary);
  DPSR_RETURN_IF_ERROR(PackedFile::Open(path, kKind, verify, &opened->file_));
  const PackedFile& file = *opened->file_;
  const auto corrupt = [&path](const auto&... args) {
    return MakeStatus(StatusCode::kDataLoss, path, ": ", args..., "; the file is no valid vocabulary");
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
  // What lies in the arrays is checked where it is used: offsets in Token(), slots in Lookup().
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
  // A table written by the builder has an empty slot; the bound is for one that was not.
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
  tokenizer_.Tokenize(text, [this, ids](std::string_view token) {
    const int32_t id = Lookup(token);
    if (id >= 0) ids->push_back(id);
  });
}

}  // namespace dpsr
