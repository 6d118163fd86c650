// Reads the history of users from the inputs clicked_items and clicked_item_types of a request, for op files.
#ifndef DPSR_EXPORT_REQUEST_TABLES_TF_HISTORY_H_
#define DPSR_EXPORT_REQUEST_TABLES_TF_HISTORY_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/tf_op.h"

namespace dpsr {

// The last known items of b users, oldest first.
struct KnownHistory {
  std::vector<int32_t> rows;    // of the item table
  std::vector<int32_t> types;   // positions in event_types
  std::vector<int64_t> splits;  // [b + 1]
};

class HistoryReader {
 public:
  // Reads the attributes length, event_types and default_type.
  tensorflow::Status Init(OpKernelConstruction* c) {
    TF_RETURN_IF_ERROR(c->GetAttr("length", &length_));
    TF_RETURN_IF_ERROR(c->GetAttr("event_types", &event_types_));
    return c->GetAttr("default_type", &default_type_);
  }

  // Args: ids [batch, n] and types of the same shape, or no elements if all are absent; find(id) returns the row of an
  // id that is not negative, or -1.
  template <typename Find>
  tensorflow::Status Read(int64_t batch, const Tensor& ids, const Tensor& types, const Find& find,
                          KnownHistory* history) const {
    if (ids.NumElements() > 0 && !(ids.dims() == 2 && ids.dim_size(0) == batch)) {
      return errors::InvalidArgument("clicked_items has shape ", ids.shape().DebugString(), ", expected [", batch,
                                     ", n], the items of each query's user, or no elements if all are absent");
    }
    if (types.NumElements() > 0 && types.shape() != ids.shape()) {
      return errors::InvalidArgument("clicked_item_types has shape ", types.shape().DebugString(), ", expected ",
                                     ids.shape().DebugString(),
                                     " as clicked_items, or no elements if all are clicks");
    }
    const int64_t width = ids.NumElements() == 0 ? 0 : ids.dim_size(1);
    // Through void*: TensorFlow's own int64 may be another type of the same size.
    const int64_t* id = static_cast<const int64_t*>(ids.data());
    history->splits.assign(1, 0);
    for (int64_t user = 0; user < batch; ++user) {
      // Collects the last known items, from the newest on, and then reverses their order.
      const auto begin = static_cast<int64_t>(history->rows.size());
      for (int64_t i = width - 1; i >= 0 && static_cast<int64_t>(history->rows.size()) - begin < length_; --i) {
        const int64_t place = user * width + i;
        int32_t type = default_type_;
        if (types.NumElements() > 0) TF_RETURN_IF_ERROR(Type(types.flat<tstring>()(place), &type));
        const int32_t row = id[place] < 0 ? -1 : find(id[place]);
        if (row < 0) continue;
        history->rows.push_back(row);
        history->types.push_back(type);
      }
      std::reverse(history->rows.begin() + begin, history->rows.end());
      std::reverse(history->types.begin() + begin, history->types.end());
      history->splits.push_back(static_cast<int64_t>(history->rows.size()));
    }
    return tensorflow::OkStatus();
  }

 private:
  tensorflow::Status Type(const tstring& name, int32_t* type) const {
    if (name.empty()) return tensorflow::OkStatus();
    const auto found = std::find(event_types_.begin(), event_types_.end(), name);
    if (found == event_types_.end()) {
      std::string names;
      for (const std::string& known : event_types_) names += (names.empty() ? "" : ", ") + known;
      return errors::InvalidArgument("clicked_item_types has '", std::string(name), "', expected one of ", names,
                                     ", or an empty text for a click");
    }
    *type = static_cast<int32_t>(found - event_types_.begin());
    return tensorflow::OkStatus();
  }

  int length_, default_type_;
  std::vector<std::string> event_types_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_REQUEST_TABLES_TF_HISTORY_H_
