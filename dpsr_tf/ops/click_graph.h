// The click graph of a store: edges between queries and items, and from values of attributes to their items. Training
// samples the neighbourhoods of a batch from it. dpsr_tf/data/click_graph.py writes the files and describes them.
//
// graph*.dpsr (kind "graph"), each with the edges of its queries and of a range of items, strongest first
//   query.splits     int64 [queries + 1]      row splits of
//   query.item       int32 [edges]            item rows
//   query.weight     float32 [edges]          above 0
//   [query.time]     uint32 [edges]           when the request of the edge's first click began
//   item.first       int64 [1]                first item row of the file
//   item.splits, item.query, item.weight, [item.time]   the same for items; queries are global rows
//   value.<name>.splits, value.<name>.item, value.<name>.weight   first file only: items of each code of an attribute
#ifndef DPSR_DPSR_TF_OPS_CLICK_GRAPH_H_
#define DPSR_DPSR_TF_OPS_CLICK_GRAPH_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"
#include "dpsr_tf/ops/columns.h"
#include "dpsr_tf/ops/permutation.h"

namespace dpsr {

// The edges of one node to nodes of one kind, by falling weight.
struct Edges {
  Span<const int32_t> nodes;
  Span<const float> weights;
  Span<const uint32_t> times;  // empty if the log has no times: every edge is older than any moment
};

// How neighbours are drawn from the edges of a node.
struct NeighbourLimits {
  int64_t most = 0;  // number of neighbours
  bool strongest = false;  // take the first ones, instead of drawing by weight without replacement
  uint32_t before = kAnyTime;  // edges whose time is not before this moment do not count
  int32_t excluded = -1;  // nor does the edge to this node

  static constexpr uint32_t kAnyTime = std::numeric_limits<uint32_t>::max();
};

// A weighted draw chooses among so many of the strongest edges that count.
constexpr size_t kDrawnFrom = 256;

// Appends neighbours to `found`: at most `most` of them, each once; all that count if these are no more than `most`.
// Does not use `random` then, nor with `strongest`. `weights` is working memory.
void PickNeighbours(const Edges& edges, const NeighbourLimits& limits, RandomStream* random,
                    std::vector<float>* weights, std::vector<int32_t>* found);

// Immutable after Open, so thread-safe.
class ClickGraph {
 public:
  using FileOpener = std::function<Status(const std::string& path, const char* kind, std::unique_ptr<PackedFile>*)>;

  // Opens all files of the graph of a store with so many queries and items. Errors: those of `open`; NotFound for an
  // attribute that the graph does not have; DataLoss if files and store do not fit together.
  static Status Open(const std::vector<std::string>& paths, const std::vector<std::string>& attributes,
                     int64_t num_queries, int64_t num_items, const FileOpener& open,
                     std::unique_ptr<ClickGraph>* graph);

  Edges OfQuery(int64_t query) const { return Find(queries_, query); }
  Edges OfItem(int64_t item) const { return Find(items_, item); }
  // The items of a code of attribute number `attribute`.
  Edges OfValue(size_t attribute, int32_t code) const { return Of(values_[attribute], code); }
  // Number of codes of an attribute, the unknown value 0 included.
  int64_t num_codes(size_t attribute) const { return values_[attribute].edges.rows(); }

 private:
  // The edges of consecutive nodes.
  struct Part {
    int64_t first = 0;
    RaggedColumn edges;
    Span<const float> weights;
    Span<const uint32_t> times;
  };
  ClickGraph() = default;
  static Edges Of(const Part& part, int64_t row);
  static Edges Find(const std::vector<Part>& parts, int64_t row);
  // Reads the sections `prefix`.splits, .`neighbour`, .weight, [.time].
  static Status Read(const SectionReader& reader, const std::string& prefix, const char* neighbour, int64_t rows,
                     int64_t num_neighbours, Part* part);

  std::vector<std::unique_ptr<PackedFile>> files_;
  std::vector<Part> queries_, items_, values_;
};

// Gives the distinct rows of a batch consecutive numbers, in the order of their first occurrence. It keeps its memory.
class RowNumbers {
 public:
  void Clear();
  int32_t NumberOf(int32_t row);
  const std::vector<int32_t>& rows() const { return rows_; }

 private:
  void Grow();
  std::vector<int32_t> rows_, slots_;  // slots: 1 + number, or 0
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_CLICK_GRAPH_H_
