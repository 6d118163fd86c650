// The expected tokens of tests/tokenizer_cc/golden.tsv, the file that also drives the Python module, the TensorFlow op
// and the command. DPSR_GOLDEN_FILE is its path.
#include <gtest/gtest.h>
#include <utf8proc.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "common/test_util.h"
#include "tokenizer_cc/tokenizer.h"

namespace dpsr {
namespace {

// Reads the string literal that `text` begins with and drops it: JSON's escapes, and \xNN for a byte.
std::string ReadLiteral(std::string_view* text) {
  std::string out;
  EXPECT_EQ(text->substr(0, 1), "\"");
  size_t i = 1;
  const auto hex = [&](size_t digits) {
    const std::string number(text->substr(i, digits));
    i += digits;
    return static_cast<utf8proc_int32_t>(std::stoul(number, nullptr, 16));
  };
  while (i < text->size() && (*text)[i] != '"') {
    if ((*text)[i] != '\\') {
      out += (*text)[i++];
      continue;
    }
    const char kind = text->at(i + 1);
    i += 2;
    if (kind == 'x') {
      out += static_cast<char>(hex(2));
    } else if (kind == 'u') {
      utf8proc_int32_t c = hex(4);
      if (c >= 0xD800 && c < 0xDC00) {
        i += 2;  // the \u of the second half
        c = 0x10000 + (c - 0xD800) * 0x400 + (hex(4) - 0xDC00);
      }
      utf8proc_uint8_t utf8[4];
      out.append(reinterpret_cast<const char*>(utf8), static_cast<size_t>(utf8proc_encode_char(c, utf8)));
    } else {
      out += kind == 'n' ? '\n' : kind == 't' ? '\t' : kind == 'r' ? '\r' : kind;
    }
  }
  text->remove_prefix(i + 1);
  return out;
}

TokenizerConfig ReadSwitches(const std::string& field) {
  TokenizerConfig config;
  if (field == "default") return config;
  std::string text = config.Serialize();
  std::istringstream switches(field);
  for (std::string name; std::getline(switches, name, ',');) {
    const bool off = name.rfind("no", 0) == 0;
    if (off) name = name.substr(2);
    const size_t place = text.find(name + "=");
    EXPECT_NE(place, std::string::npos) << name;
    text[place + name.size() + 1] = off ? '0' : '1';
  }
  EXPECT_TRUE(IsOk(TokenizerConfig::Parse(text, &config)));
  return config;
}

TEST(GoldenTest, EveryLine) {
  std::ifstream file(DPSR_GOLDEN_FILE);
  ASSERT_TRUE(file.is_open()) << DPSR_GOLDEN_FILE;
  int number = 0;
  int cases = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.empty() || line[0] == '#') continue;
    ++cases;
    const size_t first = line.find('\t');
    const size_t second = line.find('\t', first + 1);
    ASSERT_NE(second, std::string::npos) << "line " << number;
    std::string_view text_field = std::string_view(line).substr(first + 1, second - first - 1);
    if (text_field[0] == 'b') text_field.remove_prefix(1);
    const std::string text = ReadLiteral(&text_field);
    std::vector<std::string> expected;
    for (std::string_view rest = std::string_view(line).substr(second + 1); rest.find('"') != std::string_view::npos;) {
      rest.remove_prefix(rest.find('"'));
      expected.push_back(ReadLiteral(&rest));
    }
    std::vector<std::string> tokens;
    Tokenizer(ReadSwitches(line.substr(0, first))).Tokenize(text, [&](std::string_view token) {
      tokens.emplace_back(token);
    });
    EXPECT_EQ(tokens, expected) << "line " << number << ": " << line.substr(0, second);
  }
  EXPECT_GT(cases, 350);
}

}  // namespace
}  // namespace dpsr
