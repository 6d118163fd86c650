// The resource that the ops of item retrieval share: a loaded index with the ids and attributes of its items.
#ifndef DPSR_EXPORT_FAISS_SEARCH_TF_INDEX_RESOURCE_H_
#define DPSR_EXPORT_FAISS_SEARCH_TF_INDEX_RESOURCE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "common/packed_file.h"
#include "common/tf_op.h"
#include "export/faiss_binding/faiss_index.h"
#include "export/faiss_search/filtered_search.h"
#include "export/faiss_search/fresh_index.h"
#include "export/faiss_search/item_filter.h"
#include "export/faiss_search/retrieval.h"
#include "tensorflow/core/platform/mutex.h"

namespace dpsr {

// The files and options that an index is loaded with.
struct LoadArguments {
  std::string index_filename;
  std::string item_ids_filename;
  std::string attributes_filename;  // may be empty
  std::string parameters;
  std::string max_parameters;
  int64_t dim = 0;  // 0 accepts any dimension
  bool mmap = true;
  int64_t changes_offset = 0;
  int64_t shard = 0;
  int64_t num_shards = 1;

  bool operator==(const LoadArguments& other) const {
    return index_filename == other.index_filename && item_ids_filename == other.item_ids_filename &&
           attributes_filename == other.attributes_filename && parameters == other.parameters &&
           max_parameters == other.max_parameters && changes_offset == other.changes_offset && shard == other.shard &&
           num_shards == other.num_shards;
  }
};

// A loaded index. Thread-safe. Only `fresh` changes, and the texts that `filters` knows.
struct ItemIndex {
  LoadArguments arguments;
  SearchParameters max_parameters;
  std::unique_ptr<FaissIndex> index;
  std::unique_ptr<FilteredSearch> filtered;
  std::unique_ptr<PackedFile> item_ids_file;
  std::unique_ptr<ItemFilters> filters;
  ItemIds item_ids;
  std::unique_ptr<FreshIndex> fresh;
};

// All sessions that use the same name in one resource manager share the resource.
class FaissIndexResource : public tensorflow::ResourceBase {
 public:
  std::string DebugString() const override;

  // Returns null before Load has succeeded.
  std::shared_ptr<const ItemIndex> Get() const {
    const tensorflow::tf_shared_lock lock(mutex_);
    return items_;
  }

  // Loads an index. Loading the same files again does nothing. Other files are refused: searches may be running, and
  // two exports that share a name by mistake would return each other's items.
  Status Load(const LoadArguments& arguments);

 private:
  mutable tensorflow::mutex mutex_;
  std::shared_ptr<const ItemIndex> items_ TF_GUARDED_BY(mutex_);
};

// Returns the index behind the first input of an op.
inline tensorflow::Status LoadedIndex(OpKernelContext* context, std::shared_ptr<const ItemIndex>* items) {
  tensorflow::core::RefCountPtr<FaissIndexResource> resource;
  TF_RETURN_IF_ERROR(LookupResource(context, HandleFromInput(context, 0), &resource));
  *items = resource->Get();
  if (*items != nullptr) return tensorflow::OkStatus();
  return errors::FailedPrecondition("the FAISS index is not loaded: run the initialization op of the graph "
                                    "(tf.compat.v1.tables_initializer()) first");
}

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_TF_INDEX_RESOURCE_H_
