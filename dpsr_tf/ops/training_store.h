// The files of a store (DPSR section 5.1.2) as training reads them: user features and events, item features, and the
// interactions that refer to both by row. Nothing is copied: the files stay memory-mapped. Sections in [brackets] exist
// only if the store's schema declares their content. docs/data_format.md lists all sections, item_table.h the sections
// of items.dpsr.
//
// users.dpsr (kind "users"); row 0 is the anonymous user
//   id               int64 [users]
//   feature.<name>   uint8 or int32 [users], or feature.<name>.splits int64 [users + 1], feature.<name>.values int32,
//     or float for vectors
//   event.splits     int64 [users + 1]        rows of each user's events, ascending by (time, query, item, type)
//   event.time       uint32 [events]          seconds
//   event.item       int32 [events]
//   event.query      int32 [events]           global row: over the queries of all interactions files
//   event.type       uint8 [events]
// interactions*.dpsr (kind "interactions"), each with everything that belongs to its queries
//   query.splits     int64 [queries + 1]      row splits of
//   query.tokens     int32 [tokens]           token ids of each distinct query text
//   query_text.splits  int64 [queries + 1]    row splits of
//   query_text.bytes   uint8 [bytes]          that text, UTF-8
//   positive.splits  int64 [queries + 1]      rows of each query: positives are sorted by (query, item)
//   positive.user, positive.item  int32 [positives]
//   positive.time    uint32 [positives]       when the request began
//   positive.type    uint8 [positives]
//   [positive.weight, positive.label]  float32 [positives], or uint8 codes of the values in
//   [positive.weight.values, positive.label.values]  float32 [at most 256]
//   [positive.request] int32 [positives]      -1 when nothing else was shown, otherwise a row of
//   [impression.splits int64 [requests + 1]]  row splits of
//   [impression.item int32]                   items shown in the request and not clicked, ascending
//   negative.splits  int64 [queries + 1]      row splits of
//   negative.item    int32                    supervised negatives (section 4.5) of each query, ascending
// titles.dpsr (kind "titles")
//   title.splits     int64 [items + 1]        row splits of
//   title.bytes      uint8 [bytes]            the title of each item, UTF-8
//   [text<N>.splits] int64 [items + 1]        of column N of the schema's `text`, for columns but the title; training
//   [text<N>.bytes]  uint8 [bytes]            does not read them
// vocabulary.dpsr: tokenizer_cc/vocabulary.h
#ifndef DPSR_DPSR_TF_OPS_TRAINING_STORE_H_
#define DPSR_DPSR_TF_OPS_TRAINING_STORE_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dpsr_tf/ops/click_graph.h"
#include "dpsr_tf/ops/columns.h"
#include "dpsr_tf/ops/item_table.h"
#include "dpsr_tf/ops/permutation.h"
#include "common/packed_file.h"
#include "common/status.h"
#include "tokenizer_cc/vocabulary.h"

namespace dpsr {

// A Bloom filter of items, with two bits of one word for each. It finds about 2 in 100 items that it does not have.
struct ItemFilter {
  // The hash of an item, for filters of any size.
  struct Key {
    uint64_t bits;
    uint32_t word;
  };
  static Key KeyOf(int32_t item) {
    const uint64_t hash = Mix64(static_cast<uint64_t>(item));
    return {uint64_t{1} << (hash & 63) | uint64_t{1} << (hash >> 6 & 63), static_cast<uint32_t>(hash >> 32)};
  }
  // Makes a filter with 16 bits for each item.
  static std::vector<uint64_t> Of(Span<const int32_t> items);

  Span<const uint64_t> words;

  bool MayHave(const Key& key) const {
    return (words[uint64_t{key.word} * words.size() >> 32] & key.bits) == key.bits;
  }
};

// The items that were clicked for a query.
struct Clicks {
  Span<const int32_t> items;  // ascending, perhaps repeated
  ItemFilter filter;          // of these items; without words if they are few
};

// The clicks of a query with many positives: a filter and, if this halves the list, each item once. A head query of a
// large log has 1,000 times as many positives as items.
struct HeadClicks {
  std::vector<int32_t> items;
  std::vector<uint64_t> filter;
};

// One text for each row.
struct TextColumn {
  Span<const int64_t> splits;
  Span<const uint8_t> bytes;

  std::string_view operator[](int64_t row) const {
    const char* text = reinterpret_cast<const char*>(bytes.data());
    return {text + splits[row], static_cast<size_t>(splits[row + 1] - splits[row])};
  }
  // Reads the sections `name`.splits and `name`.bytes, of `rows` rows.
  Status Read(const SectionReader& reader, const std::string& name, int64_t rows);
};

// One interactions file. The members below `own` are set for a worker's own shards only.
struct InteractionsShard {
  std::unique_ptr<PackedFile> file;  // null, without query_tokens, if it is not read; see Options::all_queries
  int64_t first_query = 0;  // global row of its first query
  RaggedColumn query_tokens;
  bool own = false;
  TextColumn query_text;   // empty unless asked for
  RaggedColumn positives;  // items of each query, ascending; an item clicked twice stands twice
  Span<const int32_t> user, request;  // request: empty unless asked for
  Span<const uint32_t> time;
  Span<const uint8_t> type;
  NumberColumn weight, label;       // empty: all 1
  RaggedColumn impressions;         // of each request
  RaggedColumn negatives;           // of each query
  // Local queries of the positives 0, kQueryStride, 2 * kQueryStride, ... and of the last one.
  std::vector<int32_t> query_of;
  // Queries with many positives, ascending. They take at most 3 bytes for each positive.
  std::vector<int32_t> heads;
  std::vector<HeadClicks> head_clicks;

  static constexpr int64_t kQueryStride = 32;

  // Fill query_of, and heads with head_clicks, from the positives.
  void FindQueries();
  void FindHeads();
  // Returns the local query of a positive.
  int64_t QueryOfPositive(int64_t row) const {
    const int64_t* splits = positives.splits.data();
    const int32_t* around = &query_of[row / kQueryStride];
    return std::upper_bound(splits + around[0] + 1, splits + around[1] + 1, row) - splits - 1;
  }
  Clicks ClicksOf(int64_t local_query) const;
};

// Immutable after Open, so thread-safe.
class TrainingStore {
 public:
  using FileOpener = std::function<Status(const std::string& path, const char* kind, std::unique_ptr<PackedFile>*)>;

  struct Options {
    std::string users, items;
    std::vector<std::string> interactions;
    std::vector<int64_t> queries;  // number of queries of each interactions file; empty if it is not known
    std::string titles, vocabulary;
    bool has_titles = false, has_query_texts = false;  // whether to read these, and the vocabulary with them
    FeatureNames user_features, item_features;
    FeatureNames history_features;  // features of the items in histories
    bool reads_log = true;          // whether there must be a positive pair
    // Whether to read the queries of other workers' files, too. Otherwise such a file may be missing if `queries` says
    // how many it has.
    bool all_queries = true;
    bool events = false;            // whether to read the users' events
    bool event_queries = true;      // whether to read the queries of these events, too
    bool impressions = false;       // whether to read unclicked impressions; FailedPrecondition if there are none
    bool impressions_if_any = false;  // whether to read them if there are any
    bool has_graph = false;           // whether to read the click graph
    std::vector<std::string> graph;   // its files
    FeatureNames graph_attributes;    // item features of kind categorical whose values are nodes of it
    // With at least as many files as workers, worker w owns files w, w + num_shards, ...; with fewer, every worker owns
    // all of them and takes its part by position.
    int64_t shard_index = 0;
    int64_t num_shards = 1;
  };

  // Errors: the errors of `open` (by default PackedFile::Open); DataLoss if the files do not fit together (a row that
  // refers beyond a table, splits that fall, rows in another order than above); NotFound for an unknown feature;
  // FailedPrecondition without items, or without the positive interactions that are asked for; InvalidArgument without
  // an interactions file, or for wrong Options::queries.
  static Status Open(const Options& options, const FileOpener& open, std::unique_ptr<TrainingStore>* store);
  static Status OpenLocalFile(const std::string& path, const char* kind, std::unique_ptr<PackedFile>* file) {
    return PackedFile::Open(path, kind, /*verify=*/false, file);
  }

  int64_t num_users() const { return num_users_; }
  int64_t num_items() const { return items_->rows(); }
  int64_t num_queries() const { return num_queries_; }
  // Number of positives in the files that this worker owns, and whether it owns them alone.
  int64_t num_positives() const { return own_rows_.back(); }
  bool sharded_by_file() const { return sharded_by_file_; }

  const ItemTable& items() const { return *items_; }
  const FeatureColumns& item_features() const { return items_->features(); }
  const FeatureColumns& history_features() const { return history_features_; }
  const FeatureColumns& user_features() const { return user_features_; }
  // The code of each attribute of each item, and the graph; only with Options::has_graph.
  const FeatureColumns& graph_attributes() const { return graph_attributes_; }
  const ClickGraph& graph() const { return *graph_; }
  // The title of each item; empty unless Options::has_titles.
  const TextColumn& titles() const { return title_; }
  // The vocabulary that turns texts into tokens; only with Options::has_titles or has_query_texts.
  const Vocabulary& vocabulary() const { return *vocabulary_; }

  // Finds a positive by its number among the owned ones. Sets `row` to its row in the shard.
  const InteractionsShard& ShardOfPositive(int64_t positive, int64_t* row) const {
    const size_t s = Find(own_rows_, positive);
    *row = positive - own_rows_[s];
    return *own_shards_[s];
  }
  // Finds a query by its global row. Sets `local` to its row in the shard.
  const InteractionsShard& ShardOfQuery(int64_t query, int64_t* local) const {
    const size_t s = Find(first_queries_, query);
    *local = query - first_queries_[s];
    return shards_[s];
  }
  // Returns the tokens of a query, which must be in a file of this worker unless Options::all_queries.
  Span<const int32_t> query_tokens(int64_t query) const {
    int64_t local;
    const InteractionsShard& shard = ShardOfQuery(query, &local);
    return shard.query_tokens[local];
  }

  // Prefetches a query that is needed soon.
  void PrefetchQuery(int64_t query) const {
    int64_t local;
    const InteractionsShard& shard = ShardOfQuery(query, &local);
    __builtin_prefetch(&shard.query_tokens.splits[local]);
  }

  // Events of each user; all empty unless Options::events, event_query() also unless Options::event_queries.
  Span<const int64_t> event_splits() const { return event_splits_; }
  Span<const uint32_t> event_time() const { return event_time_; }
  Span<const int32_t> event_item() const { return event_item_; }
  Span<const int32_t> event_query() const { return event_query_; }
  Span<const uint8_t> event_type() const { return event_type_; }

 private:
  TrainingStore() = default;
  // Returns the position of the last of the ascending `begins` that is at most `row`; begins[0] is 0.
  static size_t Find(const std::vector<int64_t>& begins, int64_t row) {
    if (begins.size() <= 2) return begins.size() == 2 && row >= begins[1];
    return static_cast<size_t>(std::upper_bound(begins.begin(), begins.end(), row) - begins.begin()) - 1;
  }
  Status OpenShard(const Options& options, InteractionsShard* shard) const;
  Status OpenUsers(const Options& options);
  Status OpenTitles(const std::string& path, const FileOpener& open);
  Status OpenVocabulary(const std::string& path, const FileOpener& open);
  Status OpenGraph(const Options& options, const FileOpener& open);
  Status CheckEvents(const SectionReader& reader) const;

  std::unique_ptr<PackedFile> users_, titles_;
  std::unique_ptr<Vocabulary> vocabulary_;
  std::unique_ptr<ClickGraph> graph_;
  std::unique_ptr<ItemTable> items_;
  std::vector<InteractionsShard> shards_;
  std::vector<const InteractionsShard*> own_shards_;
  std::vector<int64_t> own_rows_;  // number of positives before each of own_shards_, and in total
  std::vector<int64_t> first_queries_;  // first query of each of shards_
  bool sharded_by_file_ = false;
  int64_t num_users_ = 0, num_queries_ = 0;
  FeatureColumns user_features_, history_features_, graph_attributes_;
  TextColumn title_;
  Span<const int64_t> event_splits_;
  Span<const uint32_t> event_time_;
  Span<const int32_t> event_item_, event_query_;
  Span<const uint8_t> event_type_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_TRAINING_STORE_H_
