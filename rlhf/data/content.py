"""Content of a data file: its kind, unpacked and as text, within limits of size.

A file's kind and compression are taken from its bytes; its name may be wrong.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MB = 2**20
#: Content below this size is never taken for a decompression bomb.
SMALL_MB = 64
Note = Callable[[str], None]


class MalformedError(Exception):
    """Position and reason of a fault of a whole file; the caller adds the file's name."""


@dataclass(frozen=True)
class ReadOptions:
    """Settings for reading files."""

    encoding: str | None = None
    """`data.encoding`; None: UTF-8, or UTF-16 or UTF-32 by its byte order mark."""
    delimiter: str | None = None
    """`data.delimiter` of CSV files; None: guessed from the first records."""
    max_row_mb: float = 16
    """`data.max_row_mb`: the longest line, CSV record or row of a table that is read."""
    max_mb: float = 64 * 1024
    """The most that a compressed file may unpack to."""

    @property
    def row_limit(self) -> int:
        """The longest row in characters, or bytes of a table."""
        return max(1, int(self.max_row_mb * MB))

    def too_long(self, position: str, hint: str = "") -> MalformedError:
        """Return the error for a row over the limit."""
        return MalformedError(
            f"{position}: a row of more than {self.max_row_mb:g} MB{hint}; if that is right, set "
            "data.max_row_mb to more"
        )


@contextmanager
def open_content(
    path: Path, is_named_gz: bool, options: ReadOptions, note: Note
) -> Iterator[tuple[io.BufferedIOBase, bytes]]:
    """Yield the unpacked content as a stream, and its first bytes.

    Raises:
        MalformedError: It is of a kind that is never data, or unpacks to absurdly much. Reading
            from the stream raises it too, where gzip is broken.
    """
    with io.BufferedReader(io.FileIO(path), _BUFFER) as file:
        head = file.peek()[:_HEAD]
        if not head.startswith(_GZIP):
            if head and is_named_gz:
                note("not gzip, though its name ends in .gz: read as it is")
            _refuse_foreign(head)
            yield file, head
            return
        if not is_named_gz:
            note("gzip, though its name does not end in .gz: unpacked")
        _probe_ratio(path)
        with io.BufferedReader(_Unpacked(file, options), _BUFFER) as content:
            head = content.peek()[:_HEAD]
            if head.startswith(_GZIP):
                raise MalformedError("gzip within gzip; unpack it first")
            _refuse_foreign(head)
            yield content, head


def check_ratio(unpacked: int, packed: int) -> None:
    """Refuse content that unpacks to absurdly much.

    Text shrinks 3 to 30 times. More than 200 times, and more than SMALL_MB, is a decompression
    bomb, or one row over and over.
    """
    if unpacked > SMALL_MB * MB and unpacked > 200 * packed:
        raise MalformedError(
            f"unpacks to more than 200 times its size ({packed:,} bytes hold over "
            f"{unpacked // MB:,} MB), as no real data does; if that is right, unpack it first"
        )


class Text:
    """Lines of a text file, of which none is held beyond the limit of a row.

    Args:
        newline: "" for lines that end at \\n, \\r\\n or \\r; "\\n" for \\n alone. No other
            character ends a line, and ends are kept as they are.
    """

    def __init__(
        self,
        content: io.BufferedIOBase,
        head: bytes,
        options: ReadOptions,
        note: Note,
        newline: str,
    ) -> None:
        self.options = options
        self.number = 0
        """How many lines were read."""
        self._is_line_cut = False
        self._encoding = _encoding(head, options, note)
        try:
            # Wrong bytes become surrogates, which tell the exact line and byte.
            self._stream = io.TextIOWrapper(
                content,  # pyright: ignore[reportArgumentType]
                self._encoding,
                "surrogateescape",
                newline,
            )
        except (LookupError, ValueError):
            raise MalformedError(
                f"data.encoding = {options.encoding!r} is no encoding; set one like utf-8, "
                "utf-16 or cp1252"
            ) from None

    def line(self, limit: int) -> str:
        """Return the next line, cut where it is longer than the limit; "" at the end."""
        try:
            line = self._stream.readline(limit + 1)
        except UnicodeError as error:
            raise self._undecodable(str(error), self.number + 1) from None
        self.number += 1
        self._is_line_cut = len(line) > limit
        if not line.isascii():
            self._check(line, self.number)
        return line.removeprefix("\ufeff") if self.number == 1 else line

    def lines(self) -> Iterator[str]:
        """Yield the remaining lines.

        Raises:
            MalformedError: A line is longer than a row may be, or can't be decoded.
        """
        limit = self.options.row_limit
        while line := self.line(limit):
            if len(line) > limit:
                raise self.options.too_long(f"line {self.number}")
            yield line

    def rest(self, limit: int) -> str:
        """Return the remaining text, cut where it is longer than the limit."""
        number = self.number if self._is_line_cut else self.number + 1
        parts, size = [], 0
        while size <= limit:
            try:
                part = self._stream.read(MB)
            except UnicodeError as error:
                raise self._undecodable(str(error), number) from None
            if not part:
                break
            if not part.isascii():
                self._check(part, number)
            number += part.count("\n")
            size += len(part)
            parts.append(part)
        return "".join(parts)

    def _check(self, text: str, number: int) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            number += text.count("\n", 0, error.start)
            byte = ord(text[error.start]) - 0xDC00
            begin, end = text.rfind("\n", 0, error.start) + 1, text.find("\n", error.start)
            line = text[begin : end if end >= 0 else None][:_HEAD]
            raw = line.encode(self._encoding, "surrogateescape")
            raise self._undecodable(f"byte {byte:#04x}", number, raw) from None

    def _undecodable(self, reason: str, number: int, raw: bytes = b"") -> MalformedError:
        cure = "set data.encoding to what it is written in"
        if names := [name for name in fitting_encodings(raw) if name != self.options.encoding]:
            others = f" (also possible: {', '.join(names[1:])})" if names[1:] else ""
            cure = f"set data.encoding={names[0]}, which fits this line{others}"
        cure += ", or save it as UTF-8"
        name = self._encoding.upper()
        return MalformedError(f"line {number}: not {name} ({reason}); {cure}")


def fitting_encodings(raw: bytes) -> list[str]:
    """Return encodings that decode bytes which are no UTF-8, the likeliest first; at most three."""
    from charset_normalizer import from_bytes

    found = [match.encoding for match in from_bytes(raw)] if raw else []
    # Languages of Western Europe have few letters beyond ASCII, too few for statistics.
    is_western = sum(byte >= 0x80 for byte in raw) <= max(_FEW, _WESTERN * len(raw))
    names = ["cp1252", *found, *_ENCODINGS] if is_western else [*found, *_ENCODINGS]
    known = [name for name in dict.fromkeys(names) if name in _ENCODINGS and _decodes(raw, name)]
    return known[:3] if raw else []


def _decodes(raw: bytes, encoding: str) -> bool:
    """Return whether bytes, which may end within a character, are text in an encoding."""
    try:
        codecs.getincrementaldecoder(encoding)("strict").decode(raw)
    except UnicodeError:
        return False
    return True


class _Unpacked(io.RawIOBase):
    """Content of a gzip stream."""

    def __init__(self, packed: io.BufferedIOBase, options: ReadOptions) -> None:
        self._packed, self._max_mb, self._size = packed, options.max_mb, 0
        self._gzip = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            data = self._gzip.read1(len(buffer))
        except _BROKEN_GZIP as error:
            raise MalformedError(f"broken gzip: {error}") from None
        buffer[: len(data)] = data
        self._size += len(data)
        check_ratio(self._size, self._packed.tell())
        if self._size > self._max_mb * MB:
            raise MalformedError(
                f"unpacks to more than {self._max_mb:,g} MB; if that is right, unpack it first"
            )
        return len(data)


def _probe_ratio(path: Path) -> None:
    """Unpack the beginning of a gzip file, and nothing else.

    A bomb of tiny rows would otherwise be noticed only after millions of them.
    """
    size = 0
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as content:
        try:
            while size <= SMALL_MB * MB and (data := content.read1(_BUFFER)):
                size += len(data)
                check_ratio(size, packed.tell())
        except _BROKEN_GZIP:
            return  # the rows before the fault are read first


def _refuse_foreign(head: bytes) -> None:
    """Refuse content that is never data, by its first bytes."""
    if head.startswith(b"version https://git-lfs.github.com/spec/v1"):
        raise MalformedError("a Git LFS pointer, not the data; run git lfs pull")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise MalformedError(
            "a web page was downloaded instead of the file; download it again (log in where the "
            "page asks for it)"
        )
    if head.startswith(b"PK\x03\x04") and (b"xl/" in head or b"[Content_Types].xml" in head):
        raise MalformedError("an Excel workbook; save the sheet as CSV")
    if head[257:262] == b"ustar":
        raise MalformedError("a tar archive; unpack it first")
    for magic, reason in _FOREIGN.items():
        if re.match(magic, head, re.DOTALL):
            raise MalformedError(reason)


def _encoding(head: bytes, options: ReadOptions, note: Note) -> str:
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            if name != "utf-8":
                note(f"{name.upper()}, by its byte order mark")
            # A mark says more about this file than a setting for all files of the source.
            return name
    if options.encoding is not None:
        return options.encoding
    sample = head[: len(head) & ~3]
    zeros = [sample[place::4].count(0) * 4 / (len(sample) or 1) for place in range(4)]
    if sum(zeros) > 4 * 0.98:
        raise MalformedError("nothing but NUL bytes: the file was never written out; copy it again")
    if sum(zeros) > 4 * 0.3:
        width = 32 if sum(zeros) > 4 * 0.6 else 16
        order = "be" if zeros[0] > zeros[3] else "le"
        raise MalformedError(
            f"half of its bytes or more are NUL, as in UTF-{width} without a byte order mark; set "
            f"data.encoding=utf-{width}-{order}"
        )
    return "utf-8"


_BUFFER = 64 * 1024
_HEAD = 4096
#: Encodings that are proposed, the commonest first.
_ENCODINGS = ("cp1252", "cp932", "gb18030", "big5", "cp949", "euc_jp", "cp1251", "koi8_r", "cp1250")
#: Share of bytes beyond ASCII below which a text is taken for one of Western Europe.
_WESTERN = 0.2
_FEW = 3
_GZIP = b"\x1f\x8b"
_BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
#: UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = {
    rb"PK(\x03\x04|\x05\x06)": "a zip archive; unpack it first",
    rb"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)": "compressed with bzip2; unpack it first",
    rb"\xfd7zXZ\x00": "compressed with xz; unpack it first",
    rb"\x04\x22\x4d\x18": "compressed with lz4; unpack it first",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    rb"Rar!\x1a\x07": "a rar archive; unpack it first",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Excel or Word file; save the sheet as CSV",
    rb"SQLite format 3\x00": "an SQLite database; export the table as CSV",
    # Protocols 2 to 5. No text in UTF-8 begins with this byte, and none in cp1252 with both.
    rb"\x80[\x02-\x05]": "a Python pickle, which may run code; export it as JSON lines",
    rb"\x89HDF\r\n": "an HDF5 file; export it as Parquet or JSON lines",
    rb"\x93NUMPY": "a NumPy array; export it as JSON lines",
    rb"%PDF-": "a PDF document; give a file with rows",
    rb"Obj\x01": "an Avro file; export it as Parquet or JSON lines",
    rb"FEA1": "a Feather file of version 1; write it as Parquet or Arrow",
}
