"""Prompts of their own for PPO: formats, references, and answers that never reach them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import PromptRow, read_rows
from rlhf.errors import ConfigError
from tests.data.helpers import assistant, message, pair, user
from tests.examples import examples

PAIRS = [pair(f"pairs ask the question {i}") for i in range(20)]


def write(path, data) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def prepare(tmp_path, data, source: dict[str, Any] | None = None, **options: Any):
    """PPO's prompts of these rows, the summary, and the quarantine's lines."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    path = write(tmp_path / "ask.jsonl", data)
    config = DataConfig(
        source=write(tmp_path / "pairs.jsonl", PAIRS),
        prompts_source=path if source is None else {"source": path, **source},
        **options,
    )
    prepare_data(config, out)
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    summary = json.loads((out / files.SUMMARY).read_text())
    return read_rows(out / files.PROMPTS_TRAIN, PromptRow), summary, lines


SYSTEM = {"role": "system", "content": "Be"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "How?"}, "How?"),
        ({"prompt": "How?", "text": "How? So."}, "How?"),
        ({"question": "How?", "system": "Be"}, [SYSTEM, user("How?")]),
        ({"messages": [user("How?")]}, [user("How?")]),
        ({"messages": [SYSTEM, user("How?"), assistant("So.")]}, [SYSTEM, user("How?")]),
        ({"text": "\n\nHuman: How?\n\nAssistant: So."}, [user("How?")]),
        ({"instruction": "How?", "input": "2", "output": "So."}, "How?\n\n2"),
        ({"instruction": "How?", "context": "2", "response": "So."}, "How?\n\n2"),
        ({"chosen": [user("How?"), assistant("So.")], "rejected": [user("How?"), assistant("No")]},
         [user("How?")]),
        (pair("How?"), "How?"),
    ],
)  # fmt: skip
def test_formats(tmp_path, row, expected):
    found, _, lines = prepare(tmp_path, [row])
    assert found == [PromptRow(expected)]
    assert lines == []


def test_in_place_of_those_of_the_pairs_or_beside_them_with_references(tmp_path):
    rows = [{"prompt": f"own {i}", "solution": i, "level": "hard"} for i in range(4)]
    source = {"reference_column": "solution", "metadata_columns": ["level"]}
    found, _, _ = prepare(tmp_path, rows, source)
    expected = [PromptRow(f"own {i}", None, str(i), {"level": "hard"}) for i in range(4)]
    assert found == expected
    more, _, _ = prepare(tmp_path, rows, source, prompts_mode="add")
    assert more[-4:] == expected
    assert all(row.prompt.startswith("pairs") and row.reference is None for row in more[:-4])
    text = message(ConfigError, prepare, tmp_path, rows, {"reference_column": "truth"})
    assert "data.reference_column = 'truth': not a column of the source" in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [assistant("So.")]}, "prompt is nothing but replies"),
        ({"messages": [SYSTEM, assistant("So.")]}, "prompt has no user's turn"),
        ({"messages": []}, "prompt is an empty list"),
        ({"messages": [user("x" * 101)]}, "prompt too long"),
    ],
)
def test_reasons(tmp_path, row, reason):
    good = [{"messages": [user(f"q{i}")]} for i in range(12)]
    found, summary, lines = prepare(tmp_path, [*good, row], max_prompt_chars=100)
    assert [(n["source"], n["line"], n["reason"]) for n in lines] == [
        ("prompts_source/ask.jsonl", 13, reason)
    ]
    assert len(found) == 12
    assert summary["rows_used"] == 20 + 12


def test_no_column_of_prompts(tmp_path):
    text = message(ConfigError, prepare, tmp_path, [{"ask": "x"}])
    assert "no column holds prompts by its name (ask)" in text
    assert prepare(tmp_path, [{"ask": "x"}], {"prompt_column": "ask"})[0] == [PromptRow("x")]
    rows = [{"prompt": "x", "answer": "y"}]
    text = message(ConfigError, prepare, tmp_path, rows, {"chosen_column": "answer"})
    assert "chosen_column has no meaning for prompts" in text


def test_prompts_of_the_gate_are_left_out(tmp_path):
    rows = [{"prompt": f" PAIRS ask the  question {i}"} for i in range(20)]
    found, _, lines = prepare(tmp_path, [*rows, {"prompt": "own"}], eval_fraction=0.4)
    held_out = read_rows(tmp_path / "out" / files.PROMPTS_EVAL, PromptRow)
    numbers = {row.prompt.split()[-1] for row in held_out}
    assert len(lines) == len(numbers)
    assert {line["reason"] for line in lines} == {"prompt is held out"}
    assert {row.prompt.split()[-1] for row in found}.isdisjoint(numbers)


ANSWER = "the answer is: nobody but the judge may see this"
#: Rows with a question and an answer, in the shapes of published data.
SHAPES = [
    lambda q, a: {"messages": [user(q), assistant(a)]},
    lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    lambda q, a: {"messages": [SYSTEM, user(q), assistant(a), assistant(a)]},
    lambda q, a: {"messages": json.dumps([user(q), assistant(a)])},
    lambda q, a: {"text": f"\n\nHuman: {q}\n\nAssistant: {a}"},
    lambda q, a: {"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"},
    lambda q, a: {"text": f"### Instruction:\n{q}\n\n### Response:\n{a}"},
    lambda q, a: {"text": f"{q} {a}", "answer": a},
    lambda q, a: {"prompt": f"{q}\n{a.upper()}", "output": a},
    lambda q, a: {"prompt": f"Human: {q}\n\nAssistant: {a}", "completion": a},
    lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)], "text": q + a},
    lambda q, a: {"prompt": [user(q), assistant(a)], "answer": a},
    lambda q, a: {"prompt": q, "chosen": a, "rejected": "no"},
    lambda q, a: {"prompt": q, "response_a": a, "response_b": "no", "winner": "a"},
    lambda q, a: {"prompt": q, "messages": [user(q), assistant(a)]},
    lambda q, a: {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant("no")]},
    lambda q, a: {"instruction": q, "input": "", "output": a, "text": f"{q} {a}"},
    lambda q, a: {"question": q, "answer": a, "solution": a},
    lambda q, a: {"input": q, "target": a},
    lambda q, a: {"query": q, "responses": [a, "no"], "ranks": [1, 2]},
]


@settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=8),
)
def test_an_answer_never_reaches_a_prompt(tmp_path, shape, drawn):
    # Other shapes among those of the file, and questions that the pairs hold too.
    rows = [shape(f"pairs ask the question {i}", f"{ANSWER} {n}") for i, n in drawn]
    rows.append({**rows[0], **shape("own question", f"{ANSWER} 9")})
    try:
        found, summary, lines = prepare(tmp_path, rows, max_bad_fraction=1)
    except Exception as error:  # all rows were refused, which is as good
        assert "no row is left to use" in str(error)  # noqa: PT017
        return
    assert ANSWER not in json.dumps([vars(row) for row in found]).lower()
    assert summary["rows_used"] + len(lines) == summary["rows"]
