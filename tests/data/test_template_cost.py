"""Chat templates that take too much memory or time, and those that take what real ones do."""

from __future__ import annotations

import json
import time

import pytest

from rlhf.data.template_cost import cost_error

LOOP = "{% for a in range(99999) %}"
DOUBLED = "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}"
#: Few characters, and hours or gigabytes each.
COSTLY = {
    "loops": LOOP * 3 + "x" + "{% endfor %}" * 3,
    "silent loops": LOOP * 3 + "{% endfor %}" * 3,
    "repeated text": "{{ 'x' * 10**11 }}",
    "repeated list": "{% set a = [1] * 10**11 %}",
    "power": "{{ 7 ** (7 ** (7 ** 7)) }}",
    "doubled": DOUBLED + "{% endfor %}{{ ns.x | length }}",
    "doubled by values": "{% set a = 'ab' %}" + "{% set a = a ~ a %}" * 60 + "{{ a | length }}",
    "padded": "{{ 'x' | center(10**11) }}",
    "formatted": "{{ '%99999999999d' | format(1) }}",
    "characters": "{% for a in messages[0].content %}" * 9 + "x" + "{% endfor %}" * 9,
    "escaped again": "{{ messages[0].content" + " | tojson" * 60 + " }}",
    "joined": "{% set a = 'ab' %}" + ("{% set a = " + "~".join("a" * 500) + " %}") * 6,
    "loops over a literal": f"{{% for a in {[1] * 9000} %}}" * 3 + "{% endfor %}" * 3,
    "loops over another chat": f"{{% set messages = {[1] * 9000} %}}"
    + "{% for a in messages %}" * 3
    + "{% endfor %}" * 3,
    "long": "x" * 300_000,
    "long answer": LOOP + "x" * 20 + "{% endfor %}",
}
REAL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHECKED = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content.strip() }}{% endfor %}"
)
SOUND = {
    "real": REAL,
    "checked": CHECKED,
    "calls what is missing": "{{ nothing.at.all() }}",
    "raises": "{{ raise_exception('no system') }}",
    "no Jinja": "{% for",
    "dated": "{{ strftime_now('%d %b %Y') }}" + REAL,
    "tools": "{% macro show(v) %}{{ v | tojson(indent=2) }}{% endmacro %}" + REAL,
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_refused_within_its_limits(name):
    started = time.process_time()
    reason = cost_error(COSTLY[name])
    assert reason is not None
    assert "at most" in reason or "for two short turns" in reason
    assert time.process_time() - started < 5  # of this process: the other has a limit of its own


@pytest.mark.parametrize("name", SOUND)
def test_other_templates_are_taken(name):
    assert cost_error(SOUND[name]) is None


def test_a_plain_template_needs_no_process(monkeypatch):
    monkeypatch.setattr("rlhf.data.template_cost.run_limited", None)
    assert cost_error(REAL + json.dumps("another text")) is None
