// The Python module dpsr_tokenizer._native, which adapts the C++ core. _native.pyi has its types.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/pybind_status.h"
#include "common/status.h"
#include "tokenizer_cc/tokenizer.h"
#include "tokenizer_cc/vocabulary.h"
#include "tokenizer_cc/word_sequences.h"

namespace py = pybind11;

namespace dpsr {
namespace {

bool IsText(py::handle object) { return PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr()); }

// A list of texts that can be read without the GIL.
class Texts {
 public:
  // Adds a str or bytes. Raises TypeError for other types.
  void Add(py::handle text) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyUnicode_Check(text.ptr())) {
      if (const char* utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &size)) {
        views_.emplace_back(utf8, static_cast<size_t>(size));
        owners_.push_back(py::reinterpret_borrow<py::object>(text));
        return;
      }
      // Lone surrogates have no UTF-8 form. Each becomes three invalid bytes, which separate tokens.
      PyErr_Clear();
      PyObject* encoded = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass");
      if (encoded == nullptr) throw py::error_already_set();
      owners_.push_back(py::reinterpret_steal<py::object>(encoded));
    } else if (PyBytes_Check(text.ptr())) {
      owners_.push_back(py::reinterpret_borrow<py::object>(text));
    } else {
      throw py::type_error(StrCat("got a text of type ", Py_TYPE(text.ptr())->tp_name, ", expected str or bytes"));
    }
    if (PyBytes_AsStringAndSize(owners_.back().ptr(), &data, &size) != 0) throw py::error_already_set();
    views_.emplace_back(data, static_cast<size_t>(size));
  }

  // Adds a text. The caller keeps its bytes valid.
  void AddView(std::string_view text) { views_.push_back(text); }

  void Clear() {
    views_.clear();
    owners_.clear();
  }
  const std::vector<std::string_view>& views() const { return views_; }

 private:
  std::vector<std::string_view> views_;
  std::vector<py::object> owners_;
};

// The structs of the Arrow C data interface, as its specification defines them.
struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  int64_t flags;
  int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  int64_t length;
  int64_t null_count;
  int64_t offset;
  int64_t n_buffers;
  int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

struct ArrowArrayStream {
  int (*get_schema)(ArrowArrayStream*, ArrowSchema* out);
  int (*get_next)(ArrowArrayStream*, ArrowArray* out);
  const char* (*get_last_error)(ArrowArrayStream*);
  void (*release)(ArrowArrayStream*);
  void* private_data;
};

// A struct that was received from a stream and releases its content at the end.
template <typename T>
struct Released : T {
  Released() : T() {}
  ~Released() {
    if (this->release != nullptr) this->release(this);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;
};

template <typename T>
T* CapsulePointer(const py::handle& capsule, const char* name) {
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), name);
  if (pointer == nullptr) throw py::error_already_set();
  return static_cast<T*>(pointer);
}

constexpr size_t kTextsAtATime = 1 << 15;

// Calls use(&texts) for the rows of an Arrow array whose offsets have this type, in batches. A null is an empty text.
template <typename Offset, typename Use>
void ForEachArrowBatch(const ArrowArray& array, const Use& use) {
  const auto* valid = static_cast<const uint8_t*>(array.buffers[0]);
  const auto* offsets = static_cast<const Offset*>(array.buffers[1]);
  const auto* data = static_cast<const char*>(array.buffers[2]);
  Texts texts;
  for (int64_t row = array.offset; row < array.offset + array.length; ++row) {
    const bool is_null = valid != nullptr && (valid[row / 8] >> (row % 8) & 1) == 0;
    if (is_null || offsets[row] >= offsets[row + 1]) {
      texts.AddView({});
    } else {
      texts.AddView({data + offsets[row], static_cast<size_t>(offsets[row + 1] - offsets[row])});
    }
    if (texts.views().size() == kTextsAtATime) use(&texts);
  }
  use(&texts);
}

template <typename Use>
void UseArrow(const ArrowSchema& schema, const ArrowArray& array, const Use& use) {
  const std::string_view format = schema.format;
  if (schema.dictionary == nullptr && (format == "u" || format == "z")) return ForEachArrowBatch<int32_t>(array, use);
  if (schema.dictionary == nullptr && (format == "U" || format == "Z")) return ForEachArrowBatch<int64_t>(array, use);
  throw py::type_error(StrCat("got Arrow data of format \"", format,
                              "\", expected string, large_string, binary or large_binary; cast the column"));
}

// Calls use(&texts) for the texts of an iterable or of Arrow data, in order and in batches. `use` clears the texts.
template <typename Use>
void ForEachBatch(const py::object& object, const Use& use) {
  if (py::hasattr(object, "__arrow_c_array__")) {
    const py::tuple capsules = object.attr("__arrow_c_array__")();
    return UseArrow(*CapsulePointer<ArrowSchema>(capsules[0], "arrow_schema"),
                    *CapsulePointer<ArrowArray>(capsules[1], "arrow_array"), use);
  }
  if (py::hasattr(object, "__arrow_c_stream__")) {
    const py::object capsule = object.attr("__arrow_c_stream__")();
    auto* stream = CapsulePointer<ArrowArrayStream>(capsule, "arrow_array_stream");
    const auto check = [stream](int error) {
      if (error == 0) return;
      const char* message = stream->get_last_error(stream);
      throw py::value_error(StrCat("the Arrow stream failed: ", message == nullptr ? "no reason given" : message));
    };
    Released<ArrowSchema> schema;
    check(stream->get_schema(stream, &schema));
    for (;;) {
      Released<ArrowArray> array;
      check(stream->get_next(stream, &array));
      if (array.release == nullptr) return;
      UseArrow(schema, array, use);
    }
  }
  Texts texts;
  for (py::handle each : py::iter(object)) {
    texts.Add(each);
    if (texts.views().size() == kTextsAtATime) use(&texts);
  }
  use(&texts);
}

// Moves the memory of a vector into an array.
template <typename T>
py::array_t<T> ToArray(std::vector<T> values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  py::capsule capsule(owner.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owner.release();
  return py::array_t<T>(size, data, capsule);
}

// --- Tokenizer ---

TokenizerConfig MakeConfig(bool word_unigrams, bool word_bigrams, bool letter_trigrams, bool char_unigrams,
                           bool char_bigrams, bool number_parts, bool markers) {
  TokenizerConfig config;
  config.word_unigrams = word_unigrams;
  config.word_bigrams = word_bigrams;
  config.letter_trigrams = letter_trigrams;
  config.char_unigrams = char_unigrams;
  config.char_bigrams = char_bigrams;
  config.number_parts = number_parts;
  config.markers = markers;
  return config;
}

TokenizerConfig ParseConfig(const std::string& text) {
  TokenizerConfig config;
  RaiseIfError(TokenizerConfig::Parse(text, &config));
  return config;
}

std::string ConfigRepr(const TokenizerConfig& config) {
  const auto text = [](bool value) { return value ? "True" : "False"; };
  return StrCat("TokenizerConfig(word_unigrams=", text(config.word_unigrams),
                ", word_bigrams=", text(config.word_bigrams), ", letter_trigrams=", text(config.letter_trigrams),
                ", char_unigrams=", text(config.char_unigrams), ", char_bigrams=", text(config.char_bigrams),
                ", number_parts=", text(config.number_parts), ", markers=", text(config.markers), ")");
}

py::list Tokenize(const Tokenizer& tokenizer, py::handle text) {
  Texts texts;
  texts.Add(text);
  std::string bytes;
  std::vector<size_t> ends;
  RunReleased([&] {
    tokenizer.Tokenize(texts.views()[0], [&](std::string_view token) {
      bytes += token;
      ends.push_back(bytes.size());
    });
    return Status();
  });
  py::list tokens(ends.size());
  for (size_t i = 0, begin = 0; i < ends.size(); begin = ends[i++]) {
    tokens[i] = ToStr(std::string_view(bytes).substr(begin, ends[i] - begin));
  }
  return tokens;
}

// --- Vocabulary ---

// A VocabularyBuilder that threads may share.
class SharedBuilder {
 public:
  SharedBuilder(const TokenizerConfig& config, int num_threads, int64_t max_memory_bytes,
                const std::optional<std::filesystem::path>& temporary_directory)
      : builder_(config, {num_threads, max_memory_bytes, temporary_directory.value_or("")}) {
    RaiseIfError(builder_.status());
  }

  TokenizerConfig config() const { return builder_.config(); }

  int64_t size() const {
    int64_t size = 0;
    RunReleased([&] {
      const std::lock_guard<std::mutex> lock(mutex_);
      return builder_.NumTokens(&size);
    });
    return size;
  }

  void Add(const py::object& text) {
    if (!IsText(text)) return ForEachBatch(text, [this](Texts* texts) { Count(texts); });
    Texts texts;
    texts.Add(text);
    Count(&texts);
  }

  void AddCounts(const Vocabulary& vocabulary) {
    RunReleased([&] {
      const std::lock_guard<std::mutex> lock(mutex_);
      return builder_.AddCounts(vocabulary);
    });
  }

  void Write(const std::filesystem::path& path, int64_t min_count, std::optional<int64_t> max_size,
             int64_t num_oov_buckets) const {
    RunReleased([&] {
      const std::lock_guard<std::mutex> lock(mutex_);
      return builder_.Write(path, min_count, max_size.value_or(Vocabulary::kMaxIds), num_oov_buckets);
    });
  }

 private:
  void Count(Texts* texts) {
    RunReleased([&] {
      const std::lock_guard<std::mutex> lock(mutex_);
      return builder_.Add({texts->views().data(), texts->views().size()});
    });
    texts->Clear();
  }

  mutable std::mutex mutex_;
  VocabularyBuilder builder_;
};

std::unique_ptr<Vocabulary> OpenVocabulary(const std::filesystem::path& path, bool verify) {
  std::unique_ptr<Vocabulary> vocabulary;
  RunReleased([&] { return Vocabulary::Open(path, verify, &vocabulary); });
  return vocabulary;
}

// Returns `id` if Token() and Count() accept it. Raises IndexError otherwise.
int32_t CheckedId(const Vocabulary& vocabulary, int64_t id) {
  if (id < 0 || id >= vocabulary.size()) {
    throw py::index_error(StrCat(vocabulary.path(), ": id ", id, ", expected at least 0 and below the ",
                                 vocabulary.size(), " tokens"));
  }
  return static_cast<int32_t>(id);
}

py::array_t<int32_t> Encode(const Vocabulary& vocabulary, py::handle text) {
  Texts texts;
  texts.Add(text);
  std::vector<int32_t> ids;
  RunReleased([&] {
    vocabulary.Encode(texts.views()[0], &ids);
    return Status();
  });
  return ToArray(std::move(ids));
}

py::tuple EncodeBatch(const Vocabulary& vocabulary, const py::object& sequence) {
  if (IsText(sequence)) throw py::type_error("got one text, expected a sequence of str or bytes; use encode()");
  std::vector<int32_t> values;
  std::vector<int64_t> row_splits = {0};
  ForEachBatch(sequence, [&](Texts* texts) {
    RunReleased([&] {
      for (std::string_view text : texts->views()) {
        vocabulary.Encode(text, &values);
        row_splits.push_back(static_cast<int64_t>(values.size()));
      }
      return Status();
    });
    texts->Clear();
  });
  return py::make_tuple(ToArray(std::move(values)), ToArray(std::move(row_splits)));
}

// --- WordSequences ---

WordSequences MakeWordSequences(const Vocabulary& vocabulary) {
  RaiseIfError(WordSequences::Check(vocabulary));
  return WordSequences(vocabulary);
}

// Raises ValueError unless low <= value <= high.
void CheckRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw py::value_error(StrCat(name, " is ", value, ", expected ", low, " to ", high));
  }
}

void CheckPieces(int64_t max_pieces, int64_t num_pieces) {
  CheckRange("max_pieces", max_pieces, 1, 256);
  CheckRange("num_pieces", num_pieces, 2, std::numeric_limits<int32_t>::max());
}

// Returns an array [n, ...row_shape] of which encode(text, row) fills one row for each text.
template <typename EncodeText>
py::array_t<int32_t> EncodeRows(const py::object& sequence, std::vector<py::ssize_t> row_shape,
                                const EncodeText& encode) {
  if (IsText(sequence)) throw py::type_error("got one text, expected a sequence of str or bytes");
  size_t row_size = 1;
  for (py::ssize_t size : row_shape) row_size *= static_cast<size_t>(size);
  std::vector<int32_t> values;
  ForEachBatch(sequence, [&](Texts* texts) {
    RunReleased([&] {
      size_t row = values.size();
      values.resize(row + row_size * texts->views().size());
      for (std::string_view text : texts->views()) {
        encode(text, values.data() + row);
        row += row_size;
      }
      return Status();
    });
    texts->Clear();
  });
  row_shape.insert(row_shape.begin(), static_cast<py::ssize_t>(values.size() / row_size));
  return ToArray(std::move(values)).reshape(row_shape);
}

py::array_t<int32_t> EncodeWords(const WordSequences& sequences, const py::object& texts, int64_t max_words,
                                 bool ends) {
  CheckRange("max_words", max_words, 1, 1024);
  return EncodeRows(texts, {max_words}, [&](std::string_view text, int32_t* ids) {
    sequences.Encode(text, max_words, ends, ids);
  });
}

py::array_t<int32_t> EncodePieces(const WordSequences& sequences, const py::object& texts, int64_t max_words,
                                  int64_t max_pieces, int64_t num_pieces) {
  CheckRange("max_words", max_words, 1, 1024);
  CheckPieces(max_pieces, num_pieces);
  return EncodeRows(texts, {max_words, max_pieces}, [&](std::string_view text, int32_t* pieces) {
    sequences.EncodePieces(text, max_words, max_pieces, static_cast<int32_t>(num_pieces), pieces);
  });
}

py::array_t<int32_t> PiecesOfVocabulary(const WordSequences& sequences, int64_t max_pieces, int64_t num_pieces) {
  CheckPieces(max_pieces, num_pieces);
  std::vector<int32_t> pieces(static_cast<size_t>(sequences.num_ids() * max_pieces));
  for (int32_t id = 0; id < sequences.num_ids(); ++id) {
    PiecesOfWord(sequences.Word(id), max_pieces, static_cast<int32_t>(num_pieces), pieces.data() + id * max_pieces);
  }
  return ToArray(std::move(pieces)).reshape({static_cast<int64_t>(sequences.num_ids()), max_pieces});
}

py::list TextsOfIds(const WordSequences& sequences) {
  py::list texts(static_cast<size_t>(sequences.num_ids()));
  for (int32_t id = 0; id < sequences.num_ids(); ++id) {
    const std::string_view word = sequences.Word(id);
    std::string text = word.empty() || IsCharacter(word) ? "" : " ";
    texts[static_cast<size_t>(id)] = ToStr(text.append(word));
  }
  return texts;
}

py::list NormalTexts(const py::object& sequence) {
  if (IsText(sequence)) throw py::type_error("got one text, expected a sequence of str or bytes");
  py::list normal;
  ForEachBatch(sequence, [&](Texts* texts) {
    std::vector<std::string> found;
    RunReleased([&] {
      for (std::string_view text : texts->views()) found.push_back(NormalText(text));
      return Status();
    });
    for (const std::string& text : found) normal.append(ToStr(text));
    texts->Clear();
  });
  return normal;
}

void DefineTokenizer(py::module_* module) {
  py::class_<TokenizerConfig>(*module, "TokenizerConfig", R"(Says which kinds of tokens the tokenizer makes. Immutable.

    word_unigrams:   words of alphabetic scripts: "red"
    word_bigrams:    neighbouring words: "red shoes"
    letter_trigrams: the letter trigrams of a word, marked with '#': "##re", "#red", "#ed#"
    char_unigrams:   characters of scripts written without spaces: "手"
    char_bigrams:    neighbouring characters of such scripts: "手机"
    number_parts:    with word_unigrams, the parts of a word with letters and digits: "12mm" also gives "12", "mm"
    markers:         "<s>" and "</s>" around each text

>>> TokenizerConfig(letter_trigrams=False) == TokenizerConfig()
False)")
      .def(py::init(&MakeConfig), py::kw_only(), py::arg("word_unigrams") = true, py::arg("word_bigrams") = false,
           py::arg("letter_trigrams") = true, py::arg("char_unigrams") = true, py::arg("char_bigrams") = true,
           py::arg("number_parts") = true, py::arg("markers") = false)
      .def_readonly("word_unigrams", &TokenizerConfig::word_unigrams)
      .def_readonly("word_bigrams", &TokenizerConfig::word_bigrams)
      .def_readonly("letter_trigrams", &TokenizerConfig::letter_trigrams)
      .def_readonly("char_unigrams", &TokenizerConfig::char_unigrams)
      .def_readonly("char_bigrams", &TokenizerConfig::char_bigrams)
      .def_readonly("number_parts", &TokenizerConfig::number_parts)
      .def_readonly("markers", &TokenizerConfig::markers)
      .def("serialize", &TokenizerConfig::Serialize, "Returns lines key=value. Equal configurations give equal text.")
      .def_static("parse", &ParseConfig, py::arg("text"),
                  "Reads the text of serialize(). Raises ValueError (unknown, repeated or missing key, bad value) and\n"
                  "FormatError (a text of another version of the tokenizer).")
      .def(
          "__eq__", [](const TokenizerConfig& a, const TokenizerConfig& b) { return a == b; }, py::is_operator())
      .def("__hash__", [](const TokenizerConfig& config) { return py::hash(py::str(config.Serialize())); })
      .def("__repr__", &ConfigRepr)
      .def(py::pickle([](const TokenizerConfig& config) { return config.Serialize(); }, &ParseConfig));

  py::class_<Tokenizer>(*module, "Tokenizer",
                        R"(Turns text into tokens (DPSR paper, section 5.1.1). Immutable, thread-safe.

tokenizer_cc/tokenizer.h has the rules: NFKC and case folding; then, for alphabetic scripts, words and letter trigrams
marked with '#'; for scripts written without spaces, characters and character bigrams.

>>> Tokenizer().tokenize("Red 手机")
['red', '##re', '#red', '#ed#', '手', '机', '手机'])")
      .def(py::init<const TokenizerConfig&>(), py::arg("config") = TokenizerConfig())
      .def_property_readonly("config", [](const Tokenizer& tokenizer) { return tokenizer.config(); })
      .def("tokenize", &Tokenize, py::arg("text"),
           "Returns the tokens of a str or of UTF-8 bytes, in the order of the text. Bytes that are not UTF-8, and\n"
           "lone surrogates in a str, separate tokens.");
}

void DefineVocabularyBuilder(py::module_* module) {
  py::class_<SharedBuilder>(*module, "VocabularyBuilder", R"(Counts the tokens of a corpus and writes a vocabulary.

`num_threads` threads count; 0 means one for each core. If the counts need more than `max_memory_bytes`, they are kept
in unnamed files in `temporary_directory` (by default the system's) until write() merges them. These settings do not
change the vocabulary.

len() returns the number of distinct tokens so far. It takes about as long as write().)")
      .def(py::init<const TokenizerConfig&, int, int64_t, const std::optional<std::filesystem::path>&>(),
           py::arg("config") = TokenizerConfig(), py::kw_only(), py::arg("num_threads") = 0,
           py::arg("max_memory_bytes") = int64_t{1} << 30, py::arg("temporary_directory") = py::none())
      .def_property_readonly("config", &SharedBuilder::config)
      .def("__len__", &SharedBuilder::size)
      .def(
          "add", &SharedBuilder::Add, py::arg("text"),
          "Counts the tokens of a text, of each text of an iterable, or of each text of an Arrow array, chunked array\n"
          "or stream of strings or binary, which is read in place. A null is an empty text.")
      .def("add_counts", &SharedBuilder::AddCounts, py::arg("vocabulary"),
           "Adds the counts of a Vocabulary that another builder has written, as if this one had counted its texts.\n"
           "Write it with min_count=1 and without max_size: only tokens that it kept are added. Raises ValueError if\n"
           "its tokenizer has other switches.")
      .def("write", &SharedBuilder::Write, py::arg("path"), py::kw_only(), py::arg("min_count") = 1,
           py::arg("max_size") = py::none(), py::arg("num_oov_buckets") = 0,
           R"(Writes the tokens that were counted at least `min_count` times, at most the `max_size` most frequent ones.

Tokens get ids by descending count; tokens with equal counts, by their bytes. After them come `num_oov_buckets` hash
buckets, which all other tokens share; with 0 buckets, other tokens are dropped. Raises ValueError for invalid limits or
an empty vocabulary, and OSError if the file cannot be written.)");
}

void DefineVocabulary(py::module_* module) {
  py::class_<Vocabulary>(*module, "Vocabulary",
                         R"(A memory-mapped vocabulary file, which gives each token its id. Immutable, thread-safe.

len() returns the number of tokens. The ids [len, num_ids) are the hash buckets of unknown tokens. `verify` computes the
checksums of the whole file. Raises FileNotFoundError and FormatError.)")
      .def(py::init(&OpenVocabulary), py::arg("path"), py::kw_only(), py::arg("verify") = true)
      .def_property_readonly(
          "path", [](const Vocabulary& vocabulary) { return ToStr(vocabulary.path()); },
          "The path that the file was opened with.")
      .def_property_readonly(
          "config", [](const Vocabulary& vocabulary) { return vocabulary.config(); },
          "The TokenizerConfig of the vocabulary, which encode() uses, too.")
      .def_property_readonly("fingerprint", &Vocabulary::fingerprint,
                             "64 bits that identify the content, to check that two programs use the same vocabulary.")
      .def_property_readonly("num_oov_buckets", &Vocabulary::num_oov_buckets)
      .def_property_readonly("num_ids", &Vocabulary::num_ids,
                             "len + num_oov_buckets, the number of rows of an embedding table.")
      .def("__len__", &Vocabulary::size)
      .def(
          "token", [](const Vocabulary& v, int64_t id) { return ToStr(v.Token(CheckedId(v, id))); }, py::arg("id"),
          "Returns the token of an id in [0, len). Raises IndexError.")
      .def(
          "count", [](const Vocabulary& v, int64_t id) { return v.Count(CheckedId(v, id)); }, py::arg("id"),
          "Returns how often the token was counted. Raises IndexError.")
      .def("encode", &Encode, py::arg("text"), "Returns the ids of the tokens of a text, int32 [num_tokens].")
      .def("encode_batch", &EncodeBatch, py::arg("texts"),
           "Returns the ids of many texts, an iterable or Arrow data as in VocabularyBuilder.add, as values\n"
           "int32 [total] and row_splits int64 [num_texts + 1]. Text i has the ids\n"
           "values[row_splits[i]:row_splits[i + 1]].");
}

void DefineWordSequences(py::module_* module) {
  py::class_<WordSequences>(*module, "WordSequences",
                            R"(The words of texts in their order, over a vocabulary of words and characters.

Ids 0 to 3 are padding, unknown word, start and end; word i of the vocabulary has the id 4 + i. A piece is the hashed
trigram of a word's letters with ^ and $ at its ends. Immutable, thread-safe. Raises FormatError for a vocabulary of
other tokens, or with hash buckets.

len() returns the number of ids, with the four reserved ones.)")
      .def(py::init(&MakeWordSequences), py::arg("vocabulary"), py::keep_alive<1, 2>())
      .def_property_readonly_static("PADDING", [](const py::object&) { return int{WordSequences::kPadding}; })
      .def_property_readonly_static("UNKNOWN", [](const py::object&) { return int{WordSequences::kUnknown}; })
      .def_property_readonly_static("START", [](const py::object&) { return int{WordSequences::kStart}; })
      .def_property_readonly_static("END", [](const py::object&) { return int{WordSequences::kEnd}; })
      .def_property_readonly_static("FIRST_WORD", [](const py::object&) { return int{WordSequences::kFirstWord}; })
      .def_static("config", [] { return WordTokens(); }, "Returns the TokenizerConfig that the vocabulary must have.")
      .def("__len__", &WordSequences::num_ids)
      .def("encode", &EncodeWords, py::arg("texts"), py::kw_only(), py::arg("max_words"), py::arg("ends") = false,
           "Returns the ids of the first words of each text, an iterable or Arrow data as in VocabularyBuilder.add:\n"
           "int32 [num_texts, max_words], 0 after the last. With `ends`, END follows the last word.")
      .def("pieces", &EncodePieces, py::arg("texts"), py::kw_only(), py::arg("max_words"), py::arg("max_pieces") = 12,
           py::arg("num_pieces") = 16384,
           "Returns the pieces of the first words of each text, int32 [num_texts, max_words, max_pieces]: 1 to\n"
           "num_pieces - 1, and 0 after the last piece of a word.")
      .def("pieces_of_vocabulary", &PiecesOfVocabulary, py::kw_only(), py::arg("max_pieces") = 12,
           py::arg("num_pieces") = 16384,
           "Returns the pieces of the word of each id, int32 [len, max_pieces]; those of reserved ids are 0.")
      .def("texts", &TextsOfIds,
           "Returns the text of each id: a word after a space, a character of a script without spaces, and nothing\n"
           "for reserved ids. A sequence of ids is these texts, joined, without the space at the beginning.")
      .def_static("normal", &NormalTexts, py::arg("texts"),
                  "Returns the words of each text, joined as texts() says. Texts with equal words become equal.");
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ core of dpsr_tokenizer. Import dpsr_tokenizer, not this.";
  py::options options;
  options.disable_function_signatures();
  FormatErrorType() = py::module_::import("dpsr_common._native").attr("FormatError");
  DefineTokenizer(&m);
  DefineVocabularyBuilder(&m);
  DefineVocabulary(&m);
  DefineWordSequences(&m);
}

}  // namespace
}  // namespace dpsr
