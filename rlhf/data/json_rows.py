"""Records of JSON: lines of objects, and the layouts of rows within one document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from rlhf.data.content import MB, MalformedError, Note, Text
from rlhf.data.records import Record

#: The longest document that is loaded; its objects take several times the memory.
DOCUMENT_MB = 2048


def json_records(text: Text, name: str, is_document: bool, note: Note) -> Iterator[Record]:
    """Yield one record per line, or per row of a document.

    Args:
        is_document: Whether the name promises a document. Each is read as the other where the
            content says so: many tools write lines into .json files.

    Raises:
        MalformedError: A line is too long, or a document is broken or of unknown layout.
    """
    ahead = _read_ahead(text)
    if not _is_document([line for _, line in ahead], is_document, text.options.row_limit):
        if ahead and len(ahead[-1][1]) > text.options.row_limit:
            raise text.options.too_long(f"line {ahead[-1][0]}")
        numbered = chain(ahead, ((text.number, line) for line in text.lines()))
        yield from _lines(numbered, name)
        return
    if not is_document:
        kind = "array" if ahead[0][1].lstrip().startswith("[") else "document"
        note(f"a JSON {kind}, though its name says one object per line")
    decoder = _Decoder()
    document = decoder.document(_whole(ahead, text))
    yield from _rows(_items(document, note), name, decoder)


def _read_ahead(text: Text) -> list[tuple[int, str]]:
    """Return the first two lines that are not blank, with their numbers.

    A line over the limit is cut, and the last.
    """
    limit = text.options.row_limit
    found: list[tuple[int, str]] = []
    while len(found) < 2 and (line := text.line(limit)):
        if not line.isspace():
            found.append((text.number, line))
        if len(line) > limit:
            break
    return found


def _is_document(lines: list[str], is_named_so: bool, limit: int) -> bool:
    """Return whether a file with these first lines is one document."""
    if not lines:
        return False
    first = lines[0].strip()
    is_array, is_object = first[0] == "[", first[0] == "{"
    if len(first) > limit:
        return is_array or (is_named_so and is_object)
    if len(lines) == 1:
        # In a file of lines a single object is a row, and so is a list that holds no objects.
        is_data = is_named_so and (is_array or is_object or _is_whole(first))
        return is_data or re.match(r"\[\s*[{\]]", first) is not None
    if is_array:
        return _goes_on(first) or (is_named_so and not _is_whole(first))
    # A row that was cut is followed by a whole one.
    return is_object and _goes_on(first) and (first[-1] in "[{" or not _is_whole(lines[1]))


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # a number that is too long, or nesting that is too deep
    return True


def _goes_on(line: str) -> bool:
    """Return whether JSON that begins in this line ends in a later one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        pass
    return False


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Return whether a document ends where more must follow, so that nothing in it is wrong."""
    if error.msg.startswith("Unterminated string"):
        return True
    if len(text.rstrip()) > error.pos + 20:
        return False
    rest = text[error.pos :].rstrip()
    if error.msg.startswith("Invalid \\"):
        return re.fullmatch(r'[^"]{0,6}', rest) is not None
    return _CUT.fullmatch(rest) is not None


def _whole(ahead: list[tuple[int, str]], text: Text) -> str:
    """Return the document, with the lines that were read ahead at their places."""
    parts, number = [], 1
    for line_number, line in ahead:
        parts += ["\n" * (line_number - number), line]
        number = line_number + 1
    parts.append("\n" * (text.number + 1 - number))
    parts.append(text.rest(DOCUMENT_MB * MB))
    whole = "".join(parts)
    if len(whole) > DOCUMENT_MB * MB:
        raise MalformedError(
            f"a JSON document of more than {DOCUMENT_MB:,} MB; write it as JSON lines, which are "
            "streamed"
        )
    return whole


class _RepeatedKey(dict[str, Any]):
    """An object in which a key occurs twice."""

    fault = ""


class _LongNumber:
    """An integer with more digits than Python converts."""

    fault = "a number with too many digits"


class _Decoder:
    """JSON decoder that finds repeated keys, of which Python would keep the last."""

    def __init__(self) -> None:
        self.found_faults = False
        """Whether anything decoded so far holds a value with a `fault`."""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode: Callable[[str], Any] = self._decoder.decode

    def document(self, text: str) -> Any:
        """Return a document, with marks in place of values that can't be read."""
        try:
            try:
                return self.decode(text)
            except json.JSONDecodeError:
                raise
            except ValueError:
                marking = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)
                return marking.decode(text)
        except json.JSONDecodeError as error:
            position = f"line {error.lineno}, column {error.colno}"
            if _is_cut(text, error):
                raise MalformedError(
                    f"{position}: the file ends within the JSON that it holds; it was cut off, so "
                    "copy or download it again"
                ) from None
            raise MalformedError(f"{position}: not JSON ({error.msg})") from None
        except RecursionError:
            raise MalformedError("JSON that is nested too deep; flatten it") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        self.found_faults = True
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        marked = _RepeatedKey(found)
        marked.fault = f"key {repeated[:80]!r} occurs twice"
        return marked

    def _integer(self, digits: str) -> int | _LongNumber:
        try:
            return int(digits)
        except ValueError:
            self.found_faults = True
            return _LongNumber()


def _lines(numbered: Iterator[tuple[int, str]], name: str) -> Iterator[Record]:
    decoder = _Decoder()
    decode = decoder.decode
    for number, line in numbered:
        if line in ("\n", "\r\n"):
            continue  # decoding would find it too, but at the price of an exception
        row = None
        try:
            row = decode(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            if line.isspace():
                continue
            fault = f"column {error.colno}: not JSON ({error.msg})"
        except RecursionError:
            fault = "JSON that is nested too deep"
        except ValueError:
            fault = _LongNumber.fault
        else:
            fault = "" if row.__class__ is dict else _fault(row)
            if decoder.found_faults:
                fault = fault or _deep_fault(row)
                decoder.found_faults = False
        if fault:
            yield Record(name, number, None, fault, line[:500].strip())
        else:
            yield Record(name, number, row)


def _rows(items: Iterator[Any] | list[Any], name: str, decoder: _Decoder) -> Iterator[Record]:
    for number, row in enumerate(items, start=1):
        fault = _fault(row) or (_deep_fault(row) if decoder.found_faults else "")
        if fault:
            text = json.dumps(row, ensure_ascii=False, default=lambda _: "…")[:500]
            yield Record(name, number, None, fault, text)
        else:
            yield Record(name, number, row)


def _fault(row: Any) -> str:
    if isinstance(row, dict):
        return getattr(row, "fault", "")
    return f"{_TYPES.get(type(row), 'a value')}, not an object with named fields"


def _deep_fault(value: Any) -> str:
    """Return the fault of any value within a row."""
    if fault := getattr(value, "fault", ""):
        return fault
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((fault for each in inner if (fault := _deep_fault(each))), "")


def _items(document: Any, note: Note) -> Iterator[Any] | list[Any]:
    """Return the rows of a document, whatever its layout."""
    if isinstance(document, list):
        if document and isinstance(document[0], list):
            raise MalformedError(f"rows are lists without column names; {_CURE}")
        return document
    if not isinstance(document, dict):
        raise MalformedError(f"{_TYPES.get(type(document), 'a value')}, not rows; {_CURE}")
    if isinstance(document, _RepeatedKey):
        raise MalformedError(f"{document.fault}; keep one")
    served: Any = document.get("rows")
    if _all(served, dict) and all({"row", "row_idx"} <= item.keys() for item in served):
        total = document.get("num_rows_total")
        part = f", {len(served):,} of {total:,}" if isinstance(total, int) else ""
        note(f"rows are under 'row' of 'rows', as the hub's server sends them{part}")
        return [item["row"] for item in served]
    columns: Any = document.get("columns")
    data: Any = document.get("data")
    if _all(columns, str) and _all(data, list):
        note("rows are lists under 'data', with their names under 'columns'")
        return _split(columns, data)
    wrapped = [key for key, value in document.items() if _are_rows(value)]
    wrapped = wrapped or [key for key in _WRAPPERS if document.get(key) == []]
    if len(wrapped) > 1:
        keys = ", ".join(repr(key[:40]) for key in wrapped[:9])
        raise MalformedError(f"rows are under several keys: {keys}; keep one of them in the file")
    if wrapped:
        note(f"rows are under {wrapped[0][:80]!r}")
        return document[wrapped[0]]
    return _columns(document, note)


def _columns(document: dict[str, Any], note: Note) -> Iterator[Any] | list[Any]:
    """Return the rows of a document of columns, or of a single row."""
    values = list(document.values())
    if not values:
        return []
    if all(isinstance(value, list) and not _are_messages(value) for value in values):
        sizes = {key: len(value) for key, value in document.items()}
        if len(set(sizes.values())) > 1:
            text = ", ".join(f"{key[:40]!r} {size:,}" for key, size in list(sizes.items())[:9])
            raise MalformedError(f"columns of unequal length ({text}); mend the file")
        note("columns are lists")
        return (dict(zip(document, row, strict=True)) for row in zip(*values, strict=True))
    if all(isinstance(value, dict) and value and _are_numbers(value) for value in values):
        index = list(values[0])
        for key, column in document.items():
            if column.keys() != values[0].keys():
                raise MalformedError(
                    f"column {key[:80]!r} has other row numbers than {next(iter(document))[:80]!r};"
                    " mend the file"
                )
        note("columns are objects by row number")
        return ({key: column[row] for key, column in document.items()} for row in index)
    if _are_numbers(document) and all(isinstance(value, dict) for value in values):
        note("rows are objects by row number")
        return values
    return [document]


def _split(names: list[str], rows: list[list[Any]]) -> Iterator[Any]:
    for name in names:
        if names.count(name) > 1:
            raise MalformedError(f"two columns are named {name[:80]!r}; rename one")
    # A row of another length stays a list, which is a fault of that row only.
    return (dict(zip(names, row, strict=True)) if len(row) == len(names) else row for row in rows)


def _are_rows(value: Any) -> bool:
    return _all(value, dict) and not _are_messages(value)


def _are_messages(value: list[Any]) -> bool:
    """Return whether a list is a conversation: a value of one row, not rows."""
    return _all(value, dict) and all({"role", "from"} & item.keys() for item in value)


def _are_numbers(keys: dict[str, Any]) -> bool:
    return all(key.isdigit() for key in keys)


def _all(value: Any, kind: type) -> bool:
    """Return whether a value is a list that holds this type alone."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, kind) for x in value)


#: Keys that hold rows, of which an empty list is a data set without rows.
_WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records")
#: Beginnings of a value, with nothing behind.
_CUT = re.compile(
    r"|-|\.|\.?[eE][-+]?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|N(?:a)?"
    r"|-?I(?:n(?:f(?:i(?:n(?:it?)?)?)?)?)?"
)
_CURE = "write an array of objects with named fields"
_TYPES = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
