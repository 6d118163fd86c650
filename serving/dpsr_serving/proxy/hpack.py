"""HPACK (RFC 7541): the header blocks of HTTP/2.

This module exists because the proxy needs something that libraries do not offer: most calls of a connection send the
same block, which only refers to the tables, and such a block is decoded once and cached. Encoding has no state: blocks
consist of literals, which are computed once as well.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Header = tuple[bytes, bytes]
T = TypeVar("T")

TABLE_BYTES = 4096  # the default of SETTINGS_HEADER_TABLE_SIZE, which we leave as it is
LIST_BYTES = 65536  # largest size of the decoded headers of a block
_REMEMBERED = 256

# The static table of appendix A, index 1 to 61. A name alone has an empty value.
_STATIC = tuple(
    (line.partition(b" ")[0], line.partition(b" ")[2])
    for line in b""":authority
:method GET
:method POST
:path /
:path /index.html
:scheme http
:scheme https
:status 200
:status 204
:status 206
:status 304
:status 400
:status 404
:status 500
accept-charset
accept-encoding gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate""".split(b"\n")
)

# Lengths in bits of the Huffman codes of appendix B, for each byte and for the end of a string (256). The code is
# canonical: shorter codes come first, and codes of the same length are in the order of the bytes.
_CODE_BITS = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b080606060505050606060606"
    "060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e060f050605060506060605070706060605"
    "06070605050607070707070f0b0e0d1c141614141616161716171717171718171818161718171717171516171617171816151416161717151"
    "716161815161717151516151716171714161616171616171a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14"
    "181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)


class HpackError(ValueError):
    """A block that cannot be decoded. Its connection must end, because the tables of the two sides now differ."""


class Decoder(Generic[T]):
    """Decodes the blocks of one connection, in their order.

    Args:
        parse: turns the headers of a block into the result of decode(). It must depend on the headers alone: its result
            is cached for blocks that neither change the table nor hold a literal.
    """

    def __init__(self, parse: Callable[[list[Header]], T]) -> None:
        self._parse = parse
        self._table: deque[Header] = deque()  # the newest first
        self._bytes = 0
        self._limit = TABLE_BYTES
        self._known: dict[bytes, T] = {}

    def decode(self, block: bytes) -> T:
        """Returns what `parse` makes of the headers of a block. Raises HpackError."""
        known = self._known.get(block)
        if known is not None:
            return known
        headers: list[Header] = []
        plain = True
        offset, size = 0, len(block)
        while offset < size:
            byte = block[offset]
            if byte & 0x80:
                index, offset = _integer(block, offset, 0x7F)
                headers.append(self._entry(index))
                continue
            plain = False
            if byte & 0xE0 == 0x20:
                limit, offset = _integer(block, offset, 0x1F)
                if limit > TABLE_BYTES or headers:
                    raise HpackError(f"a table size of {limit} bytes is too large or comes after a header")
                self._limit = limit
                self._shrink()
                continue
            indexing = byte & 0x40
            index, offset = _integer(block, offset, 0x3F if indexing else 0x0F)
            if index:
                name = self._entry(index)[0]
            else:
                name, offset = _string(block, offset)
            value, offset = _string(block, offset)
            headers.append((name, value))
            if indexing:
                self._table.appendleft((name, value))
                self._bytes += len(name) + len(value) + 32
                self._shrink()
        if sum(len(name) + len(value) for name, value in headers) > LIST_BYTES:
            raise HpackError(f"headers of more than {LIST_BYTES} bytes")
        parsed = self._parse(headers)
        if plain and len(self._known) < _REMEMBERED:
            self._known[block] = parsed
        return parsed

    def _entry(self, index: int) -> Header:
        if 0 < index <= len(_STATIC):
            return _STATIC[index - 1]
        index -= len(_STATIC) + 1
        if not 0 <= index < len(self._table):
            raise HpackError("an index beyond the table")
        return self._table[index]

    def _shrink(self) -> None:
        """Evicts entries above the size limit, and clears the cache. Called after every change of the table."""
        self._known.clear()
        while self._bytes > self._limit:
            name, value = self._table.pop()
            self._bytes -= len(name) + len(value) + 32


def encode(headers: Iterable[Header]) -> bytes:
    """Returns a block of literals that do not enter the table."""
    return b"".join([literal(name, value) for name, value in headers])


@functools.lru_cache(4096)
def literal(name: bytes, value: bytes) -> bytes:
    """Returns one header as a literal. The name must be in lower case."""
    return b"\0" + _prefixed(len(name)) + name + _prefixed(len(value)) + value


def _prefixed(value: int) -> bytes:
    """Returns the length of a string without Huffman coding: an integer with a 7-bit prefix, the eighth bit zero."""
    if value < 0x7F:
        return bytes((value,))
    out = bytearray((0x7F,))
    value -= 0x7F
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(block: bytes, offset: int, mask: int) -> tuple[int, int]:
    """Returns the integer that begins in the low bits of a byte, and the offset after it."""
    value = block[offset] & mask
    offset += 1
    if value < mask:
        return value, offset
    for shift in range(0, 29, 7):
        if offset >= len(block):
            break
        byte = block[offset]
        offset += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise HpackError("a number is too long or cut off")


def _string(block: bytes, offset: int) -> tuple[bytes, int]:
    if offset >= len(block):
        raise HpackError("a string is cut off")
    coded = block[offset] & 0x80
    length, offset = _integer(block, offset, 0x7F)
    end = offset + length
    if end > len(block):
        raise HpackError("a string is cut off")
    text = block[offset:end]
    return (_decode_huffman(text) if coded else text), end


@functools.lru_cache(4096)
def _decode_huffman(text: bytes) -> bytes:
    symbols = _symbols()
    out = bytearray()
    code, bits = 0, 0
    for byte in text:
        for shift in range(7, -1, -1):
            code = code << 1 | byte >> shift & 1
            bits += 1
            symbol = symbols.get((bits, code))
            if symbol is not None:
                if symbol == 256:
                    raise HpackError("the end-of-string code inside a string")
                out.append(symbol)
                code, bits = 0, 0
            elif bits > 30:
                raise HpackError("not a Huffman code")
    if bits > 7 or code != (1 << bits) - 1:
        raise HpackError("a Huffman code is cut off")
    return bytes(out)


@functools.cache
def _symbols() -> dict[tuple[int, int], int]:
    """Returns the Huffman table: (bits, code) -> byte, or 256 for the end of a string."""
    symbols: dict[tuple[int, int], int] = {}
    code = last = 0
    for bits, symbol in sorted((bits, symbol) for symbol, bits in enumerate(_CODE_BITS)):
        code <<= bits - last
        symbols[bits, code] = symbol
        code, last = code + 1, bits
    return symbols
