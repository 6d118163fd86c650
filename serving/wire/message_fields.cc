#include "serving/wire/message_fields.h"

#include <utility>

namespace dpsr::serving {
namespace {

enum WireType : uint64_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

}  // namespace

bool MessageFields::Next(MessageField* field) {
  if (offset_ == message_.size() || !error_.empty()) return false;
  has_too_many_ = left_-- == 0;
  if (has_too_many_) return Fail("more than " + std::to_string(most_) + " fields");
  field->begin = offset_;
  uint64_t tag = 0, size = 0;
  if (!ReadNumber(&tag)) return false;
  field->number = tag >> 3;
  field->is_bytes = (tag & 7) == kLengthDelimited;
  switch (tag & 7) {
    case kVarint:
      if (!ReadNumber(&size)) return false;
      size = 0;
      break;
    case kFixed64: size = 8; break;
    case kFixed32: size = 4; break;
    case kLengthDelimited:
      if (!ReadNumber(&size)) return false;
      break;
    default:
      return Fail("wire type " + std::to_string(tag & 7) + " at byte " + std::to_string(field->begin));
  }
  if (field->number == 0 || size > message_.size() - offset_) {
    return Fail("a field that is cut off or has the number 0 at byte " + std::to_string(field->begin));
  }
  field->content = offset_;
  field->end = offset_ += size;
  return true;
}

// Reads a number of up to 64 bits: seven in each byte, the lowest first, and a bit that says whether more come.
bool MessageFields::ReadNumber(uint64_t* value) {
  *value = 0;
  for (size_t i = 0; i < 10; ++i) {
    if (offset_ == message_.size()) return Fail("a number that is cut off");
    const auto byte = static_cast<uint8_t>(message_[offset_++]);
    if (i == 9 && byte > 1) break;
    *value |= static_cast<uint64_t>(byte & 0x7F) << (7 * i);
    if (byte < 0x80) return true;
  }
  return Fail("a number of more than 64 bits ending at byte " + std::to_string(offset_));
}

bool MessageFields::Fail(std::string words) {
  error_ = std::move(words);
  return false;
}

}  // namespace dpsr::serving
