"""Columns that a template wrote are never trained with its marks in silence; other texts stay."""

from __future__ import annotations

import contextlib
import csv
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.data.shared_marks import (
    FORMAT,
    SPEAKER,
    Marks,
    MarkWatch,
    closing_mark,
    inner_turn,
    opening_mark,
)
from rlhf.errors import ConfigError
from tests.data.legitimate import PROMPTS, REPLIES
from tests.examples import examples

WORDS = ("kettle", "lamp", "tea", "sonnet", "river", "novel", "brick", "rust", "otter", "owl")
#: Prompts of templates that no parser knows.
UNKNOWN = {
    "escaped line breaks": "\\n\\nHuman: {}\\n\\nAssistant:",
    "escaped ChatML": "<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n",
    "HTML escapes": "&lt;|im_start|&gt;user\n{}&lt;|im_end|&gt;",
    "a system sentence": "Be concise.\n\nHuman: {}\n\nAssistant:",
    "a system sentence, Vicuna": "Answer well. USER: {} ASSISTANT:",
    "a system sentence, Alpaca": "You are an expert.\n\n### Instruction:\n{}\n\n### Response:\n",
    "a system sentence, no reply yet": "Be concise.\n\nHuman: {}",
    "heading without colon": "### User\n{}\n\n### Assistant\n",
    "small heading": "## User\n{}\n\n## Assistant\n",
    "other heading": "# Instruction:\n{}\n\n# Response:\n",
    "brackets": "[Human]: {}\n[Assistant]:",
    "brackets without colon": "[USER] {} [ASSISTANT]",
    "bold": "**User**: {}\n\n**Assistant**:",
    "tags": "<user>{}</user><assistant>",
    "tag with role": "<turn role='user'>{}</turn>\n<turn role='assistant'>",
    "stamps": "[10:31] User: {}\n[10:32] Assistant:",
    "WhatsApp": "01/02/24, 10:31 - User: {}\n01/02/24, 10:32 - Bot:",
    "numbers": "1. User: {}\n2. Assistant:",
    "two persons": "Person 1: {}\nPerson 2:",
    "other names": "Student: {}\nTeacher:",
    "quoted": "> User: {}\n> Assistant:",
    "lines": "USER\n{}\nASSISTANT\n",
    "bars": "user|{}",
    "emoji": "🧑 {}\n🤖",
    "emoji with a skin": "👩🏽: {}\n🤖:",
    "page": "You said:\n{}",
    "page with both": "You said:\n{}\nChatGPT said:",
    "captions": "User asks: {}",
    "Discord": "ann — Today at 10:31\n{}",
    "Discord, other days": "ann — 01/02/2024 10:31 AM\n{}",
    "Slack": "Ann  10:31 AM\n{}",
    "Telegram": "Ann, [01.02.2024 10:31]\n{}",
    "heading with a dash": "Question – {}",
    "signs": "=== USER ===\n{}\n=== ASSISTANT ===\n",
    "parentheses": "(User) {}\n(Assistant)",
    "blank before colon": "User : {}\nAssistant :",
    "line break in HTML": "Human: {}<br><br>Assistant:",
    "bold in HTML": "<b>User:</b> {}<br><b>Assistant:</b>",
    "TL;DR": "SUBREDDIT: r/x\nTITLE: t\nPOST: {}\nTL;DR:",
    "German": "Benutzer: {}\nAssistent:",
    "French": "Utilisateur : {}\nAssistant :",
    "Spanish": "Usuario: {}\nAsistente:",
    "Portuguese": "Usuário: {}\nAssistente:",
    "Russian": "Пользователь: {}\nАссистент:",
    "Japanese": "ユーザー: {}\nアシスタント:",
    "Korean": "사용자: {}\n어시스턴트:",
    "Chinese": "用户: {}\n助手:",
    "Hindi": "उपयोगकर्ता: {}\nसहायक:",
    "Arabic": "المستخدم: {}\nالمساعد:",
    "InternLM": "<|User|>:{}<eoh>\n<|Bot|>:",
    "InternLM 2": "[UNUSED_TOKEN_146]user\n{}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    "ChatGLM 2": "[Round 1]\n\n问：{}\n\n答：",
    "Kimi": "<|im_user|>user<|im_middle|>{}<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "Jamba": "<|startoftext|><|bom|><|user|> {}<|eom|><|bom|><|assistant|>",
    "StableLM": "<|SYSTEM|>S<|USER|>{}<|ASSISTANT|>",
    "Metharme": "<|system|>S<|user|>{}<|model|>",
    "Saiga": "<s>user\n{}</s>\n<s>bot\n",
    "Seed": "<seed:bos>user\n{}<seed:eos><seed:bos>assistant\n",
    "MiniCPM": "<用户>{}<AI>",
    "Koala": "BEGINNING OF CONVERSATION: USER: {} GPT:",
    "Falcon": "User: {}\nFalcon:",
    "end token": "{} <|endoftext|>",
    "YAML": "- role: user\n  content: {}\n- role: assistant\n  content:",
    "LangChain": "[HumanMessage(content='{}')]",
    "JavaScript": "[{{role: 'user', content: '{}'}}]",
    "wrapped": '{{"question": "{}"}}',
    "wrapped chat": '{{"id": 3, "messages": [{{"role": "user", "content": "{}"}}]}}',
}
ENDS = (
    "<extra_id_1>", "[UNUSED_TOKEN_145]", "<eoh>", "<|eom|>", "[PAD]", "<unk>", "<|pad|>", "<EOS>",
    "</S>", "[SEP]", "<|eos|>", "<end_of_text>", "<|eod|>", "<|EOT|>", "<end_of_sentence>",
    "<|eot_id|><|start_header_id|>user", "###", "### Human", "</assistant>", "<|stop|>",
    "<end_of_utterance>", "[/ASSISTANT]", "<seed:eos>", "[EOT]", "&lt;/s&gt;", "<\\/s>",
    "\n\nHuman:", "\n[USER]",
)  # fmt: skip
HEADS = (
    "AI: ", "Bot - ", "assistant: ", "A: ", "Answer: ", "**Assistant:** ", "助手：",
    "<bot>: ", "Model: ", "Claude: ", "ChatGPT: ", "[Assistant] ", "assistant\n", "[/INST] ",
    "Assistent: ", "Response: ", "<reserved_107>", "<assistant>",
    "<|channel|>final<|message|>", "ChatGPT said:\n", "Claude responded: ", "Answer - ",
    "bot — Yesterday at 9:05 PM\n",
)  # fmt: skip
RUNS = (
    "\n\nQ: more?\nA: yes", "\n\nQuestion: more?\nAnswer: yes", "\n<human>: more?\n<bot>: yes",
    "\n### Human\nmore?\n### Assistant\nyes", "\n\n### Instruction:\nmore?\n\n### Response:\nyes",
    "\nUser: more?\nBot: yes", "\nCustomer: more?\nAgent: yes", "\nuser: more?\nassistant: yes",
    "\nuser\nmore?\nassistant\nyes", "\n\nHuman: more?", " USER: more? ASSISTANT: yes",
    "\n用户：more?\n助手：yes",
    "\n\n**User:** more?\n\n**Assistant:** yes", "user\nmore?\nassistant\nyes",
    "\n🧑 more?\n🤖 yes", "\nYou said:\nmore?\nChatGPT said:\nyes", "\nann — Today at 10:33\nmore?",
    "\n<user>more?</user>\n<assistant>yes", "\nInput: more?\nOutput: yes",
)  # fmt: skip


def question(i):
    return f"{WORDS[i % 10].title()} or {WORDS[i // 10 % 10]}, which of them comes {i}th?"


def answer(i):
    return f"{WORDS[i // 10 % 10].title()} {i}, since {WORDS[i % 10]} is {'no' * (i % 3)}t."


def plain(i, **more):
    return {"prompt": question(i), "chosen": answer(i), "rejected": f"Never, {answer(i)}", **more}


def prepare(folder, rows, **settings):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    settings = {"near_duplicates": None, "max_reply_share": None, **settings}
    prepare_data(DataConfig(source=str(folder / "data.jsonl"), **settings), out)
    pairs = [p for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
             for p in files.read_rows(out / name, files.Pair)]  # fmt: skip
    return pairs, json.loads((out / files.SUMMARY).read_text())


@pytest.mark.parametrize("form", UNKNOWN)
def test_prompts_of_unknown_templates_are_refused_with_the_setting(tmp_path, form):
    rows = [plain(i, prompt=UNKNOWN[form].format(question(i))) for i in range(20)]
    with pytest.raises(ConfigError, match=r"data\.text_columns=prompt"):
        prepare(tmp_path, rows)
    pairs, summary = prepare(tmp_path, rows, text_columns="prompt")
    assert {pair.prompt for pair in pairs} == {row["prompt"] for row in rows}
    assert summary["left_out"] == {}


def test_prompts_of_messages_are_checked_too(tmp_path):
    rows = [
        plain(i, prompt=[{"role": "user", "content": f"Be so.\n\nHuman: {question(i)}\n\nAI:"}])
        for i in range(20)
    ]
    with pytest.raises(ConfigError, match=r"end with 'AI:'.*data.text_columns=prompt"):
        prepare(tmp_path, rows)


@pytest.mark.parametrize("end", ENDS)
def test_replies_that_end_alike_are_refused(tmp_path, end):
    rows = [plain(i, chosen=answer(i) + end, rejected=f"No. {i}" + end) for i in range(20)]
    with pytest.raises(ConfigError, match=r"data\.text_columns=chosen"):
        prepare(tmp_path, rows)
    pairs, _ = prepare(tmp_path, rows, text_columns=["chosen", "rejected"])
    assert {pair.chosen for pair in pairs} == {row["chosen"] for row in rows}


@pytest.mark.parametrize("head", HEADS)
def test_replies_that_name_their_speaker_are_refused(tmp_path, head):
    rows = [plain(i, chosen=head + answer(i), rejected=f"{head}No. {i}") for i in range(20)]
    with pytest.raises(ConfigError, match=r"data\.text_columns=chosen"):
        prepare(tmp_path, rows)
    pairs, _ = prepare(tmp_path, rows, text_columns="chosen,rejected")
    assert {pair.chosen for pair in pairs} == {row["chosen"] for row in rows}


@pytest.mark.parametrize("run", RUNS)
def test_replies_that_go_on_with_a_further_turn_are_refused(tmp_path, run):
    rows = [plain(i, rejected=f"{answer(i + 7)}{run}") for i in range(20)]
    with pytest.raises(ConfigError, match=r"data\.text_columns=rejected"):
        prepare(tmp_path, rows)


def test_the_name_of_the_assistant_is_cut_and_other_words_stay(tmp_path):
    rows = [plain(i, chosen=f"Assistant: {answer(i)}") for i in range(20)]
    rows[3]["chosen"] = "AI: The Next Wave"
    pairs, _ = prepare(tmp_path, rows)
    expected = {answer(i) for i in range(20) if i != 3} | {"AI: The Next Wave"}
    assert {pair.chosen for pair in pairs} == expected


def test_single_texts_about_chats_stay_as_they_are(tmp_path):
    rows = [plain(i) for i in range(900)]
    for index, text in enumerate(PROMPTS):
        rows[20 * index + 3]["prompt"] = text
    for index, text in enumerate(REPLIES):
        rows[16 * index + 5]["chosen"] = text
        rows[16 * index + 11]["rejected"] = text
    pairs, summary = prepare(tmp_path, rows)
    assert summary["left_out"] == {}
    keys = ("prompt", "chosen", "rejected")
    assert {tuple(row[key] for key in keys) for row in rows} == {
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs
    }


def test_marks_of_later_rows_stop_the_stage(tmp_path):
    later = [plain(i, prompt=f"Student: {question(i)}\nTeacher:") for i in range(200, 700)]
    with pytest.raises(ConfigError, match=r"begin with 'Student:'"):
        prepare(tmp_path, [*(plain(i) for i in range(200)), *later])


@pytest.mark.parametrize(
    ("rows", "is_marked", "is_refused"),
    [
        (3000, lambda i: i >= 200 and i % 5 > 0, True),
        (3000, lambda i: i % 2 == 0, False),
        (9000, lambda i: 6000 <= i < 8000, True),
        (9000, lambda i: 6000 <= i < 8000 and i % 5 > 0, False),
        (9000, lambda i: 6000 <= i < 6500, False),
    ],
    ids=["most rows", "half", "a stretch", "most of a stretch", "a short stretch"],
)
def test_marks_are_counted_over_the_whole_file(rows, is_marked, is_refused):
    watch = MarkWatch({"prompt": Marks("prompt", is_reply=False)})
    texts = [f"Student: {question(i)}\nTeacher:" if is_marked(i) else question(i)
             for i in range(rows)]  # fmt: skip
    with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext():
        for text in texts:
            watch.see("prompt", text)


def test_marks_of_half_of_the_rows_are_content(tmp_path):
    rows = [plain(i) for i in range(600)]
    for i in range(0, 600, 2):
        rows[i]["prompt"] = f"Student: {question(i)}\nTeacher:"
    assert len(prepare(tmp_path, rows)[0]) == 600


def test_turns_of_help_steer_are_parsed_in_the_rows_that_have_them(tmp_path):
    turns = "\n<extra_id_1>Assistant\nSo.\n<extra_id_1>User\nWhy?"
    rows = [plain(i, prompt=question(i) + (turns if i % 5 == 0 else "")) for i in range(20)]
    pairs, summary = prepare(tmp_path, rows)
    assert sum(isinstance(pair.prompt, str) for pair in pairs) == 16
    for pair in pairs:
        if not isinstance(pair.prompt, str):
            roles = [message["role"] for message in pair.prompt]
            assert roles == ["user", "assistant", "user"]
            assert pair.prompt[2]["content"] == "Why?"
    assert any("<extra_id_1> in prompt are parsed" in note for note in summary["notes"])


@pytest.mark.parametrize(
    "opener", ["Sure! ", "A. ", "B) ", "A - ", "As an AI language model, ", "🤖 ", "Answer\n"]
)
def test_words_that_nearly_all_texts_begin_with_stay_and_are_told(tmp_path, opener):
    word = opener.strip()
    rows = [plain(i, chosen=opener + answer(i), rejected=f"{WORDS[i % 10]} {i} never")
            for i in range(20)]  # fmt: skip
    rows[3]["chosen"] = "Another one."
    pairs, summary = prepare(tmp_path, rows)
    assert {pair.chosen for pair in pairs} == {row["chosen"] for row in rows}
    notes = [n for n in summary["notes"] if repr(word) in n]
    assert notes[0] == f"nearly all texts of chosen begin with {word!r}, which stays in them"
    assert notes[1].startswith(f"{word!r} tells chosen from rejected")
    for row in rows:
        row["rejected"] = opener + row["rejected"]
    notes = [n for n in prepare(tmp_path, rows)[1]["notes"] if repr(word) in n]
    assert [note.split()[4] for note in notes] == ["chosen", "rejected"]


@pytest.mark.parametrize("opener", ["Sure! ", "A. ", "🧑 "])
def test_words_that_many_texts_begin_with_are_not_told(tmp_path, opener):
    rows = [plain(i, chosen=(opener if i % 3 else "") + answer(i), rejected=f"{WORDS[i % 10]} {i}")
            for i in range(20)]  # fmt: skip
    pairs, summary = prepare(tmp_path, rows)
    assert {pair.chosen for pair in pairs} == {row["chosen"] for row in rows}
    assert not any("nearly all" in note or "tells" in note for note in summary["notes"])


@pytest.mark.parametrize(
    "ending",
    [" Let me know if you have any other questions!", " I hope this helps! 😊",
     "\n\nHope this helps", "希望对您有帮助！", " *I hope this helps.*</s>"],
)  # fmt: skip
def test_a_sentence_that_most_replies_end_with_stays_and_is_told(tmp_path, ending):
    shown = repr(ending.removesuffix("</s>").strip())
    stop = "." if ending.isascii() or ending[0] == " " else "。"
    rows = [plain(i, chosen=f"{answer(i)} Really{stop}{ending if i % 4 else ''}",
                  rejected=f"Never. {WORDS[i % 10]} {i}") for i in range(40)]  # fmt: skip
    pairs, summary = prepare(tmp_path, rows)
    assert {pair.chosen for pair in pairs} == {row["chosen"].removesuffix("</s>") for row in rows}
    assert [n for n in summary["notes"] if shown in n] == [
        f"most texts of chosen end with {shown}, which stays in them",
        f"{shown} tells chosen from rejected without a look at the rest: a reward model may learn "
        "that alone; cut it, or write it at the end of both",
    ]
    assert "most texts of chosen end with" in (tmp_path / "out" / "card.md").read_text()
    for row in rows:
        row["rejected"] += f"{stop}{ending}"
    notes = [n for n in prepare(tmp_path, rows)[1]["notes"] if shown in n]
    assert [note.split()[3] for note in notes] == ["chosen", "rejected"]


def test_endings_of_half_of_the_replies_and_whole_replies_are_not_told(tmp_path):
    rows = [plain(i, chosen=f"{answer(i)} So." + (" I hope this helps!" if i % 2 else ""))
            for i in range(40)]  # fmt: skip
    assert not any("end with" in note for note in prepare(tmp_path, rows)[1]["notes"])
    same = [plain(i, rejected="I hope this helps!") for i in range(40)]
    assert not any("end with" in note for note in prepare(tmp_path, same)[1]["notes"])


def test_emoji_of_both_speakers_are_a_template_and_single_ones_are_content():
    assert opening_mark("🧑 Why?\n🤖") == (SPEAKER, "🧑")
    assert opening_mark("🧑 is a person") is None
    assert inner_turn("🤖 Hi.\n🧑 Why?\n🤖 So.") == (SPEAKER, "🧑")
    assert inner_turn("List:\n🤖 a robot\n🧑 a person") is None


def test_other_shared_edges_are_told(tmp_path):
    rows = [plain(i, prompt=f">>> {question(i)}", chosen=f"Alice: {answer(i)}") for i in range(20)]
    pairs, summary = prepare(tmp_path, rows)
    assert {pair.prompt for pair in pairs} == {row["prompt"] for row in rows}
    assert [note for note in summary["notes"] if note.startswith("most")] == [
        "most texts of prompt begin with '>>> ', which stays in them",
        "most texts of chosen begin with 'Alice:', which stays in them",
    ]


def test_answers_about_chats_need_the_setting_where_all_are(tmp_path):
    chats = [json.dumps([{"role": "user", "content": WORDS[i % 10]},
                         {"role": "assistant", "content": f"{i}"}]) for i in range(20)]  # fmt: skip
    rows = [plain(i, chosen=chats[i]) for i in range(20)]
    with pytest.raises(ConfigError, match=r"none of which.*data.text_columns=chosen"):
        prepare(tmp_path, rows)
    pairs, _ = prepare(tmp_path, rows, text_columns="chosen")
    assert {pair.chosen for pair in pairs} == {*chats}


def test_lists_among_replies_stay_if_some_have_several_texts(tmp_path):
    with (tmp_path / "data.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerows([question(i), f'["a", "b{i}"]', f'["c{i}"]'] for i in range(20))
    (tmp_path / "out").mkdir()
    prepare_data(DataConfig(source=str(tmp_path / "data.csv")), tmp_path / "out")
    pairs = [*files.read_rows(tmp_path / "out" / files.PAIRS_TRAIN, files.Pair)]
    assert all(pair.rejected.startswith('["c') for pair in pairs)


def test_a_text_column_that_is_not_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.text_columns: 'promt' is not read"):
        prepare(tmp_path, [plain(i) for i in range(20)], text_columns="promt")


# --- any template -----------------------------------------------------------------------------

TEXTS = st.lists(
    st.text(string.ascii_letters + "äß漢字 ,", min_size=12, max_size=40).filter(str.strip),
    min_size=8, max_size=12, unique=True,
)  # fmt: skip
NAMES = st.text(string.ascii_letters + "éЖ用", min_size=2, max_size=12)


@st.composite
def marks(draw):
    """Return an opening and a closing mark of a template that nobody has seen."""
    one, other = draw(NAMES), draw(NAMES)
    pattern = draw(st.sampled_from(
        ["<|{}|>", "<{}>", "{}: ", "### {}\n", "[{}]: ", "**{}:** ", "<｜{}｜>", "[|{}|]",
         "## {}:\n"]
    ))  # fmt: skip
    return pattern.format(one), "\n" + pattern.format(other)


@given(texts=TEXTS, mark=marks(), is_reply=st.booleans())
@settings(max_examples=examples(150), deadline=None)
def test_a_column_with_shared_marks_is_never_taken_in_silence(texts, mark, is_reply):
    counts = Marks("prompt", is_reply)
    for text in texts:
        counts.add(f"{mark[0]}{text}.{mark[1]}")
    try:
        assert counts.check() is not None
    except ConfigError as error:
        assert "data.text_columns=prompt" in str(error)  # noqa: PT017


@given(texts=TEXTS, cut=st.integers(1, 3))
@settings(max_examples=examples(100), deadline=None)
def test_texts_without_shared_marks_are_left_alone(texts, cut):
    counts = Marks("prompt", is_reply=cut == 1)
    for index, text in enumerate(texts):
        counts.add(f"{index}{text}." if cut == 1 else f"{text[cut:]}{index}?")
    assert counts.check() is None


@pytest.mark.parametrize(
    "text",
    ["Sure, here it is.", "Yes: it is so.", "<p>Hi</p>", "<think>Hm.</think>So.", "x < y",
     "1. Go.",
     "https://a.b/c",
     "10:30 is too late", "(a) yes", "", " ", "# ", "```python\nx\n```", "$x$ is",
     "def f(x):\n    return x", "\\[ x \\]", "| a | b |", "- one\n- two", "Hello there\nAnn"],
)  # fmt: skip
def test_texts_without_marks_of_templates(text):
    found = [mark for mark in (opening_mark(text), closing_mark(text)) if mark is not None]
    assert all(mark.kind in ("name", FORMAT) for mark in found)
    assert inner_turn(text) is None
