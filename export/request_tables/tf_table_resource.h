// Tables that a servable loads from its assets, as resources: what all their ops share.
#ifndef DPSR_EXPORT_REQUEST_TABLES_TF_TABLE_RESOURCE_H_
#define DPSR_EXPORT_REQUEST_TABLES_TF_TABLE_RESOURCE_H_

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "common/tf_op.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/resource_op_kernel.h"
#include "tensorflow/core/platform/mutex.h"

namespace dpsr {

inline std::string_view View(const tstring& text) { return {text.data(), text.size()}; }

// A table of a servable. All sessions that use the same name in one resource manager share it.
template <typename Table>
class TableResource : public tensorflow::ResourceBase {
 public:
  std::string DebugString() const override { return StrCat("table of ", path_); }

  // Returns null before Load has succeeded.
  std::shared_ptr<const Table> Get() const {
    const tensorflow::tf_shared_lock lock(mutex_);
    return table_;
  }

  // Loads a table: `open` opens the file `path`. The same path again does nothing; another path is refused.
  template <typename Open>
  Status Load(const std::string& path, const Open& open) {
    const tensorflow::mutex_lock lock(mutex_);
    if (table_ != nullptr && path_ == path) return Status();
    if (table_ != nullptr) {
      return MakeStatus(StatusCode::kFailedPrecondition, "cannot load ", path, ": this handle holds ", path_,
                        " already; give each table a handle with its own shared_name");
    }
    std::unique_ptr<Table> table;
    DPSR_RETURN_IF_ERROR(open(&table));
    table_ = std::move(table);
    path_ = path;
    return Status();
  }

 private:
  mutable tensorflow::mutex mutex_;
  std::shared_ptr<const Table> table_ TF_GUARDED_BY(mutex_);
  std::string path_;
};

template <typename Table>
class TableHandleOp : public tensorflow::ResourceOpKernel<TableResource<Table>> {
 public:
  using tensorflow::ResourceOpKernel<TableResource<Table>>::ResourceOpKernel;

 private:
  tensorflow::Status CreateResource(TableResource<Table>** resource) override {
    *resource = new TableResource<Table>;
    return tensorflow::OkStatus();
  }
};

// The first input of an op that reads a table.
constexpr int kHandle = 0;

template <typename Table>
tensorflow::Status LoadedTable(OpKernelContext* c, std::shared_ptr<const Table>* table) {
  tensorflow::core::RefCountPtr<TableResource<Table>> resource;
  TF_RETURN_IF_ERROR(LookupResource(c, HandleFromInput(c, kHandle), &resource));
  *table = resource->Get();
  if (*table != nullptr) return tensorflow::OkStatus();
  return errors::FailedPrecondition(
      "the table is not loaded: run the initialization op of the graph (tf.compat.v1.tables_initializer()) first");
}

inline tensorflow::Status CheckRank(const Tensor& tensor, int rank, const char* name, const char* expected) {
  if (tensor.dims() == rank) return tensorflow::OkStatus();
  return errors::InvalidArgument(name, " has shape ", tensor.shape().DebugString(), ", expected ", expected);
}

enum LoadInput { kLoadHandle = kHandle, kLoadFilename };

// Loads a table into a handle. Subclasses open the file.
template <typename Table>
class TableLoadOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* c) override {
    tensorflow::core::RefCountPtr<TableResource<Table>> resource;
    OP_REQUIRES_OK(c, LookupResource(c, HandleFromInput(c, kLoadHandle), &resource));
    OP_REQUIRES_OK(c, CheckRank(c->input(kLoadFilename), 0, "filename", "a scalar"));
    const std::string path = c->input(kLoadFilename).scalar<tstring>()();
    OP_REQUIRES_OK(
        c, ToTensorFlow(resource->Load(path, [&](std::unique_ptr<Table>* table) { return Open(path, table); })));
  }

 private:
  virtual Status Open(const std::string& path, std::unique_ptr<Table>* table) const = 0;
};

inline tensorflow::Status LoadShapes(InferenceContext* c) {
  ShapeHandle scalar;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(kLoadHandle), 0, &scalar));
  return c->WithRank(c->input(kLoadFilename), 0, &scalar);
}

}  // namespace dpsr

#define DPSR_REGISTER_HANDLE(name, what)                     \
  REGISTER_OP(name)                                          \
      .Attr("container: string = ''")                        \
      .Attr("shared_name: string = ''")                      \
      .Output("handle: resource")                            \
      .SetIsStateful()                                       \
      .SetShapeFn(tensorflow::shape_inference::ScalarShape)  \
      .Doc("Creates a handle for " what ". It is empty until its load op has run. Handles with one name share a table.")

#endif  // DPSR_EXPORT_REQUEST_TABLES_TF_TABLE_RESOURCE_H_
