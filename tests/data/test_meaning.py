"""Values decide what a column is, not its name alone: no layout is read the wrong way round."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import parts as parts_of_files
from rlhf.data import rows as files
from rlhf.data.formats import detect
from rlhf.data.prepare import prepare_data
from rlhf.data.vocabulary import known_names
from rlhf.errors import ConfigError, RLHFError

ASKED = ("How do I clean a kettle", "Why is rust red", "What do otters eat", "Who wrote Emma")


def good(i):
    return f"GOOD reply of case {i}, in full."


def bad(i):
    return f"BAD reply of case {i}."


def asked(i):
    return f"{ASKED[i % 4]}, question {i}?"


def pair_of(i):
    return {"prompt": asked(i), "chosen": good(i), "rejected": bad(i)}


def chat(i, reply):
    return [{"role": "user", "content": asked(i)}, {"role": "assistant", "content": reply}]


def two(i, one="response_a", other="response_b"):
    """Two columns of replies of which the first is better in even rows."""
    replies = (good(i), bad(i)) if i % 2 == 0 else (bad(i), good(i))
    return {"prompt": asked(i), one: replies[0], other: replies[1]}


def side(i, *names):
    return names[i % 2]


def ranked(i, **more):
    """A list of replies of which the last is best in odd rows, the first in even ones."""
    return {"prompt": asked(i), "responses": [*[*two(i).values()][1:], "So so."], **more}


def rated(i, **more):
    return {"prompt": asked(i // 2), "response": (bad, good)[i % 2](i // 2), **more}


def best(i, start=0):
    return (i % 2) + start


def parts(i, *ranks):
    """Fields of an Argilla record, or their ranks as its ranking question gives them."""
    if not ranks:
        return two(i, "response-1", "response-2")
    return [{"value": f"response-{k}", "rank": rank} for k, rank in enumerate(ranks, 1)]


def judged(i, *controls):
    results = [
        {"from_name": name, "type": kind, "value": {key: [value]}}
        for name, kind, key, value in controls
    ]
    return {"data": two(i, "answer1", "answer2"), "annotations": [{"result": results}]}


#: Rows of layouts that have one meaning, each by its number.
READ = {
    "trajectory of turns": lambda i: {
        "trajectory": [{"from": "user", "value": asked(i)}], "chosen": good(i), "rejected": bad(i)},
    "good and bad edits": lambda i: {
        "context": [{"role": "user", "content": asked(i)}], "original_response": "So so.",
        "good_edited_response": good(i), "bad_edited_response": bad(i)},
    "labels in columns of a pair": lambda i: {
        **two(i), "chosen": side(i, "response_a", "response_b"),
        "rejected": side(i, "response_b", "response_a")},
    "models in columns of a pair": lambda i: {
        **two(i), "model_a": "m-7", "model_b": "n-8", "winner": side(i, "m-7", "n-8"),
        "loser": side(i, "n-8", "m-7")},
    "numbers in columns of a pair": lambda i: {
        **two(i, "response_1", "response_2"), "chosen": 1 + i % 2, "rejected": 2 - i % 2},
    "positions in columns of a pair": lambda i: {
        **ranked(i), "chosen": best(i), "rejected": 1 - best(i)},
    "ids in columns of a pair": lambda i: {
        "prompt": asked(i), "chosen": f"{i}-x", "rejected": f"{i}-y",
        "responses": [{"id": f"{i}-y", "text": bad(i)}, {"id": f"{i}-x", "text": good(i)}]},
    "columns that the label names": lambda i: {
        **two(i, "ours", "theirs"), "winner": side(i, "ours", "theirs")},
    "strength without a sign": lambda i: {
        **two(i, "response_1", "response_2"), "preference_strength": 1 + i % 3,
        "choice": side(i, "response_1", "response_2")},
    "verdict of a judge": lambda i: {**two(i), "verdict": side(i, "[[A>>B]]", "[[B>A]]")},
    "sentence of a judge": lambda i: {
        **two(i, "response_1", "response_2"),
        "preference": side(i, "Response 1 is much better", "@Response 2 is slightly better.")},
    "names of models with the suffix": lambda i: {
        **two(i, "output_1", "output_2"), "winner": side(i, "model_1", "model_2")},
    "a second label column": lambda i: {
        **two(i), "label": "politics", "winner": side(i, "a", "b")},
    "replies as objects": lambda i: {
        "prompt": asked(i), "winner": side(i, "a", "b"),
        **{key: {"text": text, "model": "m"} for key, text in two(i).items() if key != "prompt"}},
    "columns of any name in a pair": lambda i: {
        **two(i, "ours", "theirs"), "chosen": side(i, "ours", "theirs"),
        "rejected": side(i, "theirs", "ours")},
    "names of models in a pair": lambda i: {
        **two(i), "name_a": f"m{i}", "name_b": f"n{i}", "winner": side(i, f"m{i}", f"n{i}"),
        "loser": side(i, f"n{i}", f"m{i}")},
    "a label that names the columns beside another one": lambda i: {
        **two(i, "completion_1", "completion_2"), "label": "BA"[i // 2 % 2],
        "verdict": side(i, "completion_1", "completion_2")},
    "lists that are empty": lambda i: {
        "prompt": asked(i), "chosen": good(i), "rejected": bad(i), "tags": [], "images": None},
    "keys beside questions": lambda i: {
        "prompt": f"p_{i}", "question": asked(i), "chosen": good(i), "rejected": bad(i)},
    "a passage beside questions": lambda i: {
        "context": f"Passage {i} of a book.", "user_prompt": asked(i), "chosen": good(i),
        "rejected": bad(i)},
    "ties by a flag": lambda i: {**two(i), "winner": side(i, "a", "b"), "is_tie": False},
    "question in front of listed replies": lambda i: {
        "prompt": asked(i), "chosen": [asked(i), good(i)], "rejected": [asked(i), bad(i)]},
    "conversation and another reply": lambda i: {
        "messages": chat(i, good(i)), "rejected_response": bad(i)},
    "conversations beside another column": lambda i: {
        "conversation": [{"input": asked(i), "output": "x"}], "chosen": chat(i, good(i)),
        "rejected": chat(i, bad(i))},
    "conversations beside an empty prompt": lambda i: {
        "prompt": None, "chosen": chat(i, good(i)), "rejected": chat(i, bad(i))},
    "prompts in a list": lambda i: {
        "prompt": [asked(i)], "chosen": good(i), "rejected": bad(i)},
    "equal system turns": lambda i: {
        "system": "Be kind.", "chosen": good(i), "rejected": bad(i),
        "prompt": [{"role": "system", "content": "Be kind."}, *chat(i, "")[:1]]},
    "scores with a gap": lambda i: {
        "prompt": asked(i), "responses": [bad(i), good(i), "No score."], "ratings": [3, 9, None]},
    "scores and ranks": lambda i: {
        "prompt": asked(i), "answers": [{"text": bad(i), "score": 1, "rank": 2},
                                        {"text": good(i), "score": 3, "rank": 1}]},
    "position of the best from 1": lambda i: {**ranked(i), "best": best(i, 1) if i else 3},
    "loss": lambda i: rated(i, loss=side(i, 3.5, 0.1)),
    "rank": lambda i: rated(i, rank=side(i, 2, 1)),
    "harm": lambda i: rated(i, is_harmful=side(i, True, False)),
    "harmlessness": lambda i: rated(i, harmlessness=side(i, 0.1, 0.8)),
    "score beside a comment": lambda i: rated(
        i, feedback=None if i % 9 else "Fine.", score=side(i, 1, 5)),
    "ratings of several annotators": lambda i: rated(i, rating=side(i, [1, 2], [5, None, 4])),
    "controls that do not compare": lambda i: judged(
        i, ("topic", "choices", "choices", "History"), ("cmp", "pairwise", "selected",
                                                       side(i, "left", "right"))),
    "ranking question": lambda i: {
        "fields": parts(i),
        "responses": {"ranking": [{"value": parts(i, *side(i, (1, 2), (2, 1))),
                                   "status": "submitted"}]}},
}  # fmt: skip
READ |= {
    "replies under their ids": lambda i: {
        "prompt": asked(i), "chosen": f"{i}-x", "rejected": f"{i}-y",
        "responses": {f"{i}-y": bad(i), f"{i}-x": good(i)}},
    "replies and scores by model": lambda i: {
        "prompt": asked(i), "responses": {"m": bad(i), "n": good(i)}, "scores": {"n": 9, "m": 3}},
    "a list of words beside a reply": lambda i: rated(i, score=side(i, 1, 5), ranking=["p", "q"]),
    "choices beside a reply": lambda i: rated(
        i, score=side(i, 1, 5), choices=["p", "q"]),
    "counts beside a reply": lambda i: rated(i, score=side(i, 1, 5), good=3, bad=i % 3),
    "gold answer": lambda i: {
        "prompt": asked(i // 2), "answer": f"{i % 3} kg", "generation": (bad, good)[i % 2](i // 2),
        "reward": i % 2},
    "a document in text": lambda i: {
        "prompt": asked(i // 2), "text": f"Document {i}.", "score": i % 2,
        "model_output": (bad, good)[i % 2](i // 2)},
    "stars of five": lambda i: rated(i, rating=side(i, "1/5", "5/5")),
    "older files of ms-swift": lambda i: {
        "query": asked(i), "response": good(i), "rejected_response": bad(i)},
    "selected side under any name": lambda i: {
        **two(i, "answer1", "answer2"), "pw": {"selected": side(i, "left", "right")}},
    "names of OpenAI with a text": lambda i: {
        "input": asked(i), "preferred_output": good(i), "non_preferred_output": bad(i)},
    "a chat in Argilla": lambda i: {
        "fields": {"chat": chat(i, "")[:1], **{k: v for k, v in two(i).items() if k != "prompt"}},
        "responses": {"preference": [{"value": side(i, "response_a", "response_b"),
                                      "status": "submitted"}]}},
    "ranks of trees as text": lambda i: {"prompt": {
        "role": "prompter", "text": asked(i), "replies": [
        {"role": "assistant", "text": bad(i), "rank": "1", "replies": []},
        {"role": "assistant", "text": good(i), "rank": "0", "replies": []}]}},
    "a vote of unknown value": lambda i: {
        **two(i), "votes": [side(i, "a", "b"), side(i, "a", "b"), "skip"]},
}  # fmt: skip
#: Settings that a layout needs.
SETTINGS = {
    "loss": {"label_column": "loss"},
    "rank": {"label_column": "rank"},
    "harm": {"label_column": "is_harmful"},
    "harmlessness": {"label_column": "harmlessness"},
}  # fmt: skip


def prepare(folder, rows, **settings):
    """The pairs that are written, and the summary."""
    source, out = folder / "data.jsonl", folder / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(source=str(source), **settings), out)
    written = [p for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
               for p in files.read_rows(out / name, files.Pair)]  # fmt: skip
    return written, json.loads((out / files.SUMMARY).read_text())


def right(pairs):
    """Return whether all pairs prefer the right reply."""
    return all("GOOD" in row.chosen and "GOOD" not in row.rejected for row in pairs)


@pytest.mark.parametrize("name", READ)
def test_layouts_of_one_meaning_are_read_in_it(tmp_path, name):
    rows = [READ[name](i) for i in range(40)]
    pairs, summary = prepare(tmp_path, rows, **SETTINGS.get(name, {}))
    assert pairs
    if name == "position of the best from 1":
        pairs = [row for row in pairs if row.chosen != "So so."]
    assert right(pairs)
    assert all("question" in str(row.prompt) for row in pairs)
    assert summary["rows"] == summary["rows_used"] + sum(summary["left_out"].values())


#: Rows of layouts that have no certain meaning, and a part of the message.
REFUSED = {
    "positions from 0 or 1": (
        lambda i: {**two(i, "response_0", "response_1"), "chosen": i % 2, "rejected": 1 - i % 2},
        "data.labels.first"),
    "scale without a sign": (
        lambda i: {**two(i, "response_1", "response_2"), "overall_preference": side(i, 1, 5)},
        "'overall_preference'"),
    "thumbs of 1 and 2": (
        lambda i: rated(i, label=side(i, 2, 1)), "which don't say whether 1 or 2 is the better"),
    "order or ranks": (
        lambda i: {"prompt": asked(i), "responses": [bad(i), "So so.", good(i)],
                   "ranking": [2, 0, 1]}, "the positions of the replies"),
    "position that may start at 0 or 1": (
        lambda i: {**ranked(i), "best": 1}, "whether the first reply is 0 or 1"),
    "label that is the other reply's text": (
        lambda i: {"prompt": asked(i), "response_a": "B", "response_b": "A", "winner": "A"},
        "is the text of the other"),
    "scores against ranks": (
        lambda i: {"prompt": asked(i), "answers": [{"text": "x", "score": 1, "rank": 1},
                                                   {"text": "y", "score": 3, "rank": 2}]},
        "the scores contradict the ranks"),
    "columns that a label decides between": (
        lambda i: {**two(i, "ours", "theirs"), "winner": side(i, "ours", "theirs")},
        "set data.label_column=winner too"),
    "two controls that compare": (
        lambda i: judged(i, ("kind", "pairwise", "selected", "left"),
                         ("safe", "pairwise", "selected", "right")),
        "kind and safe each say which reply is better"),
    "prompt as an object": (
        lambda i: {"question": {"dataset": "d", "id": "1", "full_text": asked(i)}, **{
            key: text for key, text in two(i).items() if key != "prompt"},
            "winner": side(i, "a", "b")}, "data.prompt_column=question.full_text"),
    "column of the loser": (
        lambda i: {**two(i), "loser": side(i, "b", "a")}, "data.label_column"),
    "labels and texts in one column": (
        lambda i: {**two(i), "chosen": good(i) if i < 8 else side(i, "a", "b"), "rejected": "x"},
        "chosen holds labels of other columns in 32 of the first 40 rows"),
    "a judge of two minds": (
        lambda i: {**two(i), "verdict": "A is better formatted, but B is better overall."},
        "data.labels.first"),
    "a label with a mark": (lambda i: {**two(i), "winner": side(i, "!B", "!A")},
                            "data.labels.first"),
    "a pair whose order another column turns round": (
        lambda i: {"prompt": asked(i), "chosen": two(i)["response_a"],
                   "rejected": two(i)["response_b"], "preference": side(i, "chosen", "rejected")},
        "set data.label_column=preference too"),
    "numbers as the prompt": (
        lambda i: {"x": i, "chosen": good(i), "rejected": bad(i)}, "data.prompt_column"),
    "system of another type": (
        lambda i: {"prompt": asked(i), "system": {"tone": "kind"}, "chosen": good(i),
                   "rejected": bad(i)}, "system is an object"),
    "turns as a list": (
        lambda i: {"prompt": asked(i), "chosen": [asked(i), "x", good(i)],
                   "rejected": [asked(i), bad(i)]}, "chosen is a list of turns"),
}  # fmt: skip
REFUSED |= {
    "counts alone": (lambda i: {"prompt": asked(i), "response": good(i), "good": 7, "bad": i},
                     "good seems to hold numbers"),
    "ids alone": (lambda i: {"query": asked(i), "pos": [f"doc{i}"], "neg": [f"doc{i + 50}"]},
                  "pos seems to hold ids"),
    "score against rating": (lambda i: rated(i, score=side(i, 1, 5), rating=side(i, 4, 2)),
                             "rating and score order the replies differently"),
    "label and winner in one object": (
        lambda i: {**two(i), "preference": {"label": "A", "winner": side(i, "a", "b")}},
        "one of preference.label, preference.winner"),
    "two labels": (
        lambda i: {**two(i), "choice": "A", "human_preference": side(i, "A", "B")},
        "human_preference and choice say the contrary"),
    "a list that begins with the worst": (
        lambda i: {"instruction": asked(i), "output": [bad(i), good(i)], "order": "worst_to_best"},
        "order says"),
    "an id in text": (
        lambda i: {"prompt": asked(i), "chosen": {"text": f"t{i}", "body": good(i)},
                   "rejected": {"text": f"t{i}", "body": bad(i)}}, "chosen.body"),
}  # fmt: skip
#: Their columns say two things, between which the setting decides.
TWO_READINGS = ("order or ranks", "score against rating", "two labels")
REFUSED_SETTINGS = {
    "columns that a label decides between": {"chosen_column": "ours", "rejected_column": "theirs"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_of_no_certain_meaning_are_refused(tmp_path, name):
    row, part = REFUSED[name]
    rows = [row(i) for i in range(40)]
    settings = REFUSED_SETTINGS.get(name, {})
    with pytest.raises(RLHFError) as caught:
        prepare(tmp_path, rows, **settings)
    text = str(caught.value)
    assert part in text
    for cure in re.findall(r"data\.(\w+_column)=([\w.]+)", text):
        assert cure[0] in ("prompt_column", "chosen_column", "rejected_column", "label_column")
        try:
            pairs, _ = prepare(tmp_path, rows, **{**settings, cure[0]: cure[1]})
        except RLHFError:
            continue
        assert name in TWO_READINGS or right(pairs)


LATE = {
    "thumbs": lambda i: rated(i, label=1 if i < 210 else side(i, 1, 2)),
    "winner": lambda i: {**two(i, "response_1", "response_2"),
                         "winner": i % 2 + (1 if i < 210 else 0)},
    "position": lambda i: {**ranked(i), "best": 3 if i == 0 else best(i, 1 if i < 210 else 0)},
    "scale": lambda i: rated(i, score=side(i, 2, 5) if i < 210 else side(i, 2, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_convention_that_changes_late_in_the_file_stops(tmp_path, name):
    with pytest.raises(ConfigError, match=r"in the first rows|but the first rows.*jsonl:2\d\d"):
        prepare(tmp_path, [LATE[name](i) for i in range(260)])


def test_a_convention_that_is_set_and_changes_late_stops(tmp_path):
    rows = [{**two(i), "label": i % 2 + (0 if i < 210 else 1)} for i in range(260)]
    with pytest.raises(ConfigError, match=r"label' holds 2, but in the first rows 0 and 1"):
        prepare(tmp_path, rows, labels={"first": "0", "second": "1"})


def test_thousands_are_not_read_as_decimals(tmp_path):
    rows = [rated(i, score=side(i, "950", "1,100") if i else "12,5") for i in range(40)]
    with pytest.raises(ConfigError, match="'12,5'"):
        prepare(tmp_path, rows)


def test_ties_by_a_status_and_what_is_not_read_are_said(tmp_path):
    rows = [
        {"prompt": asked(i), "status": "tie" if i % 4 else "swapped",
         "chosen": [{"role": "assistant", "content": good(i), "reasoning_content": "Hm."}],
         "rejected": [{"role": "assistant", "content": bad(i)}]}
        for i in range(40)
    ]  # fmt: skip
    pairs, summary = prepare(tmp_path, rows)
    assert len(pairs) == 10
    assert "reasoning_content of messages in chosen is not read" in summary["notes"]


@pytest.mark.parametrize(
    "columns",
    [{"responses": [f"r {j}" for j in range(100)], "scores": [*range(100)]},
     {"chosen": [f"g {j}" for j in range(100)], "rejected": [f"b {j}" for j in range(100)]}],
)  # fmt: skip
def test_pairs_of_lists_are_limited_and_that_is_said(tmp_path, columns):
    pairs, summary = prepare(tmp_path, [{"prompt": asked(i), **columns} for i in range(4)],
                             max_reply_share=None)  # fmt: skip
    assert len(pairs) == 4 * 64
    count = 100 * 99 // 2 if "scores" in columns else 100 * 100
    assert summary["pairs_left_out"] == {"beyond 64 pairs of one row": 4 * (count - 64)}
    assert any(f"{4 * (count - 64):,} × beyond 64 pairs" in note for note in summary["notes"])


TWO_NAMES = [("response_a", "response_b"), ("answer_1", "answer_2"), ("output_0", "output_1")]
LABEL = st.sampled_from(["winner", "label", "preference", "choice", "better", "chosen", "verdict"])


@given(st.data())
def test_a_comparison_is_never_the_wrong_way_round(tmp_path_factory, data):
    one, other = data.draw(st.sampled_from(TWO_NAMES))
    a, b = one[-1], other[-1]
    words = [(one, other), (a, b), (f"model_{a}", f"model_{b}"), (f"{a}>{b}", f"{b}>>{a}"),
             (f"Response {a} is better.", f"Response {b} is better."), ("left", "right"),
             (f"[[{a}]]", f"[[{b}]]")]  # fmt: skip
    first, second = data.draw(st.sampled_from(words))
    label = data.draw(LABEL)
    more = data.draw(st.dictionaries(
        st.sampled_from(["rejected", "loser", "score", "preference_strength", "rank"]),
        st.sampled_from([1, 2, "x"]), max_size=2))  # fmt: skip
    rows = [{**two(i, one, other), **more, label: side(i, first, second)} for i in range(20)]
    try:
        pairs, _ = prepare(tmp_path_factory.mktemp("data"), rows)
    except RLHFError:
        return
    assert right(pairs), json.dumps(rows[0])


def test_late_columns_are_read_where_they_matter_and_listed_where_not(tmp_path):
    """Layouts are found anew for names that one could read, and are held to the rows before."""
    detections = []
    rows = [{**pair_of(i), **({f"note {i}": i} if i >= 200 else {})} for i in range(260)]
    rows[230]["system"] = "Be kind."
    rows[240]["preference_margin"] = 2.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parts_of_files, "detect", lambda *a, **k: detections.append(1) or detect(*a, **k)
        )
        pairs, summary = prepare(tmp_path, rows, max_reply_share=None)
    assert len(detections) == 3
    assert {f"note {i}" for i in range(200, 260)} <= {*summary["unused_columns"].split(", ")}
    assert sum(isinstance(p.prompt, list) for p in pairs) == 1
    assert [p.margin for p in pairs if p.margin is not None] == [2.5]


def test_more_late_columns_that_matter_than_are_looked_at_stop(tmp_path):
    names = sorted(known_names())[: parts_of_files.MAX_CHANGES + 1]
    rows = [pair_of(i) for i in range(200)] + [{**pair_of(i), n: None} for i, n in enumerate(names)]
    with pytest.raises(
        ConfigError, match=r"first appears in .*:2\d\d, after 50 other rows|another"
    ):
        prepare(tmp_path, rows)


def test_the_first_part_of_replies_in_a_column_stands_in_front_of_both(tmp_path):
    rows = [{**pair_of(i), "initial_reason_steps": "First.\nStep 2:"} for i in range(20)]
    pairs, summary = prepare(tmp_path, rows)
    assert {p.chosen[:20] for p in pairs} == {"First.\nStep 2: GOOD "}
    assert all(p.rejected.startswith("First.\nStep 2: BAD") for p in pairs)
    assert "initial_reason_steps goes in front of both replies" in summary["notes"]


BREAKS = {
    "pairs": lambda i: {"prompt": asked(i), "chosen": good(i) + r"\n\nMore.",
                        "rejected": bad(i) + r"\n1. One"},
    "prompts": lambda i: {**pair_of(i), "prompt": asked(i) + r"\nAnswer briefly."},
    "messages": lambda i: {"chosen": chat(i, good(i) + r"\nMore."),
                           "rejected": chat(i, bad(i) + r"\nMore.")},
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_line_breaks_that_are_escaped_are_refused(tmp_path, name):
    rows = [BREAKS[name](i) for i in range(20)]
    with pytest.raises(ConfigError, match="line breaks written as a backslash and an n") as caught:
        prepare(tmp_path, rows)
    names = re.search(r"data\.text_columns=([\w,]+)", str(caught.value))
    assert names
    pairs, _ = prepare(tmp_path, rows, text_columns="prompt,chosen,rejected" if "prompt" in rows[0]
                       else "chosen,rejected")  # fmt: skip
    assert len(pairs) == 20


@pytest.mark.parametrize("text", [r"\neq and \nabla", "print('a\\n')\nprint('b')", r"C:\new"])
def test_a_backslash_and_an_n_that_break_no_line_are_text(tmp_path, text):
    rows = [{**pair_of(i), "chosen": f"{good(i)} {text}"} for i in range(20)]
    pairs, _ = prepare(tmp_path, rows)
    assert all(p.chosen.endswith(text) for p in pairs)


def test_columns_of_two_replies_are_not_taken_for_a_pair_beside_their_label(tmp_path):
    rows = [{**two(i), "winner": side(i, "model_a", "model_b")} for i in range(20)]
    settings = {"chosen_column": "response_a", "rejected_column": "response_b"}
    with pytest.raises(ConfigError, match=r"set data\.label_column=winner too"):
        prepare(tmp_path, rows, **settings)
    pairs, _ = prepare(tmp_path, rows, **settings, label_column="winner")
    assert right(pairs)
    rows = [{"Input.prompt": asked(i), **{f"Input.{k}": v for k, v in two(i).items()
                                          if k != "prompt"},
             "Answer.choice": side(i, "response_a", "response_b")} for i in range(20)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"label_column if another column says which is better"):
        prepare(tmp_path, rows)


def three(i):
    """Three replies under the names of an Argilla record's fields, in turns, and their ranks."""
    texts = [good(i), "So so.", bad(i)]
    order = [(k + i) % 3 for k in range(3)]
    fields = {f"response-{k}": texts[rank] for k, rank in enumerate(order, 1)}
    return fields, {f"response-{k}": rank + 1 for k, rank in enumerate(order, 1)}


RANKINGS = {
    "items with ranks": lambda ranks: [{"value": n, "rank": r} for n, r in ranks.items()],
    "names in order": lambda ranks: sorted(ranks, key=lambda name: ranks[name]),
    "names and ranks": lambda ranks: {"value": [*ranks], "rank": [*ranks.values()]},
}


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("is_table", [False, True])
def test_rankings_of_three_fields_are_read_and_their_annotators_counted(tmp_path, name, is_table):
    rows = []
    for i in range(20):
        fields, ranks = three(i)
        fields = {"prompt": asked(i), **fields}
        answer = {"value": RANKINGS[name](ranks), "status": "submitted", "user_id": f"u{i % 2}"}
        other = {"value": RANKINGS[name](ranks), "status": "discarded", "user_id": "u9"}
        answers = {"order": [answer, other]}
        rows.append({**fields, **answers} if is_table else {"fields": fields, "responses": answers})
    pairs, summary = prepare(tmp_path, rows, max_reply_share=None)
    assert summary["format"] == "argilla"
    assert len(pairs) == 60
    assert all("GOOD" in p.chosen or "BAD" in p.rejected for p in pairs)
    card = json.loads((tmp_path / "out" / files.CARD).read_text())
    assert {row["name"]: row["votes"] for row in card["annotators"]["rows"]} == {"u0": 10, "u1": 10}


def test_annotators_inside_of_label_studio_tasks_are_counted_by_their_votes(tmp_path):
    rows = []
    for i in range(20):
        row = judged(i, ("kind", "pairwise", "selected", side(i, "left", "right")))
        contrary = judged(i, ("kind", "pairwise", "selected", side(i, "right", "left")))
        votes = [row["annotations"][0], row["annotations"][0], contrary["annotations"][0]]
        users = (1, {"id": 2, "email": "a@b.example"}, 3)
        row["annotations"] = [{**v, "completed_by": u} for v, u in zip(votes, users, strict=True)]
        row["annotations"].append({"completed_by": 4, "was_cancelled": True, "result": []})
        rows.append(row)
    pairs, _ = prepare(tmp_path, rows)
    assert right(pairs)
    annotators = json.loads((tmp_path / "out" / files.CARD).read_text())["annotators"]
    assert {row["name"]: row["votes"] for row in annotators["rows"]} == {"1": 20, "2": 20, "3": 20}
    agreed = {row["name"]: row["agreement"]["share"] for row in annotators["rows"]}
    assert agreed["3"] == 0 < agreed["1"]


def test_label_studio_tasks_of_another_kind_say_so(tmp_path):
    result = {"from_name": "r", "type": "ranker", "value": {"ranker": {"rank": ["a", "b"]}}}
    rows = [{"data": two(i), "annotations": [{"result": [result]}]} for i in range(20)]
    with pytest.raises(ConfigError, match=r"it has ranker \(r\)"):
        prepare(tmp_path, rows)
