#ifndef DPSR_COMMON_SPAN_H_
#define DPSR_COMMON_SPAN_H_

#include <cstddef>

namespace dpsr {

// A view of a contiguous array. The owner of the array must outlive it.
template <typename T>
class Span {
 public:
  Span() = default;
  Span(T* data, size_t size) : data_(data), size_(size) {}
  T* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](size_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dpsr

#endif  // DPSR_COMMON_SPAN_H_
