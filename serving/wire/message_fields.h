// Walks over the fields of a serialized protocol buffer message without decoding what they hold.
#ifndef DPSR_SERVING_WIRE_MESSAGE_FIELDS_H_
#define DPSR_SERVING_WIRE_MESSAGE_FIELDS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dpsr::serving {

// Fields that a request has at most: a model spec, a tensor for each input, and a name for each output. Messages of
// many short fields cost a server far more to decode than a client to send.
inline constexpr size_t kMostFields = 10'000;

struct MessageField {
  uint64_t number = 0;
  bool is_bytes = false;  // whether it is length-delimited: a text, bytes or a message
  size_t begin = 0;       // of the field
  size_t content = 0;     // begin of what it holds, behind its number and its length
  size_t end = 0;         // of the field
};

class MessageFields {
 public:
  // `message` must outlive this. A message with more than `most` fields is an error.
  MessageFields(std::string_view message, size_t most) : message_(message), left_(most), most_(most) {}

  // Sets `field` to the next field. Returns false at the message's end, or if it is not a message; error() tells which.
  bool Next(MessageField* field);

  // Why the bytes are not a message; empty if they are, as far as Next() has read.
  const std::string& error() const { return error_; }
  // Whether that is because there are too many fields.
  bool has_too_many() const { return has_too_many_; }

 private:
  bool ReadNumber(uint64_t* value);
  bool Fail(std::string words);

  const std::string_view message_;
  size_t left_;
  const size_t most_;
  size_t offset_ = 0;
  bool has_too_many_ = false;
  std::string error_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_WIRE_MESSAGE_FIELDS_H_
