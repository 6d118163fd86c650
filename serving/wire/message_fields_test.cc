#include "serving/wire/message_fields.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace dpsr::serving {
namespace {

using namespace std::string_literals;

std::string Fields(std::string_view message, size_t most = 100) {
  MessageFields fields(message, most);
  std::string all;
  MessageField field;
  while (fields.Next(&field)) {
    all += std::to_string(field.number) + (field.is_bytes ? "=" : ":") +
           std::string(message.substr(field.content, field.end - field.content)) + " ";
    EXPECT_LT(field.begin, field.end);
  }
  EXPECT_FALSE(fields.Next(&field));
  return all + fields.error();
}

TEST(MessageFieldsTest, FindsFieldsOfAllKinds) {
  EXPECT_EQ(Fields(""), "");
  EXPECT_EQ(Fields("\x0a\x02"s + "ab"), "1=ab ");
  EXPECT_EQ(Fields("\x0a\x00\x10\xff\x01\x1d"s + "1234" + "\x21" + "12345678" + "\xa2\x06\x01z"),
            "1= 2: 3:1234 4:12345678 100=z ");
  const std::string most(9, '\xff');
  EXPECT_EQ(Fields("\x08"s + most + "\x01"), "1: ");
}

TEST(MessageFieldsTest, SaysWhatIsNotAMessage) {
  EXPECT_EQ(Fields("\x0a\x02"s + "a"), "a field that is cut off or has the number 0 at byte 0");
  EXPECT_EQ(Fields("\x0a\x00\x02\x00"s), "1= a field that is cut off or has the number 0 at byte 2");
  EXPECT_EQ(Fields("\x0d"s + "123"), "a field that is cut off or has the number 0 at byte 0");
  EXPECT_EQ(Fields("\x0b"), "wire type 3 at byte 0");
  EXPECT_EQ(Fields("\x0a"), "a number that is cut off");
  EXPECT_EQ(Fields("\x08"s + std::string(9, '\xff') + "\x02"), "a number of more than 64 bits ending at byte 11");
  // A length that would wrap around.
  EXPECT_EQ(Fields("\x0a"s + std::string(9, '\xff') + "\x01"), "a field that is cut off or has the number 0 at byte 0");
}

TEST(MessageFieldsTest, StopsAtTheMostFields) {
  std::string message;
  for (int i = 0; i < 6; ++i) message += "\x0a\x00"s;
  EXPECT_EQ(Fields(message, 6), "1= 1= 1= 1= 1= 1= ");
  EXPECT_EQ(Fields(message, 5), "1= 1= 1= 1= 1= more than 5 fields");
  MessageFields fields(message, 5), broken("\x0b", 5);
  for (MessageField field; fields.Next(&field) || broken.Next(&field);) {
  }
  EXPECT_TRUE(fields.has_too_many());
  EXPECT_FALSE(broken.has_too_many());
}

}  // namespace
}  // namespace dpsr::serving
