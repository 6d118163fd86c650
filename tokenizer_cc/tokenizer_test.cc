#include "tokenizer_cc/tokenizer.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tokenizer_cc/test_util.h"

namespace dpsr {
namespace {

using Tokens = std::vector<std::string>;

Tokens Tokenize(std::string_view text, const TokenizerConfig& config = {}) {
  Tokens tokens;
  Tokenizer(config).Tokenize(text, [&](std::string_view token) { tokens.emplace_back(token); });
  return tokens;
}

TokenizerConfig OnlyWords() {
  TokenizerConfig config;
  config.letter_trigrams = config.char_bigrams = false;
  return config;
}

// Words and characters, without their n-grams.
Tokens Words(std::string_view text) { return Tokenize(text, OnlyWords()); }

TEST(TokenizerTest, WordWithTrigrams) {
  EXPECT_EQ(Tokenize("Deck"), (Tokens{"deck", "##de", "#dec", "#eck", "#ck#"}));
  EXPECT_EQ(Tokenize("tv"), (Tokens{"tv", "##tv", "#tv#"}));
  EXPECT_EQ(Tokenize("x"), (Tokens{"x", "##x#"}));
}

TEST(TokenizerTest, NothingToTokenize) {
  EXPECT_EQ(Tokenize(""), Tokens{});
  EXPECT_EQ(Tokenize(std::string_view()), Tokens{});
  EXPECT_EQ(Tokenize(" \t\r\n\v\f!?#-_.,;"), Tokens{});
  EXPECT_EQ(Tokenize("　、。！"), Tokens{});
}

TEST(TokenizerTest, SeparatorsSplitWords) {
  EXPECT_EQ(Words("a b\tc\nd,e-f/g_h"), (Tokens{"a", "b", "c", "d", "e", "f", "g", "h"}));
  EXPECT_EQ(Words("a　b\u00A0c\u2003d\u2028e"), (Tokens{"a", "b", "c", "d", "e"}));
  EXPECT_EQ(Words(std::string_view("a\0b", 3)), (Tokens{"a", "b"}));
  EXPECT_EQ(Words(std::string_view("á\0b", 4)), (Tokens{"á", "b"}));
  EXPECT_EQ(Words("c++ c# #deck"), (Tokens{"c", "c", "deck"}));
  EXPECT_EQ(Words("a😀b👍🏽c"), (Tokens{"a", "b", "c"}));
  EXPECT_EQ(Words("a\uE000b\u0378c"), (Tokens{"a", "b", "c"})) << "private use, unassigned";
}

TEST(TokenizerTest, NumbersAndUnits) {
  EXPECT_EQ(Tokenize("2024"), (Tokens{"2024"}));
  EXPECT_EQ(Tokenize("٢٣"), (Tokens{"٢٣"})) << "digits of any script";
  EXPECT_EQ(Tokenize("4k"), (Tokens{"4k", "##4k", "#4k#"}));
  EXPECT_EQ(Words("3.5mm"), (Tokens{"3", "5mm"}));
  EXPECT_EQ(Words("１００ＭＬ ５寸"), (Tokens{"100ml", "5", "寸"}));
}

TEST(TokenizerTest, NormalForms) {
  EXPECT_EQ(Words("ＡＢＣ"), (Tokens{"abc"})) << "full width";
  EXPECT_EQ(Words("ｱｲｶﾞ"), (Tokens{"ア", "イ", "ガ"})) << "half width, with a voiced mark that composes";
  EXPECT_EQ(Words("Straße"), (Tokens{"strasse"}));
  EXPECT_EQ(Words("ΣΊΣΥΦΟΣ"), (Tokens{"σίσυφοσ"}));
  EXPECT_EQ(Words("ﬁne"), (Tokens{"fine"}));
  EXPECT_EQ(Words("Cafe\u0301"), Words("CAFÉ"));
  EXPECT_EQ(Words("CAFÉ"), (Tokens{"café"}));
  EXPECT_EQ(Words("x²"), (Tokens{"x2"}));
  EXPECT_EQ(Words("wi\u00ADfi\u200Bx\uFEFF"), (Tokens{"wifix"})) << "ignorable code points go";
  EXPECT_EQ(Words("\u2F00"), (Tokens{"一"})) << "Kangxi radical one";
  EXPECT_EQ(Words("\uF900"), (Tokens{"豈"})) << "compatibility ideograph";
  EXPECT_EQ(Words("\u1112\u1161\u11AB"), (Tokens{"한"}));
}

TEST(TokenizerTest, MarksComeInCanonicalOrder) {
  EXPECT_EQ(Words("q\u0307\u0323"), Words("q\u0323\u0307"));
  EXPECT_EQ(Words("q\u0307\u0323"), (Tokens{"q\u0323\u0307"}));
}

TEST(TokenizerTest, AlphabetsAreWords) {
  EXPECT_EQ(Tokenize("Éà"), (Tokens{"éà", "##éà", "#éà#"}));
  EXPECT_EQ(Tokenize("ДОМ"), (Tokens{"дом", "##до", "#дом", "#ом#"}));
  EXPECT_EQ(Tokenize("한국어"), (Tokens{"한국어", "##한국", "#한국어", "#국어#"}));
  EXPECT_EQ(Tokenize("я"), (Tokens{"я", "##я#"}));
  EXPECT_EQ(Words("हिन्दी पुस्तक"), (Tokens{"हिन्दी", "पुस्तक"})) << "marks belong to the word";
  EXPECT_EQ(Tokenize("𐐀a"), (Tokens{"𐐨a", "##𐐨a", "#𐐨a#"})) << "four-byte letters with case";
}

TEST(TokenizerTest, UnspacedScriptsAreCharacters) {
  EXPECT_EQ(Tokenize("手"), (Tokens{"手"}));
  EXPECT_EQ(Tokenize("手机壳"), (Tokens{"手", "机", "手机", "壳", "机壳"}));
  EXPECT_EQ(Tokenize("手 机"), (Tokens{"手", "机"})) << "no bigram across a separator";
  EXPECT_EQ(Tokenize("ひカ"), (Tokens{"ひ", "カ", "ひカ"}));
  EXPECT_EQ(Tokenize("กข"), (Tokens{"ก", "ข", "กข"}));
  // One of each block, the first and last of Han; U+323B0 is not yet assigned in Unicode 15.
  for (const char* character :
       {"\u0E01", "\u0E82", "\u1000", "\u1780", "\u2E80", "\u3005", "\u3007", "\u3021", "\u3031", "\u303C", "\u3041",
        "\u30FC", "\u3105", "\u31A0", "\u31F0", "\u3400", "\u4DBF", "\u4E00", "\u9FFF", "\uA9E0", "\uAA60", "\uFA0E",
        "\U0001B000", "\U00020000", "\U0002A6D6", "\U00030000", "\U000323B0"}) {
    EXPECT_EQ(Tokenize(character), (Tokens{character}));
  }
  EXPECT_EQ(Tokenize("カ・カ"), (Tokens{"カ", "カ"})) << "the middle dot separates";
}

TEST(TokenizerTest, RunsSplitWhereTheScriptChanges) {
  EXPECT_EQ(Words("iPhone手机case"), (Tokens{"iphone", "手", "机", "case"}));
  EXPECT_EQ(Tokenize("tv机").back(), "机");
}

TEST(TokenizerTest, MarksNeedSomethingBeforeThem) {
  EXPECT_EQ(Tokenize("\u0301"), Tokens{});
  EXPECT_EQ(Words("a \u0301b"), (Tokens{"a", "b"})) << "U+0020 U+0301 stays apart";
  EXPECT_EQ(Tokenize("\u0E34"), Tokens{}) << "a Thai vowel sign alone";
  EXPECT_EQ(Tokenize("กิ"), (Tokens{"ก", "\u0E34", "กิ"}));
}

TEST(TokenizerTest, WordBigrams) {
  TokenizerConfig config;
  config.word_bigrams = true;
  config.letter_trigrams = false;
  EXPECT_EQ(Tokenize("red,  running shoes", config),
            (Tokens{"red", "running", "red running", "shoes", "running shoes"}));
  EXPECT_EQ(Tokenize("RED　ÉTÉ", config), (Tokens{"red", "été", "red été"}));
  EXPECT_EQ(Tokenize("red 鞋 shoes", config), (Tokens{"red", "鞋", "shoes"})) << "unspaced text stands between them";
  config.word_unigrams = false;
  EXPECT_EQ(Tokenize("a b c", config), (Tokens{"a b", "b c"}));
}

TEST(TokenizerTest, EveryKindHasItsSwitch) {
  const TokenizerConfig none = {false, false, false, false, false};
  EXPECT_EQ(Tokenize("ab cd 手机", none), Tokens{});
  TokenizerConfig config = none;
  config.word_unigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"ab", "cd"}));
  config = none;
  config.word_bigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"ab cd"}));
  config = none;
  config.letter_trigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"##ab", "#ab#", "##cd", "#cd#"}));
  config = none;
  config.char_unigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"手", "机"}));
  config = none;
  config.char_bigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"手机"}));
}

TEST(TokenizerTest, InvalidBytesSeparate) {
  EXPECT_EQ(Words("a\xFF" "b"), (Tokens{"a", "b"}));
  EXPECT_EQ(Words("a\x80\x80" "b"), (Tokens{"a", "b"})) << "stray continuation bytes";
  EXPECT_EQ(Words("手\xE6\x89"), (Tokens{"手"})) << "cut short";
  EXPECT_EQ(Words("\xE6\x89手"), (Tokens{"手"}));
  EXPECT_EQ(Words("a\xC0\x80" "b"), (Tokens{"a", "b"})) << "overlong";
  EXPECT_EQ(Words("a\xED\xA0\x80" "b"), (Tokens{"a", "b"})) << "a surrogate";
  EXPECT_EQ(Words("a\xF4\x90\x80\x80" "b"), (Tokens{"a", "b"})) << "beyond U+10FFFF";
  EXPECT_EQ(Tokenize("手\xFF机"), (Tokens{"手", "机"})) << "no bigram across it";
}

TEST(TokenizerTest, AsciiPathEqualsUnicodePath) {
  std::mt19937 random(1);
  TokenizerConfig config;
  config.word_bigrams = true;
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (int i = 0; i < 40; ++i) text += static_cast<char>(random() % 3 == 0 ? random() % 128 : 'A' + random() % 58);
    ASSERT_EQ(Tokenize(text, config), Tokenize(text + "　", config)) << text;
  }
}

TEST(TokenizerTest, AnyBytesGiveValidTokens) {
  std::mt19937 random(2);
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    while (text.size() < 60) {
      utf8proc_uint8_t utf8[4];
      const auto c = static_cast<utf8proc_int32_t>(random() % (random() % 2 == 0 ? 0x110000 : 0x3100));
      text.append(reinterpret_cast<const char*>(utf8), static_cast<size_t>(utf8proc_encode_char(c, utf8)));
      if (random() % 4 == 0) text += static_cast<char>(random());
    }
    for (const std::string& token : Tokenize(text)) {
      ASSERT_FALSE(token.empty());
      const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(token.data());
      for (size_t i = 0; i < token.size();) {
        utf8proc_int32_t c;
        const utf8proc_ssize_t length =
            utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(token.size() - i), &c);
        ASSERT_GT(length, 0) << "invalid UTF-8 in a token of " << text;
        i += static_cast<size_t>(length);
      }
    }
  }
}

TEST(TokenizerTest, LongTexts) {
  const size_t megabyte = 1 << 20;
  EXPECT_EQ(Tokenize(std::string(megabyte, 'a')).size(), 1 + megabyte);
  std::string han, marks = "a", wide, dirty(megabyte, '\xFF');
  while (han.size() < megabyte) han += "手";
  EXPECT_EQ(Tokenize(han).size(), 2 * (han.size() / 3) - 1);
  // Alternating combining classes: quadratic where marks are ordered by exchanging neighbours.
  while (marks.size() < megabyte) marks += "\u0301\u0323";
  EXPECT_EQ(Words(marks).size(), 1u);
  while (wide.size() < megabyte) wide += "\uFDFA";  // expands to 18 code points
  EXPECT_EQ(Words(wide).size(), 3 * (wide.size() / 3) + 1);
  EXPECT_EQ(Tokenize(dirty), Tokens{});
}

TEST(TokenizerTest, ThreadsShareOne) {
  const Tokenizer tokenizer;
  const std::string texts[] = {"red running shoes", "iPhone手机壳 Straße", "a\xFF　b"};
  std::vector<std::thread> threads;
  for (const std::string& text : texts) {
    threads.emplace_back([&tokenizer, &text] {
      const Tokens expected = Tokenize(text);
      for (int i = 0; i < 200; ++i) {
        Tokens tokens;
        tokenizer.Tokenize(text, [&](std::string_view token) { tokens.emplace_back(token); });
        EXPECT_EQ(tokens, expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TokenizerConfigTest, TextForm) {
  EXPECT_EQ(TokenizerConfig().Serialize(),
            "tokenizer_version=1\nword_unigrams=1\nword_bigrams=0\nletter_trigrams=1\nchar_unigrams=1\n"
            "char_bigrams=1\n");
}

TEST(TokenizerConfigTest, RoundTripOfEveryConfig) {
  for (int bits = 0; bits < 32; ++bits) {
    const TokenizerConfig config = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
                                    (bits & 16) != 0};
    TokenizerConfig parsed;
    ASSERT_TRUE(IsOk(TokenizerConfig::Parse(config.Serialize(), &parsed)));
    EXPECT_EQ(parsed, config);
    EXPECT_EQ(config == TokenizerConfig(), bits == 29);
  }
}

TEST(TokenizerConfigTest, ParseNamesWhatIsWrong) {
  const std::string good = TokenizerConfig().Serialize();
  const auto message = [](const std::string& text) {
    TokenizerConfig config;
    config.word_bigrams = true;
    const TokenizerConfig before = config;
    const Status status = TokenizerConfig::Parse(text, &config);
    EXPECT_FALSE(status.ok()) << text;
    EXPECT_EQ(config, before) << "untouched on failure";
    return status.message();
  };
  EXPECT_TRUE(Contains(message(""), "empty text"));
  EXPECT_TRUE(Contains(message("word_unigrams=1\n"), "the first key is \"word_unigrams\", expected tokenizer_version"));
  EXPECT_TRUE(Contains(message("tokenizer_version=2\n"), "tokenizer_version is \"2\", this build has"));
  EXPECT_TRUE(Contains(message(good + "stem=1\n"), "unknown key \"stem\", expected one of word_unigrams"));
  EXPECT_TRUE(Contains(message(good + "word_bigrams=0\n"), "word_bigrams is given twice"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams=yes\n"), "word_bigrams is \"yes\", expected 0 or 1"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams\n"), "line \"word_bigrams\", expected key=value"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams=1\n"), "key word_unigrams is missing"));
}

}  // namespace
}  // namespace dpsr
