"""Personal data in text: addresses, phone numbers, cards and bank accounts, by form and checksum.

| kind | form | check |
|---|---|---|
| email | RFC 5321 lengths, also in other scripts | a country's or a common top-level domain |
| iban | ISO 13616, grouped or not | country's length, remainder 1 modulo 97 (ISO 7064) |
| card | 14 to 19 digits, grouped or not | issuer's prefix and length, Luhn (ISO/IEC 7812) |
| ip | IPv4, IPv6 | neither private, loopback nor reserved, no version number |
| phone | `+`, `00`, North American, or after a word such as tel | numbering plan of the country |

Names and postal addresses are not recognised: they have no form that could be checked. Examples'
values (`jane@example.com`, 555 numbers, 203.0.113.7) count, as they stand where somebody's would.

All patterns start at a fixed character or a digit and read a bounded number of characters, so that
the time is linear in the text's length, whatever the text is."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Position of personal data in a text."""

    start: int
    end: int
    kind: str


#: Kinds, the first of which wins where spans overlap.
KINDS = ("email", "iban", "card", "ip", "phone")

#: Redaction passes: a replaced value can free its neighbour, as in `+4930…+4930…`.
_PASSES = 4

_SPACE = " \u00a0\u2009\u202f"
_DASH = "\\-\u2010\u2011\u2013"

#: Four digits with at most three other characters between them.
_DENSE = re.compile(r"[0-9](?:[^\w\n]{0,3}[0-9]){3}")

#: What may stand between the digits of a number, as bytes of UTF-8. A character that shares bytes
#: with one of these only brings digits closer together.
_BETWEEN = (_SPACE + "-\u2010\u2011\u2013()./").encode()
#: Classes of bytes: digits are 0, capital letters A, all others themselves.
_CLASSES = bytes.maketrans(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0" * 10 + b"A" * 26)

#: From the `@`: up to eight labels and a top-level domain.
_DOMAIN = re.compile(r"@(?<=[\w+'%-]@)((?:[^\W_][\w-]{0,62}\.){1,8})([^\W\d_]{2,24})(?![\w-])")
#: Local part, read backwards from the `@`: 64 characters at most (RFC 5321).
_LOCAL = re.compile(r"[\w+'%-](?:[\w.+'%-]{0,63})")
#: Top-level domains beside those of countries. With any word, `h@self.weight` would be an address.
_TLD_NAMES = """
com org net edu gov mil int info biz name pro aero coop museum mobi jobs travel tel cat asia app
dev online site tech store shop club xyz top live life world today email cloud agency company
digital network solutions systems group team work works space website blog design studio media news
academy education university school health care clinic dental law legal finance bank insurance
consulting engineering energy eco earth green house realty berlin london paris nyc tokyo amsterdam
wien hamburg koeln bayern swiss scot wales quebec sydney africa global international foundation
social community support services software page example test invalid
"""
_TLDS = frozenset(_TLD_NAMES.split())
#: Two-letter suffixes of code and files that are no countries' domains in practice.
_NO_TLDS = frozenset({"js", "ts", "md", "go", "py", "rb", "rs", "sh", "pl", "cc", "fc"})

#: Lengths of IBANs by country. Source: SWIFT, IBAN Registry.
_IBAN_COUNTRIES = {
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE",
    31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
_IBAN_LENGTHS = {c: length for length, names in _IBAN_COUNTRIES.items() for c in names.split()}
_IBAN = re.compile(rf"[A-Z](?<!\w.)[A-Z][0-9]{{2}}(?:[{_SPACE}{_DASH}]?[A-Z0-9]){{11,30}}")

_CARD = re.compile(
    rf"[2-6](?<![\w.+][2-6])(?:[0-9]{{13,18}}"
    rf"|[0-9]{{3}}([{_SPACE}{_DASH}])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}(?:\1[0-9]{{3}})?"
    rf"|[0-9]{{3}}([{_SPACE}{_DASH}])[0-9]{{6}}\2[0-9]{{4,5}})(?![\w])"
)
#: Issuers' prefixes (first and last, of one length), and lengths of their numbers: Visa,
#: Mastercard, American Express, Discover, Diners Club, JCB, UnionPay, Maestro, Mir. Visa's of 13
#: digits are gone, and would take one in ten German article numbers (EAN).
_ISSUERS = (
    ("4", "4", (16, 19)), ("51", "55", (16,)), ("2221", "2720", (16,)),
    ("34", "34", (15,)), ("37", "37", (15,)),
    ("6011", "6011", (16, 19)), ("644", "649", (16, 19)), ("65", "65", (16, 19)),
    ("300", "305", (14,)), ("36", "36", (14,)), ("38", "39", (14,)),
    ("3528", "3589", (16,)), ("62", "62", (16, 17, 18, 19)),
    ("5018", "5018", (16,)), ("5020", "5020", (16,)), ("5038", "5038", (16,)),
    ("6304", "6304", (16,)), ("6759", "6759", (16,)), ("6761", "6763", (16,)),
    ("2200", "2204", (16,)),
)  # fmt: skip

_IPV4 = re.compile(r"[0-9](?<![\w.+-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")
#: Global unicast addresses alone: they begin with 2 or 3 (RFC 4291).
_IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:])")
#: The first group, found from its colon: texts hold more digits than colons.
_IPV6_HEAD = re.compile(r":(?<=[23][0-9A-Fa-f]{3}:)")
_EXAMPLE_NETWORKS = [
    ipaddress.ip_network(n)
    for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
]
_VERSION = re.compile(
    r"(?i)(?:\b(?:v|ver|versions?|release|build|firmware|section|chapter|clause|step|rev|oid)\.?"
    r"[\s:=#]*|[a-z0-9]/|§\s*)$"
)
#: Numbers below this in all four places are a section or a version: 1.2.3.4.
_SMALL_OCTET = 20

_PHONE_SEPARATOR = rf"[{_SPACE}{_DASH}().\/]"
_DIGITS = re.compile(rf"[0-9](?<!\w.)(?:{_PHONE_SEPARATOR}{{0,3}}[0-9]){{6,16}}(?!\w)")
_NORTH_AMERICAN = re.compile(
    rf"(?:1[{_SPACE}{_DASH}.]{{1,2}}\(?)?[2-9][0-9]{{2}}\)?[{_SPACE}{_DASH}.\/]{{1,2}}[0-9]{{3}}"
    rf"[{_SPACE}{_DASH}.][0-9]{{4}}(?!{_PHONE_SEPARATOR}?[0-9])"
)
_PHONE_WORD = re.compile(
    r"(?i)\b(?:tel|telephone|phone|cellphone|mobile|cell|fax|whatsapp|sms|call|telefon|telefono|"
    r"teléfono|telefone|téléphone|tél|handy|mobil|móvil|celular|cellulare|portable|rufnummer)\b"
    r"(?:\s+(?:number|numbers|no|nr|is|me|us|him|her|at|on|under|unter|al|au))*[\s.:#=]*\(?$"
)
_DATE = re.compile(
    r"(?:[12][0-9]{3}[-./ ][0-9]{1,2}[-./ ][0-9]{1,2}"
    r"|[0-9]{1,2}[-./ ][0-9]{1,2}[-./ ][12][0-9]{3})(?![0-9])"
)


def find_personal_data(text: str) -> list[Span]:
    """Return the personal data in a text, in order and without overlaps."""
    found: list[Span] = []
    if "@" in text:
        found += _emails(text)
    # Of eight groups, or of fewer and "::".
    if _IPV6_HEAD.search(text) and ("::" in text or text.count(":") >= 7):
        found += _ipv6(text)
    # Digits without what may stand between them: few texts hold enough of them in a row. To a
    # pattern every digit is a beginning, so that it takes two to five times as long.
    classes = text.encode("utf-8", "surrogatepass").translate(_CLASSES, _BETWEEN)
    if b"AA00" in classes and _DENSE.search(text) and _count_digits(text) >= 12:
        found += _ibans(text)
    if b"00000" in classes:  # an address whose numbers are all below 10 is a version
        if b"00000000000000" in classes:
            found += _cards(text)
        if text.count(".") >= 3:
            found += _ipv4(text)
        if b"0000000" in classes:  # a local phone number
            found += _phones(text)
    return _without_overlaps(found) if len(found) > 1 else found


def redact_text(text: str) -> tuple[str, frozenset[str]]:
    """Replace personal data by placeholders such as `[EMAIL]`; return the kinds as well.

    Raises:
        ValueError: Values are so entangled that some are left.
    """
    kinds: set[str] = set()
    for _ in range(_PASSES):
        spans = find_personal_data(text)
        if not spans:
            return text, frozenset(kinds)
        kinds.update(span.kind for span in spans)
        parts, position = [], 0
        for start, end, kind in spans:
            parts += [text[position:start], f"[{kind.upper()}]"]
            position = end
        text = "".join([*parts, text[position:]])
    if find_personal_data(text):
        raise ValueError("personal data can't be separated")
    return text, frozenset(kinds)


def redact_value(value: Any) -> tuple[Any, frozenset[str]]:
    """Replace personal data in the text of a JSON value, its keys included; return the kinds.

    Raises:
        ValueError: Values are so entangled that some are left.
        RecursionError: The value is nested too deeply.
    """
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, int) and len(digits := str(value)) >= 12:  # a card
        text, kinds = redact_text(digits)
        return (text, kinds) if kinds else (value, kinds)
    if isinstance(value, list | tuple):
        items = [redact_value(item) for item in value]
        return [item for item, _ in items], frozenset().union(*(kinds for _, kinds in items))
    if isinstance(value, dict):
        found: set[str] = set()
        result: dict[str, Any] = {}
        for key, item in value.items():
            name, in_key = redact_text(str(key))
            while name in result:
                name += "'"
            result[name], in_item = redact_value(item)
            found |= in_key | in_item
        return result, frozenset(found)
    return value, frozenset()


def _without_overlaps(spans: list[Span]) -> list[Span]:
    """Keep the first kind of KINDS where spans overlap; the result is in order."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, KINDS.index(s.kind))):
        if kept and span.start < kept[-1].end:
            if KINDS.index(span.kind) < KINDS.index(kept[-1].kind):
                # Both go, but no character of the other may stay readable.
                kept[-1] = Span(kept[-1].start, max(span.end, kept[-1].end), span.kind)
            else:
                kept[-1] = kept[-1]._replace(end=max(span.end, kept[-1].end))
        else:
            kept.append(span)
    return kept


def _emails(text: str) -> Iterator[Span]:
    for match in _DOMAIN.finditer(text):
        tld = match[2].lower()
        is_country = len(tld) == 2 and tld not in _NO_TLDS
        if not (is_country or tld in _TLDS or not tld.isascii()):
            continue
        at = match.start()
        local = _LOCAL.match(text[max(at - 65, 0) : at][::-1])
        if local is None or len(local[0]) > 64:
            continue
        name = local[0][::-1].lstrip(".'")
        # git@host:path is how a repository is addressed.
        if name and name != "git":
            yield Span(at - len(name), match.end(), "email")


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        if length is None:
            continue
        end, characters = match.start(), []
        while len(characters) < length and end < match.end():
            if text[end].isalnum():
                characters.append(text[end])
            end += 1
        is_whole = not (end < len(text) and (text[end].isalnum() or text[end] == "_"))
        if len(characters) == length and is_whole and _mod_97("".join(characters)) == 1:
            yield Span(match.start(), end, "iban")


def _mod_97(iban: str) -> int:
    """Return the remainder of ISO 7064: letters are 10 to 35, the first four come last."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        number = _only_digits(match[0])
        if _is_card(number):
            yield Span(match.start(), match.end(), "card")
        elif len(number) == 19 and match[1] and _is_card(number[:16]):
            yield Span(match.start(), match.end() - 4, "card")  # the code of three digits behind it


def _is_card(number: str) -> bool:
    if len(set(number)) == 1:
        return False
    return (
        any(
            first <= number[: len(first)] <= last and len(number) in lengths
            for first, last, lengths in _ISSUERS
        )
        and luhn_sum(number) % 10 == 0
    )


def luhn_sum(number: str) -> int:
    """Return the sum of the digits, every second one from the right doubled (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * int(c), 10)) for c in number[-2::-2])
    return sum(int(c) for c in number[-1::-2]) + sum(doubled)


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        octets = match[0].split(".")
        if all(int(octet) < _SMALL_OCTET for octet in octets):
            continue
        if _VERSION.search(text[max(match.start() - 16, 0) : match.start()]):
            continue
        if _is_somebodys(match[0]):
            yield Span(match.start(), match.end(), "ip")


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        if _is_somebodys(match[0]):
            yield Span(match.start(), match.end(), "ip")


def _is_somebodys(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_example = any(parsed in network for network in _EXAMPLE_NETWORKS)
    return is_example or (parsed.is_global and not parsed.is_multicast)


def _phones(text: str) -> Iterator[Span]:
    end = 0
    for match in _DIGITS.finditer(text):
        start = match.start()
        if start < end:
            continue
        span = (
            _international(text, match) or _north_american(text, start) or _announced(text, match)
        )
        if span:
            end = span.end
            yield span


def _international(text: str, match: re.Match[str]) -> Span | None:
    """Return a number with its country code; what follows it after a separator is no part of it."""
    start, number = match.start(), match[0]
    if text[max(start - 1, 0) : start] == "+":
        if start > 1 and text[start - 2].isalnum():  # x+4930123456
            return None
        start -= 1
    elif number.startswith("00") and number[2] != "0" and not number.isdigit():
        number = number[2:]
    else:
        return None
    end = match.end()
    for _ in range(4):
        digits = _only_digits(number)
        if _is_valid_phone(digits):
            return Span(start, end, "phone")
        shorter = number.rstrip("0123456789").rstrip(_SPACE + "-\u2010\u2011\u2013()./")
        end -= len(number) - len(shorter)
        number = shorter
    return None


def _north_american(text: str, start: int) -> Span | None:
    match = _NORTH_AMERICAN.match(text, start)
    before = text[max(start - 2, 0) : start]
    if match is None or before[-1:] in {"$", "€", "£", "#", "-", "."}:
        return None
    digits = _only_digits(match[0])[-10:]
    if not _is_valid_phone("1" + digits):
        return None
    return Span(start - (before[-1:] == "(" and ")" in match[0]), match.end(), "phone")


def _announced(text: str, match: re.Match[str]) -> Span | None:
    """Return a number that follows a word such as tel; its country is not known."""
    if not _PHONE_WORD.search(text[max(match.start() - 40, 0) : match.start()]):
        return None
    count = len(_only_digits(match[0]))
    if count > 15 or _DATE.match(match[0]):  # E.164
        return None
    return Span(match.start(), match.end(), "phone")


def _is_valid_phone(digits: str) -> bool:
    """Return whether the numbering plan of its country has such a number; 555 stands for one."""
    import phonenumbers  # 0.1 s, which texts without numbers need not spend

    if digits.startswith("1555") and len(digits) == 11:
        return True
    if not 8 <= len(digits) <= 15:  # E.164
        return False
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse("+" + digits))
    except phonenumbers.NumberParseException:
        return False


def _count_digits(text: str) -> int:
    return sum(map(text.count, "0123456789"))


def _only_digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))
