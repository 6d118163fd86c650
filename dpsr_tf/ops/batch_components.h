// The components of a training batch: their names, types, shapes and order, defined once for C++ and Python.
//
// VisitBatchComponents lists them. The op file visits them to make the tensors of a batch, BatchComponents to describe
// them, and Python fills dpsr_tf.data.examples_dataset.Batch by name from the description. A name is the path to a
// tensor in that structure, such as "item_features.lists.0.row_splits".
#ifndef DPSR_DPSR_TF_OPS_BATCH_COMPONENTS_H_
#define DPSR_DPSR_TF_OPS_BATCH_COMPONENTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "dpsr_tf/ops/batch_options.h"
#include "dpsr_tf/ops/batch_sampler.h"
#include "dpsr_tf/ops/training_store.h"

namespace dpsr {

// A dimension that differs from batch to batch.
constexpr int64_t kAnySize = -1;

// Calls one method of `visitor` for each component or group of components, in order. A group of texts named x is
// x.values int32 [tokens] and x.row_splits int64 [texts + 1]; a group of features named x is x.codes int32
// [rows, fixed features] and the texts x.lists.0, x.lists.1, ..., one for each list feature. The methods are
//
//   Vector(name, size, values): a vector of the batch
//   PairQueries(name, texts): texts of the queries of the pairs
//   LogQueries(name, texts, rows): texts of the queries of the log with these rows
//   ItemTexts(name, texts, rows): texts of the items with these rows
//   Features(name, num_rows, names, columns, rows): features of the items or users with these rows
//   NegativeMask(name, rows, columns), OwnNegativeMask(name, rows, columns): bool [rows, columns]
//
// `values` and `rows` are members of Batch, `columns` is a method of TrainingStore.
template <typename Visitor>
void VisitBatchComponents(const BatchOptions& o, Visitor* visitor) {
  const int64_t b = o.batch_size, shared = b + o.num_random_negatives, n = shared + b * o.num_own_negatives;
  visitor->PairQueries("query", b);
  visitor->Vector("query_rows", b, &Batch::query);
  visitor->ItemTexts("item", n, &Batch::item);
  visitor->Vector("item_rows", n, &Batch::item);
  visitor->Features("item_features", n, o.item_features, &TrainingStore::item_features, &Batch::item);
  visitor->Vector("user_rows", b, &Batch::user);
  visitor->Features("user_features", b, o.user_features, &TrainingStore::user_features, &Batch::user);
  visitor->Vector("history.items.values", kAnySize, &Batch::history_item);
  visitor->Vector("history.items.row_splits", b + 1, &Batch::history_splits);
  visitor->Vector("history.types", kAnySize, &Batch::history_type);
  visitor->ItemTexts("history.text", o.history_text ? kAnySize : 0, o.history_text ? &Batch::history_item : nullptr);
  visitor->Features("history.features", kAnySize, o.history_features, &TrainingStore::history_features,
                    &Batch::history_item);
  visitor->Vector("history.query_splits", b + 1, &Batch::query_history_splits);
  visitor->LogQueries("history.query", kAnySize, &Batch::query_history);
  visitor->Vector("weights", b, &Batch::weight);
  visitor->Vector("labels", b, &Batch::label);
  visitor->Vector("types", b, &Batch::type);
  visitor->NegativeMask("negative_mask", b, o.negative_mask ? shared : 0);
  visitor->OwnNegativeMask("own_negative_mask", b, o.num_own_negatives);
  if (o.graph_fan_out.empty()) return;
  const int64_t attributes = static_cast<int64_t>(o.graph_attributes.fixed.size());
  visitor->LogQueries("graph.0.query", kAnySize, &Batch::graph_query);
  visitor->ItemTexts("graph.0.item", kAnySize, &Batch::graph_item);
  visitor->Vector("graph.0.value", kAnySize, &Batch::graph_value);
  visitor->Vector("graph.0.value_items.values", kAnySize, &Batch::graph_value_item);
  visitor->Vector("graph.0.value_items.row_splits", kAnySize, &Batch::graph_value_item_splits);
  visitor->Vector("graph.0.attributes", n * attributes, &Batch::graph_attributes);
  visitor->Vector("graph.0.node_attributes", kAnySize, &Batch::graph_node_attributes);
  visitor->Vector("graph.0.query_items.values", kAnySize, &Batch::graph_query_item);
  visitor->Vector("graph.0.query_items.row_splits", b + 1, &Batch::graph_query_item_splits);
  visitor->Vector("graph.0.query_items_queries.values", kAnySize, &Batch::graph_query_item_query);
  visitor->Vector("graph.0.query_items_queries.row_splits", kAnySize, &Batch::graph_query_item_query_splits);
  visitor->Vector("graph.0.item_queries.values", kAnySize, &Batch::graph_item_query);
  visitor->Vector("graph.0.item_queries.row_splits", n + 1, &Batch::graph_item_query_splits);
  visitor->Vector("graph.0.item_queries_items.values", kAnySize, &Batch::graph_item_query_item);
  visitor->Vector("graph.0.item_queries_items.row_splits", kAnySize, &Batch::graph_item_query_item_splits);
}

struct BatchComponent {
  std::string name;
  const char* dtype;           // as TensorFlow and NumPy call it: "int32"
  std::vector<int64_t> shape;  // kAnySize where a dimension differs from batch to batch
};

// The components of every batch with these options, in order.
std::vector<BatchComponent> BatchComponents(const BatchOptions& options);

// Describes the components in JSON: {"components": [["query.values", "int32", [-1]], ...]}. For options that
// BatchOptions::Parse refuses, {"error": message}.
std::string DescribeBatchComponents(const std::string& options_json);

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_BATCH_COMPONENTS_H_
