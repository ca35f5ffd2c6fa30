"""Personal data: recognised by form and checksum, few false alarms, any text."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.data import personal
from rlhf.data.personal import KINDS, Span, find_personal_data, luhn_sum, redact_text, redact_value
from tests.examples import examples

# Sentences with each value between « and », and the value's kind before a colon.
LABELLED = """
Write to «email:jane.doe@example.com» before noon.
My addresses are «email:a.b+news@mail.example.co.uk» and «email:x_1@uni-bonn.de».
From: Jo <«email:jo@firma.example»>
mailto:«email:info@hippo.org»?subject=hi
Frag «email:jürgen@müller.de», er weiß es.
Follow @«email:ann@mastodon.social» there.
{"user": "«email:k.lee@corp.io»", "id": 7}
Sincerely, Bob\n«email:BOB@BIGFIRM.COM».
Her card is «card:4111 1111 1111 1111», valid until 12/29.
Pay with «card:5500000000000004» today.
Amex «card:3782 822463 10005» please.
number=«card:6011-1111-1111-1117» cvv=123
«card:4242 4242 4242 4242» 123 is what I typed.
Send it to «iban:DE89 3704 0044 0532 0130 00» by Friday.
IBAN: «iban:GB82WEST12345698765432».
«iban:FR14 2004 1010 0505 0001 3M02 606» is the account in Lyon.
Konto «iban:NO93 8601 1117 947» in Oslo.
MT: «iban:MT84MALT011000012345MTLCAST001S»
The request came from «ip:203.0.113.7» at night.
ssh root@«ip:91.198.174.192» -p 22
http://«ip:198.51.100.23»:8080/admin
Blocked «ip:2001:db8:85a3::8a2e:370:7334» and «ip:2a02:8108:50bf:a5c:1d2:3ff:fe00:1234».
Call «phone:+49 30 901820» tomorrow.
Call +«phone:» now.
My number is «phone:+1 (212) 555-0123» or «phone:(212) 555-0199».
Ring «phone:0044 20 7946 0958» from abroad.
«phone:212-555-0123»; «phone:650.636.4884»; «phone:1-800-356-9377»
Reach Ann at «phone:555-123-4567» after six.
tel: «phone:030 901820»
Mobile «phone:07700 900123», ask for Sam.
Tél. «phone:06 12 34 56 78»
WhatsApp me at «phone:+91 98765 43210» 3 times.
«phone:+33 6 12 34 56 78», «phone:+7 916 123-45-67», «phone:+86 138 0013 8000»
Phone: «phone:555-0199»
Her mail «email:eve@web.de» and phone «phone:+4915112345678» leaked.
""".replace("\nCall +«phone:» now.", "")

CLEAN = """
Version 4.18.2.1 replaces v1.2.3.4 and Chrome/91.0.4472.124; see release 10.20.30.40.
See section 1.2.3.4 and 4.1.2.10.3.
Ping 127.0.0.1, 192.168.1.20, 10.0.0.5, 172.16.8.1, 0.0.0.0, 255.255.255.0, 169.254.1.1 and 8.8.8.8.
On 2024-01-15 12:30:45 and 15/01/2024, 15.01.2024; from 1990-1995 to 2010 - 2015.
It costs $1,234,567.89 or 1.234.567,89 € or 300-400-5000 yen; 12 000 000 in all.
pi is 3.14159265358979323846 and e is 2.718281828459045.
def f(x): return h@self.weight + x@W.T  # @app.route("/a")
git clone git@github.com:owner/name.git; npm i left-pad@1.3.0 icon@2x.png @scope/package
std::vector<int> a::b ::1 fe80::1 ff02::1 12:34:56 00:1A:2B:3C:4D:5E dead:beef
The ISBN is 978-3-16-148410-0, the order 1234567812345678, the card 4111 1111 1111 1112.
Not an account: DE89 3704 0044 0532 0130 01; nor XX89370400440532013000.
sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
uuid 123e4567-e89b-12d3-a456-426614174000, timestamp 1700000000, 1700000000000
1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; 0000 0000 0000 0000
x+12345678901 and a = b +1000000000000; 1+1 = 2; 2 ** 64 = 18446744073709551616
Call 911, 112 or call 2024-01-15; room 1204; 60-90-120 minutes; ages 20-30-40.
| 100 200 300 | 400 500 600 | 700 800 900 |
Rates: 200.300.4000 and 5 x 10 x 2000; phone model 3310, iPhone 15 2023.
Write "at" as @ and never @ alone, a@b, @@, user@localhost, me@.com, x@y.z
$212-555-0123 is no price, nor is 6.022e23 or 1e-10; #2125550123
"""


def _labelled() -> list[tuple[str, list[Span]]]:
    examples = []
    for line in LABELLED.strip().split("\n"):
        text, spans = "", []
        for part in re.split(r"(«[a-z]+:[^»]*»)", line):
            if part.startswith("«"):
                kind, _, value = part[1:-1].partition(":")
                spans.append(Span(len(text), len(text) + len(value), kind))
                text += value
            else:
                text += part
        examples.append((text, spans))
    return examples


def test_every_kind_of_the_labelled_sentences_is_found_and_nothing_else():
    found, expected = Counter(), Counter()
    for text, spans in _labelled():
        assert find_personal_data(text) == spans, text
        expected.update(span.kind for span in spans)
        found.update(span.kind for span in find_personal_data(text))
    assert found == expected
    assert set(expected) == set(KINDS)
    assert min(expected.values()) >= 5


@pytest.mark.parametrize("line", CLEAN.strip().split("\n"))
def test_numbers_of_other_meaning_are_left_alone(line: str):
    assert find_personal_data(line) == []


@given(
    st.sampled_from(["4", "51", "2221", "37", "6011", "3530", "62"]), st.data(), st.booleans()
)  # fmt: skip
def test_cards_are_found_and_one_wrong_digit_hides_them(prefix: str, data, grouped: bool):
    length = 15 if prefix == "37" else 16
    body = prefix + data.draw(
        st.text("0123456789", min_size=length - 1 - len(prefix), max_size=length - 1 - len(prefix))
    )
    number = next(body + d for d in "0123456789" if luhn_sum(body + d) % 10 == 0)
    groups = (4, 10, 15) if length == 15 else (4, 8, 12, 16)
    shown = number
    if grouped:
        shown = " ".join(number[a:b] for a, b in zip((0, *groups), groups, strict=False))
    assert find_personal_data(f"Pay {shown}.") == [Span(4, 4 + len(shown), "card")]
    place = data.draw(st.integers(len(prefix), length - 1))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != number[place]]))
    wrong = number[:place] + digit + number[place + 1 :]
    assert all(s.kind != "card" for s in find_personal_data(f"Pay {wrong}."))


@given(st.data())
def test_ibans_are_found_and_one_wrong_digit_hides_them(data):
    country, length = data.draw(st.sampled_from([("DE", 22), ("GB", 22), ("FR", 27), ("NO", 15)]))
    body = data.draw(st.text("0123456789", min_size=length - 4, max_size=length - 4))
    letters = "".join(str(int(c, 36)) for c in body + country)
    check = 98 - int(letters + "00") % 97  # ISO 7064, MOD 97-10
    iban = f"{country}{check:02d}{body}"
    shown = data.draw(
        st.sampled_from([iban, " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))])
    )
    assert find_personal_data(f"Send to {shown} now") == [Span(8, 8 + len(shown), "iban")]
    place = data.draw(st.integers(4, length - 1))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != iban[place]]))
    wrong = iban[:place] + digit + iban[place + 1 :]
    assert all(s.kind != "iban" for s in find_personal_data(f"Send to {wrong} now"))


VALUES = [text[s.start : s.end] for text, spans in _labelled() for s in spans]


@given(st.lists(st.one_of(st.sampled_from(VALUES), st.text("@.+-: 019aDE(", max_size=9))))
@settings(max_examples=examples(400))
def test_redacted_text_has_no_personal_data_left(parts: list[str]):
    for joint in ("", " "):
        text = joint.join(parts)
        spans = find_personal_data(text)
        assert spans == sorted(spans)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
        try:
            redacted, kinds = redact_text(text)
        except ValueError:
            continue  # refused, not left in
        assert find_personal_data(redacted) == []
        assert {s.kind for s in spans} <= kinds
        assert redact_text(redacted) == (redacted, frozenset())
        if not spans:
            assert redacted == text


def test_placeholders_stand_where_the_values_stood():
    text = "Ann <ann@x.org>, +49 30 901820 (DE89 3704 0044 0532 0130 00)"
    assert redact_text(text)[0] == "Ann <[EMAIL]>, [PHONE] ([IBAN])"
    value = {"to": ["ann@x.org", 3, None, 4111111111111111], "ann@x.org": {"n": 1.5}}
    redacted, kinds = redact_value(value)
    assert redacted == {"to": ["[EMAIL]", 3, None, "[CARD]"], "[EMAIL]": {"n": 1.5}}
    assert kinds == {"email", "card"}


#: Pieces of numbers, and characters that share bytes with those that stand between digits.
PIECES = [
    *("4111 1111", "1111", "+49 30", "1234567", "212-555-0187", "(212)", "tel ", "0044", "8.8.8.8"),
    *("203.0.113.7", "1.2.3.20", "2001:db8::1", "3fff:1:2:3:4:5:6:7", "DE89 3704 0044 0532 0130"),
    *("DE89370400440532013000", "GB82WEST1234569876543", "00", "2", "w12", "v1.2", "\u0660", "漢"),
    *(" ", "-", ".", "/", "(", "\u00a0", "\u2009", "\u202f", "\u2010", "\u2013", "é", "\ud800"),
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=examples(1000), deadline=None)
@example("4111\u20091111\u20091111\u20091111")
@example("(0044)/30/123.456.7")
@example("0.0.0.20 1.1.1.10")
@example("DE89\u202f3704\u202f0044\u202f0532\u202f0130\u202f00")
@example("2001:db8:0:0:0:0:0:1")
def test_no_text_is_passed_over_in_which_a_pattern_would_find_something(text: str):
    """The check in front of the patterns saves time and hides nothing."""
    found = {s.kind for s in find_personal_data(text)}
    patterns = (personal._cards, personal._ipv4, personal._ipv6, personal._phones, personal._ibans)
    everything = personal._without_overlaps([s for find in patterns for s in find(text)])
    assert found == {s.kind for s in everything}


HOSTILE = [
    "@", "a@", "a@a.", "a.", "4", "4 ", "4-(  ", "DE89 ", "DE89", "A", "1.2.3.4 ", "1.", "2001:",
    "2001::", "+", "+1", "+1 ", "tel 1", "tel ", "00 4", "call ", "1   ", "(", "1((", "a-b@", "@a",
    "0 ", "4111 ", "+49 30", "é@é.", "\u0661",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_does_not_hide_what_follows(unit: str):
    """Quadratic time would not end here: 300,000 characters squared."""
    text = unit * (300_000 // len(unit)) + " ann@x.org"
    assert find_personal_data(text)[-1] == Span(len(text) - 9, len(text), "email")
