#include "export/rank_features/rank_table.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "export/request_tables/key_table.h"

namespace dpsr {
namespace {

constexpr float kMissing = std::numeric_limits<float>::quiet_NaN();
constexpr int kSpending = 4;
constexpr int kMeanPrice = 1;
// query_in_title, title_in_query, number_match, query_in_texts, missing_rarity, last_word_in_title, trigrams_in_title,
// trigram_overlap; and two of each text.
constexpr int kMatches = 8, kTextMatches = 2;
constexpr int kBrandMatches = 2;

float Share(int part, int whole) {
  return whole > 0 ? static_cast<float>(static_cast<double>(part) / whole) : kMissing;
}

// The inverse document frequency as BM25 has it, of a word that `frequency` of `texts` have.
double Rarity(int64_t frequency, int64_t texts) {
  const auto f = static_cast<double>(frequency);
  return std::log(1 + (static_cast<double>(texts) - f + 0.5) / (f + 0.5));
}

// Calls match(i, j) for each pair a[i] == b[j] of two ascending arrays, in ascending order. One of them is short as a
// rule: each of its elements is looked for in the other one.
template <typename Match>
void Intersect(Span<const int32_t> a, Span<const int32_t> b, const Match& match) {
  const bool a_short = a.size() <= b.size();
  const Span<const int32_t> few = a_short ? a : b, many = a_short ? b : a;
  const int32_t* at = many.begin();
  for (size_t i = 0; i < few.size(); ++i) {
    at = std::lower_bound(at, many.end(), few[i]);
    if (at == many.end()) return;
    if (*at != few[i]) continue;
    const size_t j = static_cast<size_t>(at - many.begin());
    match(a_short ? i : j, a_short ? j : i);
  }
}

template <typename T>
Span<const T> View(const std::vector<T>& values) {
  return {values.data(), values.size()};
}

Status ReadTokenizer(const SectionReader& reader, const std::string& name, Tokenizer* tokenizer) {
  Span<const uint8_t> text;
  DPSR_RETURN_IF_ERROR(reader.Array(name, SectionReader::kAnyLength, &text));
  TokenizerConfig config;
  DPSR_RETURN_IF_ERROR(
      TokenizerConfig::Parse({reinterpret_cast<const char*>(text.data()), text.size()}, &config));
  *tokenizer = Tokenizer(config);
  return Status();
}

Status BadLength(const SectionReader& reader, const std::string& name, size_t got, size_t expected) {
  return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section ", name, " has ", got,
                    " elements, expected ", expected, "; export the model again");
}

}  // namespace

Status TextIndex::Open(const SectionReader& reader, const std::string& name) {
  DPSR_RETURN_IF_ERROR(reader.Array(name + ".bytes", SectionReader::kAnyLength, &bytes_));
  DPSR_RETURN_IF_ERROR(reader.Splits(name + ".splits", SectionReader::kAnyLength,
                                     static_cast<int64_t>(bytes_.size()), &splits_));
  if (splits_.size() > size_t{1} << 30) return BadLength(reader, name + ".splits", splits_.size(), size_t{1} << 30);
  size_t slots = 2;
  while (slots < 2 * splits_.size()) slots *= 2;
  slots_.assign(slots, -1);
  for (int32_t row = 0; row < size(); ++row) {
    size_t slot = Checksum(text(row).data(), text(row).size());
    while (slots_[slot & (slots - 1)] >= 0) ++slot;
    slots_[slot & (slots - 1)] = row;
  }
  return Status();
}

std::string_view TextIndex::text(int32_t row) const {
  return {reinterpret_cast<const char*>(bytes_.data()) + splits_[row],
          static_cast<size_t>(splits_[row + 1] - splits_[row])};
}

int32_t TextIndex::Find(std::string_view wanted) const {
  const size_t mask = slots_.size() - 1;
  for (size_t slot = Checksum(wanted.data(), wanted.size());; ++slot) {
    const int32_t row = slots_[slot & mask];
    if (row < 0 || text(row) == wanted) return row;
  }
}

Status RankTable::Open(std::unique_ptr<PackedFile> file, std::unique_ptr<RankTable>* table) {
  std::unique_ptr<RankTable> t(new RankTable);
  t->file_ = std::move(file);
  const SectionReader reader(*t->file_);
  Span<const int64_t> ids;
  DPSR_RETURN_IF_ERROR(reader.Array("id", SectionReader::kAnyLength, &ids));
  const int64_t items = static_cast<int64_t>(ids.size());
  if (items > std::numeric_limits<int32_t>::max()) return BadLength(reader, "id", ids.size(), size_t{1} << 31);
  DPSR_RETURN_IF_ERROR(t->index_.Open(reader, items));
  DPSR_RETURN_IF_ERROR(ReadTokenizer(reader, "tokenizer", &t->tokenizer_));
  DPSR_RETURN_IF_ERROR(t->words_.Open(reader, "word"));
  DPSR_RETURN_IF_ERROR(reader.Array("digits", SectionReader::kAnyLength, &t->digits_));
  for (int i = 0; i == 0 || reader.Has(StrCat("text", i, ".splits")); ++i) {
    const std::string name = StrCat("text", i);
    TextColumn text;
    DPSR_RETURN_IF_ERROR(reader.Ragged(name + ".splits", name + ".values", items, &text.words));
    DPSR_RETURN_IF_ERROR(reader.CheckRows(name + ".values", text.words.values, t->words_.size(), "words"));
    DPSR_RETURN_IF_ERROR(reader.CheckAscending(name + ".values", text.words));
    DPSR_RETURN_IF_ERROR(
        reader.Array(name + ".weights", static_cast<int64_t>(text.words.values.size()), &text.weights));
    std::vector<int64_t> frequency(static_cast<size_t>(t->words_.size()));
    for (const int32_t word : text.words.values) ++frequency[static_cast<size_t>(word)];
    for (const int64_t f : frequency) text.rarities.push_back(static_cast<float>(Rarity(f, items)));
    t->texts_.push_back(std::move(text));
  }
  t->unknown_rarity_ = static_cast<float>(Rarity(0, items));
  DPSR_RETURN_IF_ERROR(t->OpenTrigrams(reader));
  if (reader.Has("brand")) DPSR_RETURN_IF_ERROR(t->OpenBrands(reader));
  DPSR_RETURN_IF_ERROR(t->queries_.Open(reader, "query"));
  DPSR_RETURN_IF_ERROR(
      reader.Ragged("query_item.splits", "query_item.values", t->queries_.size(), &t->query_items_));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("query_item.values", t->query_items_.values, items, "items"));
  DPSR_RETURN_IF_ERROR(reader.CheckAscending("query_item.values", t->query_items_));
  DPSR_RETURN_IF_ERROR(reader.Array("query_item.missing", SectionReader::kAnyLength, &t->no_pair_));
  DPSR_RETURN_IF_ERROR(reader.Array(
      "query_item.numbers", static_cast<int64_t>(t->query_items_.values.size() * t->no_pair_.size()),
      &t->pair_numbers_));
  if (reader.Has("price")) {
    DPSR_RETURN_IF_ERROR(reader.Array("price", items, &t->prices_));
    DPSR_RETURN_IF_ERROR(reader.Array("user.missing", kSpending, &t->no_spending_));
    DPSR_RETURN_IF_ERROR(reader.Array("user.id", SectionReader::kAnyLength, &t->users_));
    for (size_t i = 1; i < t->users_.size(); ++i) {
      if (t->users_[i] > t->users_[i - 1]) continue;
      return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section user.id row ", i, " is ", t->users_[i],
                        " after ", t->users_[i - 1], ", expected ascending ids; export the model again");
    }
    DPSR_RETURN_IF_ERROR(
        reader.Array("user.spending", static_cast<int64_t>(t->users_.size() * kSpending), &t->spending_));
  }
  for (int j = 0; reader.Has(StrCat("table", j)); ++j) {
    const std::string name = StrCat("table", j);
    Span<const int32_t> width;
    DPSR_RETURN_IF_ERROR(reader.Array(name + ".width", 1, &width));
    ItemNumbers numbers{{}, width[0]};
    if (width[0] < 0) {
      return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section ", name, ".width is ", width[0],
                        "; export the model again");
    }
    DPSR_RETURN_IF_ERROR(reader.Array(name, items * width[0], &numbers.values));
    t->tables_.push_back(numbers);
  }
  *table = std::move(t);
  return Status();
}

Status RankTable::OpenTrigrams(const SectionReader& reader) {
  DPSR_RETURN_IF_ERROR(ReadTokenizer(reader, "trigram_tokenizer", &trigram_tokenizer_));
  DPSR_RETURN_IF_ERROR(trigrams_.Open(reader, "trigram"));
  DPSR_RETURN_IF_ERROR(
      reader.Ragged("word_trigrams.splits", "word_trigrams.values", words_.size(), &word_trigrams_));
  DPSR_RETURN_IF_ERROR(
      reader.CheckRows("word_trigrams.values", word_trigrams_.values, trigrams_.size(), "trigrams"));
  return reader.Array("title_trigrams", items(), &title_trigrams_);
}

Status RankTable::OpenBrands(const SectionReader& reader) {
  has_brands_ = true;
  DPSR_RETURN_IF_ERROR(reader.Array("brand", items(), &brands_));
  DPSR_RETURN_IF_ERROR(
      reader.Ragged("brand_words.splits", "brand_words.values", SectionReader::kAnyLength, &brand_words_));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("brand_words.values", brand_words_.values, words_.size(), "words"));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("brand", brands_, brand_words_.rows() + 1, "brands"));
  // A brand is found by its rarest word, so that a query looks at few brands.
  std::unordered_map<int32_t, int> frequency;
  for (const int32_t word : brand_words_.values) ++frequency[word];
  for (int64_t row = 0; row < brand_words_.rows(); ++row) {
    const Span<const int32_t> words = brand_words_[row];
    if (words.empty()) continue;
    const int32_t rarest =
        *std::min_element(words.begin(), words.end(), [&](int32_t a, int32_t b) { return frequency[a] < frequency[b]; });
    brands_by_word_.emplace_back(rarest, static_cast<int32_t>(row) + 1);
  }
  std::sort(brands_by_word_.begin(), brands_by_word_.end());
  return Status();
}

int RankTable::pair_numbers() const {
  return static_cast<int>(texts_.size()) * kTextMatches + kMatches + (has_brands_ ? kBrandMatches : 0) +
         static_cast<int>(no_pair_.size()) + (no_spending_.empty() ? 0 : 1);
}

void RankTable::Spending(int64_t user_id, float* out) const {
  const int64_t* found = std::lower_bound(users_.begin(), users_.end(), user_id);
  const bool known = found != users_.end() && *found == user_id;
  const float* from = known ? spending_.data() + (found - users_.begin()) * kSpending : no_spending_.data();
  std::copy_n(from, no_spending_.size(), out);
}

bool RankTable::HasDigit(std::string_view word) const {
  for (size_t i = 0; i < word.size();) {
    const auto lead = static_cast<unsigned char>(word[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    int32_t point = length == 1 ? lead : lead & (0x7F >> length);
    for (size_t j = 1; j < length; ++j) point = point << 6 | (static_cast<unsigned char>(word[i + j]) & 0x3F);
    // The last range that begins at or before the code point.
    size_t low = 0, high = digits_.size() / 2;
    while (low < high) {
      const size_t middle = (low + high) / 2;
      (digits_[2 * middle] <= point ? low = middle + 1 : high = middle);
    }
    if (low > 0 && point <= digits_[2 * low - 1]) return true;
    i += length;
  }
  return false;
}

RankTable::Query RankTable::Read(std::string_view text) const {
  Query query;
  query.row = queries_.Find(Trimmed(text));
  std::vector<std::string> all;
  tokenizer_.Tokenize(text, [&](std::string_view word) { all.emplace_back(word); });
  if (!all.empty()) query.last = words_.Find(all.back());
  std::sort(all.begin(), all.end());
  std::vector<std::pair<int32_t, size_t>> known;  // id, and where in `all` it begins
  std::vector<size_t> begins;
  for (size_t i = 0; i < all.size(); ++i) {
    if (i > 0 && all[i] == all[i - 1]) continue;
    begins.push_back(i);
    const int32_t id = words_.Find(all[i]);
    query.has_unknown |= id < 0;
    if (id >= 0) known.emplace_back(id, begins.size() - 1);
  }
  begins.push_back(all.size());
  query.distinct = static_cast<int>(begins.size()) - 1;
  std::vector<bool> is_number(begins.size());
  for (size_t i = 0; i + 1 < begins.size(); ++i) {
    is_number[i] = HasDigit(all[begins[i]]);
    query.numbers += is_number[i] ? 1 : 0;
  }
  std::sort(known.begin(), known.end());
  size_t known_words = 0;
  for (const auto& [id, place] : known) known_words += begins[place + 1] - begins[place];
  query.rarities.assign(texts_.size(), static_cast<double>(all.size() - known_words) * unknown_rarity_);
  for (const auto& [id, place] : known) {
    query.ids.push_back(id);
    query.times.push_back(static_cast<float>(begins[place + 1] - begins[place]));
    query.is_number.push_back(is_number[place]);
    for (size_t i = 0; i < texts_.size(); ++i) {
      query.rarities[i] += double{texts_[i].rarities[static_cast<size_t>(id)]} * query.times.back();
    }
    // The brands that this word stands for, if the query has all of their words.
    auto brand = std::lower_bound(brands_by_word_.begin(), brands_by_word_.end(), std::make_pair(id, 0));
    for (; brand != brands_by_word_.end() && brand->first == id; ++brand) query.brands.push_back(brand->second);
  }
  const auto lacks_a_word = [&](int32_t code) {
    const Span<const int32_t> words = brand_words_[code - 1];
    return !std::all_of(words.begin(), words.end(), [&](int32_t word) {
      return std::binary_search(query.ids.begin(), query.ids.end(), word);
    });
  };
  query.brands.erase(std::remove_if(query.brands.begin(), query.brands.end(), lacks_a_word), query.brands.end());
  std::sort(query.brands.begin(), query.brands.end());
  ReadTrigrams(text, &query);
  return query;
}

void RankTable::ReadTrigrams(std::string_view text, Query* query) const {
  std::vector<std::string> all;
  trigram_tokenizer_.Tokenize(text, [&](std::string_view trigram) { all.emplace_back(trigram); });
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  query->trigrams = static_cast<int>(all.size());
  size_t slots = 4;
  while (slots < 4 * all.size()) slots *= 2;
  query->trigram_slots.assign(slots, -1);
  query->places.assign(slots, 0);
  for (const std::string& trigram : all) {
    const int32_t id = trigrams_.Find(trigram);
    if (id < 0) continue;
    size_t slot = static_cast<size_t>(id);
    while (query->trigram_slots[slot & (slots - 1)] >= 0) ++slot;
    query->trigram_slots[slot & (slots - 1)] = id;
    query->places[slot & (slots - 1)] = query->known_trigrams++;
  }
}

Status RankTable::Pairs(std::string_view text, const float* spending, Span<const int32_t> rows, float* out) const {
  if (text.size() > kMaxQueryBytes) {
    return MakeStatus(StatusCode::kInvalidArgument, "query has ", text.size(), " bytes, expected at most ",
                      kMaxQueryBytes, "; send the text that the user has typed");
  }
  const Query query = Read(text);
  const int width = pair_numbers();
  Scratch scratch;
  scratch.trigrams.assign(static_cast<size_t>(query.known_trigrams), 0);
  for (size_t i = 0; i < rows.size(); ++i, out += width) {
    if (rows[i] < 0) {
      std::fill_n(out, width, kMissing);
    } else {
      Pair(query, spending, rows[i], out, &scratch);
    }
  }
  return Status();
}

int RankTable::CommonTrigrams(const Query& query, int32_t item, Scratch* scratch) const {
  const size_t mask = query.trigram_slots.size() - 1;
  const int32_t pair = ++scratch->pair;
  int common = 0;
  // A title has the trigrams of its words.
  for (const int32_t word : texts_[0].words[item]) {
    for (const int32_t trigram : word_trigrams_[word]) {
      size_t slot = static_cast<size_t>(trigram) & mask;
      while (query.trigram_slots[slot] >= 0 && query.trigram_slots[slot] != trigram) slot = (slot + 1) & mask;
      if (query.trigram_slots[slot] < 0) continue;
      int32_t* last_pair = &scratch->trigrams[static_cast<size_t>(query.places[slot])];
      common += *last_pair != pair ? 1 : 0;
      *last_pair = pair;
    }
  }
  return common;
}

float* RankTable::Matches(const Query& query, int32_t item, float* out, Scratch* scratch) const {
  const Span<const int32_t> ids = View(query.ids);
  std::vector<bool>& found = scratch->found;
  found.assign(ids.size(), false);
  int in_title = 0, in_texts = 0, numbers_found = 0;
  bool last_in_title = false;
  float missing_rarity = query.has_unknown ? unknown_rarity_ : 0;
  float* share = out + texts_.size() + 3;
  for (size_t i = 0; i < texts_.size(); ++i) {
    const TextColumn& text = texts_[i];
    const float* weights = text.weights.data() + text.words.splits[item];
    double sum = 0;
    Intersect(ids, text.words[item], [&](size_t in_query, size_t in_text) {
      sum += double{weights[in_text]} * query.times[in_query];
      if (i == 0) {
        ++in_title;
        last_in_title |= ids[in_query] == query.last;
      }
      if (found[in_query]) return;
      found[in_query] = true;
      ++in_texts;
      numbers_found += query.is_number[in_query] ? 1 : 0;
    });
    if (i == 0) {
      for (size_t word = 0; word < ids.size(); ++word) {
        if (!found[word]) missing_rarity = std::max(missing_rarity, text.rarities[static_cast<size_t>(ids[word])]);
      }
    }
    *out++ = static_cast<float>(sum);
    *share++ = query.rarities[i] > 0 ? static_cast<float>(sum / query.rarities[i]) : kMissing;
  }
  *out++ = Share(in_title, query.distinct);
  *out++ = Share(in_title, static_cast<int>(texts_[0].words.length(item)));
  *out++ = Share(numbers_found, query.numbers);
  out = share;
  *out++ = Share(in_texts, query.distinct);
  *out++ = missing_rarity;
  *out++ = query.distinct == 0 ? kMissing : last_in_title ? 1.0f : 0.0f;
  const int common = CommonTrigrams(query, item, scratch);
  *out++ = Share(common, query.trigrams);
  *out++ = query.trigrams > 0 ? Share(common, query.trigrams + title_trigrams_[item] - common) : kMissing;
  return out;
}

void RankTable::Pair(const Query& query, const float* spending, int32_t item, float* out, Scratch* scratch) const {
  out = Matches(query, item, out, scratch);
  if (has_brands_) {
    const int32_t brand = brands_[item];
    const bool named = std::binary_search(query.brands.begin(), query.brands.end(), brand);
    *out++ = brand == 0 ? kMissing : named ? 1.0f : 0.0f;
    *out++ = brand == 0 ? kMissing : !named && !query.brands.empty() ? 1.0f : 0.0f;
  }
  const float* numbers = no_pair_.data();
  if (query.row >= 0) {
    const Span<const int32_t> items = query_items_[query.row];
    const int32_t* at = std::lower_bound(items.begin(), items.end(), item);
    if (at != items.end() && *at == item) {
      numbers = pair_numbers_.data() + (at - query_items_.values.begin()) * static_cast<int64_t>(no_pair_.size());
    }
  }
  out = std::copy_n(numbers, no_pair_.size(), out);
  if (!no_spending_.empty()) *out++ = prices_[item] / spending[kMeanPrice];
}

}  // namespace dpsr
