"""Damaged files of a dataset artifact: one line that names file, fault and cure."""

import json
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from flows.terminal import show_data
from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.lineage import reach, rows_of
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import Demonstration, Pair, PromptRow, SourceRow, read_rows
from rlhf.data.sketch import SKETCH, read_sketch
from rlhf.data.stored import read_card, read_summary
from rlhf.errors import DataError
from rlhf.gates import VERDICT, read_verdict
from rlhf.modeling.reward import META, reward_meta
from rlhf.report.samples import read_samples
from rlhf.store import open_store
from tasks.console import PlainConsole
from tasks.report import reward_model_evaluation
from tasks.runner import producer
from tasks.stages import EVALUATION, SAMPLES
from tests.data.helpers import message

TYPES = {
    files.DEMONSTRATIONS: Demonstration,
    files.PAIRS_TRAIN: Pair,
    files.PAIRS_EVAL: Pair,
    files.PROMPTS_TRAIN: PromptRow,
    files.PROMPTS_EVAL: PromptRow,
    files.ROWS: SourceRow,
}
DEEP = pytest.param("[" * 100_000, id="deep")
NO_JSON = ["", "{", "null", "[]", "3", "\xff", DEEP]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" * (n % 2 + 1)}
        for n in range(40)
    ]
    rows.append({"prompt": "What?", "chosen": "", "rejected": "x"})
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    out.mkdir()
    prepare_data(DataConfig(source=str(source)), out)
    return out


@pytest.fixture
def dataset(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "dataset")


def one_line(*call):
    text = message(DataError, *call)
    assert "\n" not in text
    assert len(text) < 500
    assert "restore it, or run the stage that makes it again" in text
    return text


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "flipped"])
def test_damaged_parquet(dataset, name, damage):
    path = dataset / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":  # in the first page's compressed bytes
        path.write_bytes(data[:4] + bytes(b ^ 255 for b in data[4:60]) + data[60:])
    else:
        cut = {"empty": b"", "truncated": data[: len(data) // 2], "text": b'{"a": 1}\n'}
        path.write_bytes(cut[damage])
    text = one_line(read_rows, path, TYPES[name])
    assert f"{name} is {'missing' if damage == 'missing' else 'damaged'}" in text


def edited(path, change):
    table = parquet.read_table(path)
    parquet.write_table(change(table), path)
    return path


def put(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, values)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.drop_columns("chosen"), "column chosen is missing"),
        (lambda t: t.append_column("more", t["chosen"]), "column more is unknown"),
        (lambda t: put(t, "chosen", pa.array([1] * len(t))), "column chosen is of type int64"),
        (
            lambda t: put(t, "chosen", pa.array([None] * len(t), pa.string())),
            "column chosen has empty cells",
        ),
        (lambda t: put(t, "prompt", t["chosen"]), "column prompt is of type"),
        (
            lambda t: put(t, "prompt", pa.array([[]] * len(t), t.schema.field("prompt").type)),
            "a prompt has no message",
        ),
        (
            lambda t: put(
                t,
                "prompt",
                pa.array(
                    [[{"role": "user", "content": None}]] * len(t), t.schema.field("prompt").type
                ),
            ),
            "column prompt has empty cells",
        ),
    ],
)
def test_parquet_of_another_form(dataset, change, fault):
    path = edited(dataset / files.PAIRS_TRAIN, change)
    assert fault in one_line(read_rows, path, Pair)


def test_parquet_that_another_tool_wrote_is_read(dataset):
    path = dataset / files.PAIRS_TRAIN
    before = read_rows(path, Pair)
    edited(path, lambda t: put(t, "chosen", t["chosen"].cast(pa.string())).drop_columns("weight"))
    edited(path, lambda t: put(t, "group", pa.nulls(len(t))))
    assert read_rows(path, Pair) == before


@pytest.mark.parametrize("line", ["", "{", "[]", '{"prompt": "x"}', '{"prompt": 1, "chosen": "a"}'])
def test_damaged_json_lines_of_an_older_dataset(tmp_path, line):
    whole = json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"})
    (tmp_path / "pairs-train.jsonl").write_text(f"{whole}\n{line}\n{whole}\n")
    text = one_line(read_rows, tmp_path / files.PAIRS_TRAIN, Pair)
    assert "pairs-train.jsonl is damaged (line 2: " in text


def show_summary(folder):
    return show_data(PlainConsole(), folder)


@pytest.mark.parametrize("text", [*NO_JSON, '{"findings": 3}', '{"left_out": {"x": -1}}'])
@pytest.mark.parametrize("read", [read_summary, show_summary])
def test_a_damaged_summary(dataset, text, read):
    (dataset / files.SUMMARY).write_bytes(text.encode("latin-1"))
    assert "summary.json is damaged (" in one_line(read, dataset)


CARDS = [
    '{"position": 3}', '{"position": {"share": "x", "n": 3}}', '{"formats": []}',
    '{"languages": {"en": {"share": 1.5, "n": 3}}}', '{"slices": {"task": {"a": {"n": 3}}}}',
    '{"repeats": {"pairwise": {"share": 0.5}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", [*NO_JSON, *CARDS])
def test_a_damaged_card(dataset, text):
    (dataset / files.CARD).write_bytes(text.encode("latin-1"))
    assert "card.json is damaged (" in one_line(read_card, dataset)
    # Of an older dataset drift counts the files, and reads the card beside them.
    (dataset / SKETCH).unlink()
    fault = one_line(read_sketch, dataset)
    assert "card.json is damaged (" in fault
    assert fault.endswith("or set data.drift.enabled=false to go on without the comparison")


@pytest.mark.parametrize("text", [*NO_JSON, '{"gate": "x"}', None])
def test_a_damaged_verdict(tmp_path, text):
    saved = {"gate": "g", "subject": "s", "approved": True, "checks": []}
    saved["checks"] = [{"metric": "m", "value": 1.0, "bound": "≥ 0", "passed": True}]
    (tmp_path / VERDICT).write_text(json.dumps(saved))
    assert read_verdict(tmp_path).checks[0].metric == "m"
    # "yes" is no approval.
    text = json.dumps({**saved, "approved": "yes"}) if text is None else text
    (tmp_path / VERDICT).write_bytes(text.encode("latin-1"))
    assert "verdict.json is damaged (" in one_line(read_verdict, tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 1, "source": "x", "line": 2}'])
def test_a_damaged_quarantine(dataset, line):
    with (dataset / files.QUARANTINE).open("a") as file:
        file.write(f"{line}\n")
    assert "quarantine.jsonl is damaged (line 2: " in one_line(rows_of, dataset)


def test_a_dataset_that_was_pushed_damaged_hides_no_other(dataset, whole, tmp_path):
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "work")
    row_id = rows_of(dataset)[0].id
    (dataset / files.ROWS).write_bytes(b"PAR1")

    def push(folder):
        return store.publish(
            folder, "dataset", parents={}, metrics={}, producer=producer("push", {}, 0)
        )

    broken, sound = push(dataset), push(whole)
    found = reach(store, [row_id])
    assert [ref for ref, _ in found.rows[row_id]] == [sound]
    [(ref, reason)] = found.unknown
    assert ref == broken
    assert f"rows.parquet of artifact {broken.digest[:12]} is damaged" in reason
    assert f"rlhf artifacts rm {broken.digest[:12]}" in reason


LISTS = ['{"a": 1}', "[1]", '[{"before": "x"}]', '[{"prompt": "x", "before": 1, "after": "y"}]']
METAS = ["[]", '{"pooling": "max"}', '{"tail": "x"}', '{"score_std": "x"}']


@pytest.mark.parametrize("text", [*(text for text in NO_JSON if text != "[]"), *LISTS])
def test_damaged_samples(tmp_path, text):
    (tmp_path / SAMPLES).write_bytes(text.encode("latin-1"))
    assert "samples.json is damaged (" in one_line(read_samples, tmp_path / SAMPLES)


@pytest.mark.parametrize("text", [*NO_JSON, *METAS])
def test_a_damaged_reward_models_file(tmp_path, text):
    (tmp_path / META).write_bytes(text.encode("latin-1"))
    assert "rlhf.json is damaged (" in one_line(reward_meta, tmp_path)


@pytest.mark.parametrize("text", NO_JSON)
def test_a_damaged_evaluation(tmp_path, text):
    (tmp_path / EVALUATION).write_bytes(text.encode("latin-1"))
    assert "evaluation.json is damaged (" in one_line(reward_model_evaluation, tmp_path)
