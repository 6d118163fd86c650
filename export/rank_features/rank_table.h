// What a server knows of items, users and queries when it ranks: it turns a request of ids and texts into the numbers
// that a ranker reads. They equal RankingFeatures.at_end (dpsr_tf/data/ranking_features.py).
//
// A rank table is a packed file of kind "rank_table" (dpsr_export/rank_table.py writes it). Rows of items are those of
// the store. Sections in brackets may be missing; then the numbers that they give do not exist.
//
//   id, id_index.splits, id_index.rows     ids of the items, see dpsr_tf/ops/item_table.h
//   [key.splits, key.bytes]                the shop's own text ids, see export/request_tables/key_table.h
//   tokenizer            uint8             TokenizerConfig::Serialize() of the words below
//   trigram_tokenizer    uint8             the same of the letter trigrams below
//   word.splits, .bytes  int64, uint8      the distinct words of texts and brands; a word's id is its row
//   digits               int32 [2 d]       ranges of code points, first and last, of which one makes a word a number
//   text<i>.splits, .values                int64 [items + 1], int32: the distinct words of text i, ascending; 0 is the
//                                          title
//   text<i>.weights      float32           what each of them adds to BM25 if the query has it once
//   trigram.splits, .bytes                 the distinct letter trigrams of words; a trigram's id is its row
//   word_trigrams.splits, .values          int64 [words + 1], int32: the distinct trigrams of each word, ascending. Words
//                                          that are in no text have none
//   title_trigrams       int32 [items]     number of distinct trigrams of each title
//   [brand               int32 [items]     code of the brand, 0 is unknown
//    brand_words.splits, .values]          int64 [codes + 1], int32: the distinct words of brand code 1, 2, ...
//   query.splits, .bytes int64, uint8      the distinct queries of the log
//   query_item.splits, .values             int64 [queries + 1], int32: rows of items with counts, ascending
//   query_item.numbers   float32 [pairs * w]   their numbers
//   query_item.missing   float32 [w]       the numbers of all other pairs
//   [price               float32 [items]   NaN is missing
//    user.id             int64 [users]     users who spent anything, ascending
//    user.spending       float32 [users * 4]   SPENDING of dpsr_tf/data/event_counts.py; the second is the mean price
//    user.missing        float32 [4]]      that of all other users
//   [table<j>            float32 [items * width]   numbers that a model has computed for each item
//    table<j>.width      int32 [1]]
#ifndef DPSR_EXPORT_RANK_FEATURES_RANK_TABLE_H_
#define DPSR_EXPORT_RANK_FEATURES_RANK_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/columns.h"
#include "dpsr_tf/ops/id_index.h"
#include "common/packed_file.h"
#include "common/span.h"
#include "common/status.h"
#include "tokenizer_cc/tokenizer.h"

namespace dpsr {

// Finds the row of a text among distinct texts. Immutable after Open, so thread-safe.
class TextIndex {
 public:
  // Reads the sections `name`.splits and `name`.bytes. Needs 8 to 16 bytes of memory for each text.
  Status Open(const SectionReader& reader, const std::string& name);
  int32_t size() const { return static_cast<int32_t>(splits_.size()) - 1; }
  // Returns -1 for a text that is not there.
  int32_t Find(std::string_view text) const;

 private:
  std::string_view text(int32_t row) const;

  Span<const int64_t> splits_;
  Span<const uint8_t> bytes_;
  std::vector<int32_t> slots_;  // a power of two; -1 is empty
};

// Immutable after Open, and thread-safe.
class RankTable {
 public:
  // The longest query, in bytes. A longer one is no search, and would take too much time.
  static constexpr size_t kMaxQueryBytes = 1 << 16;

  // Checks all sections. Errors: DataLoss for sections that are missing, damaged, or do not fit together.
  static Status Open(std::unique_ptr<PackedFile> file, std::unique_ptr<RankTable>* table);

  int64_t items() const { return static_cast<int64_t>(index_.ids().size()); }
  // Returns the row of an id, -1 if there is none.
  int32_t FindItem(int64_t id) const { return id < 0 ? -1 : index_.Find(id); }

  // The number of numbers of a pair of query and item. They are, in this order: BM25 of each text, query_in_title,
  // title_in_query, number_match, bm25_share of each text, query_in_texts, missing_rarity, last_word_in_title,
  // trigrams_in_title, trigram_overlap, [brand_match, brand_other], those of query_item, [spend.price_ratio].
  int pair_numbers() const;
  // The number of numbers of a user: 4, or 0 without prices.
  int spending() const { return static_cast<int>(no_spending_.size()); }

  // Computes what a user has spent, [spending()]. A user who is not known is one without an order.
  void Spending(int64_t user_id, float* out) const;
  // Computes the numbers of a query with n items, [n, pair_numbers()]. Those of row -1 are NaN. `spending` is what
  // Spending returned. Error: InvalidArgument for a query that is too long.
  Status Pairs(std::string_view query, const float* spending, Span<const int32_t> rows, float* out) const;

  int tables() const { return static_cast<int>(tables_.size()); }
  int width(int table) const { return tables_[static_cast<size_t>(table)].width; }
  // Returns a row of a table, [width]. `row` is not -1.
  const float* Row(int table, int32_t row) const {
    const ItemNumbers& found = tables_[static_cast<size_t>(table)];
    return found.values.data() + int64_t{row} * found.width;
  }

 private:
  struct TextColumn {
    RaggedColumn words;
    Span<const float> weights;
    std::vector<float> rarities;  // of each word, as BM25 has it
  };
  struct ItemNumbers {
    Span<const float> values;
    int width;
  };
  // The words of a query.
  struct Query {
    std::vector<int32_t> ids;    // distinct words that items have, ascending
    std::vector<float> times;    // how often the query has each of them
    std::vector<bool> is_number;  // whether each of them has a digit
    int distinct = 0, numbers = 0;  // of all words
    bool has_unknown = false;       // whether items lack one of its words
    int32_t last = -1;              // id of the last word; -1 if items lack it
    std::vector<double> rarities;   // for each text, the sum of the rarities of all words: no BM25 is larger
    int trigrams = 0;               // distinct ones
    // Those that items have, as a hash table of a power of two: id or -1. `places` numbers them.
    std::vector<int32_t> trigram_slots, places;
    int known_trigrams = 0;
    std::vector<int32_t> brands;  // codes of the brands that the query names, ascending
    int32_t row = -1;             // of the log's queries
  };

  RankTable() = default;
  Status OpenBrands(const SectionReader& reader);
  Status OpenTrigrams(const SectionReader& reader);
  Query Read(std::string_view text) const;
  void ReadTrigrams(std::string_view text, Query* query) const;
  bool HasDigit(std::string_view word) const;
  // What the pairs of a query need while they are computed.
  struct Scratch {
    std::vector<bool> found;        // whether the item has each word of the query
    std::vector<int32_t> trigrams;  // the last pair that had each trigram of the query
    int32_t pair = 0;
  };
  float* Matches(const Query& query, int32_t item, float* out, Scratch* scratch) const;
  int CommonTrigrams(const Query& query, int32_t item, Scratch* scratch) const;
  void Pair(const Query& query, const float* spending, int32_t item, float* out, Scratch* scratch) const;

  std::unique_ptr<PackedFile> file_;
  Tokenizer tokenizer_, trigram_tokenizer_;
  IdIndex index_;
  TextIndex words_, queries_, trigrams_;
  Span<const int32_t> digits_;
  std::vector<TextColumn> texts_;
  float unknown_rarity_ = 0;  // of a word that no item has
  RaggedColumn word_trigrams_;
  Span<const int32_t> title_trigrams_;
  bool has_brands_ = false;
  Span<const int32_t> brands_;
  RaggedColumn brand_words_;
  std::vector<std::pair<int32_t, int32_t>> brands_by_word_;  // each brand's rarest word and code, sorted
  RaggedColumn query_items_;
  Span<const float> pair_numbers_, no_pair_;
  Span<const float> prices_;
  Span<const int64_t> users_;
  Span<const float> spending_, no_spending_;
  std::vector<ItemNumbers> tables_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_RANK_FEATURES_RANK_TABLE_H_
