"""A second, slow implementation of the rules in docs/tokenizer.md, in Python. Tests compare the C++ core with it.

It was written from the rules and not from tokenizer.cc, so that a mistake in either shows as a difference. Python's
Unicode version is older than utf8proc's, so code points that `unicodedata` does not know are not compared (`is_known`).
"""

from __future__ import annotations

import bisect
import re
import unicodedata

DEFAULTS = {
    "word_unigrams": True,
    "word_bigrams": False,
    "letter_trigrams": True,
    "char_unigrams": True,
    "char_bigrams": True,
    "number_parts": True,
    "markers": False,
}
# The first and last code point of each block of unspaced scripts, and whether its symbols are characters, too (Han).
UNSPACED = [
    (0x0E00, 0x0EFF, False),
    (0x1000, 0x109F, False),
    (0x1780, 0x17FF, False),
    (0x2E80, 0x2FDF, True),
    (0x3005, 0x3007, False),
    (0x3021, 0x3029, False),
    (0x3031, 0x3035, False),
    (0x3038, 0x303C, False),
    (0x3041, 0x312F, False),
    (0x31A0, 0x31BF, False),
    (0x31F0, 0x31FF, False),
    (0x3400, 0x4DBF, True),
    (0x4E00, 0x9FFF, True),
    (0xA9E0, 0xA9FF, False),
    (0xAA60, 0xAA7F, False),
    (0xF900, 0xFAFF, True),
    (0x1AFF0, 0x1B16F, False),
    (0x20000, 0x3FFFD, True),
]
STARTS = [first for first, _, _ in UNSPACED]
# Default_Ignorable_Code_Point of Unicode.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def is_known(text: str) -> bool:
    """Returns whether Python's Unicode tables contain every code point of `text`."""
    return all(unicodedata.category(c) != "Cn" for c in text)


def decode(text: bytes) -> str:
    """Decodes UTF-8. Each byte that is not valid UTF-8 becomes U+0000, a separator."""
    return re.sub("[\udc80-\udcff]", "\0", text.decode("utf-8", "surrogateescape"))


def normalise(text: str) -> str:
    """Applies Unicode's NFKC_Casefold."""
    text = IGNORABLE.sub("", unicodedata.normalize("NFD", text))
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFC", IGNORABLE.sub("", text))


def classify(c: str) -> str:
    """Returns 'letter', 'digit', 'unspaced', 'mark' or 'separator'."""
    category = unicodedata.category(c)
    if category in ("Mn", "Mc"):
        return "mark"
    is_word = category[0] == "L" or category in ("Nd", "Nl", "No")
    i = bisect.bisect(STARTS, ord(c)) - 1
    if i >= 0 and ord(c) <= UNSPACED[i][1] and (is_word or UNSPACED[i][2]):
        return "unspaced"
    return "separator" if not is_word else "digit" if category == "Nd" else "letter"


def runs(text: str) -> list[list[tuple[str, str]]]:
    """Returns the runs of normalised `text`, each as (code point, class) pairs. Separators belong to no run."""
    text = text.replace("\u2044", "/")
    classes = [classify(c) for c in text]

    def is_digit(i: int) -> bool:
        return 0 <= i < len(text) and classes[i] == "digit"

    found: list[list[tuple[str, str]]] = [[]]
    for i, (c, kind) in enumerate(zip(text, classes, strict=True)):
        run = found[-1]
        if c in ".,/" and is_digit(i - 1) and is_digit(i + 1):
            following = [is_digit(i + n) for n in (1, 2, 3, 4)]
            if c != "," or following != [True, True, True, False]:
                run.append((c, "digit"))
        elif kind == "mark":
            if run:
                run.append((c, run[-1][1]))
        elif kind == "separator":
            found.append([])
        elif run and (run[-1][1] == "unspaced") != (kind == "unspaced"):
            found.append([(c, kind)])
        else:
            run.append((c, kind))
    return [run for run in found if run]


def tokenize(text: bytes, **changes: bool) -> list[str]:
    """Returns the tokens of `text` with the default switches and `changes`."""
    on = {**DEFAULTS, **changes}
    tokens = ["<s>"] if on["markers"] else []
    found = runs(normalise(decode(text)))
    previous = "<s>" if on["markers"] else None  # the word or marker before
    for n, run in enumerate(found):
        string = "".join(c for c, _ in run)
        if run[0][1] == "unspaced":
            before = "<s>" if on["markers"] and n == 0 else ""
            for c in string:
                tokens += [c] * on["char_unigrams"] + [before + c] * (on["char_bigrams"] and before != "")
                before = c
            previous = None
        else:
            kinds = {kind for _, kind in run}
            only_digits = all(classify(c) == "digit" or c in ".,/" for c, _ in run)
            tokens += [string] * on["word_unigrams"]
            if on["word_unigrams"] and on["number_parts"] and len(kinds) == 2:
                part = ""
                for i, (c, kind) in enumerate(run):
                    if i > 0 and kind != run[i - 1][1]:
                        tokens.append(part)
                        part = ""
                    part += c
                tokens.append(part)
            tokens += [f"{previous} {string}"] * (on["word_bigrams"] and previous is not None)
            if on["letter_trigrams"] and not only_digits:
                marked = f"#{string}#"
                tokens += [f"#{marked[i : i + 3]}" for i in range(len(marked) - 2)]
            previous = string
    if on["markers"]:
        if found and found[-1][0][1] == "unspaced":
            tokens += [found[-1][-1][0] + "</s>"] * on["char_bigrams"]
        elif found:
            tokens += [f"{previous} </s>"] * on["word_bigrams"]
        tokens.append("</s>")
    return tokens
