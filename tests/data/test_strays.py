"""Chats written as text are never trained on as one turn, wherever in a row they stand."""

import json

import pytest

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.data.strays import check_reply, check_stray
from rlhf.errors import ConfigError, DataError

Q, R = "Why does my lamp flicker?", "The bulb is loose."
CHAT = [{"role": "user", "content": Q}, {"role": "assistant", "content": R}]
#: A question as templates write it, the reply still to come.
PROMPTS = {
    "JSON": json.dumps(CHAT[:1]),
    "Python": repr(CHAT[:1]),
    "HH": f"\n\nHuman: {Q}\n\nAssistant:",
    "lower case": f"human: {Q}\nassistant:",
    "upper case": f"HUMAN: {Q}\nASSISTANT:",
    "one line": f"Human: {Q} Assistant:",
    "Vicuna": f"A chat between two. USER: {Q} ASSISTANT:",
    "PKU": f"BEGINNING OF CONVERSATION: USER: {Q} ASSISTANT:",
    "Alpaca": f"### Instruction:\n{Q}\n\n### Response:\n",
    "Guanaco": f"### Human: {Q}\n### Assistant:",
    "Beluga": f"### System:\nBe kind.\n\n### User:\n{Q}\n\n### Assistant:\n",
    "bold": f"**User:** {Q}\n**Assistant:**",
    "OIG": f"<human>: {Q}\n<bot>:",
    "OpenChat": f"GPT4 Correct User: {Q}<|end_of_turn|>GPT4 Correct Assistant:",
    "ChatML": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
    "Llama 2": f"<s>[INST] {Q} [/INST]",
    "Llama 4": f"<|begin_of_text|><|header_start|>user<|header_end|>\n\n{Q}<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n",
    "Open Assistant": f"<|prompter|>{Q}<|endoftext|><|assistant|>",
    "Granite": f"<|start_of_role|>user<|end_of_role|>{Q}<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "EXAONE": f"[|user|]{Q}\n[|assistant|]",
}
#: Forms of which only columns are taken for chats: other texts begin like them.
WEAK = {
    "Q and A": f"Q: {Q}\nA:",
    "Question": f"Question: {Q}\n\nAnswer:",
    "Phi": f"Instruct: {Q}\nOutput:",
    "support": f"Customer: {Q}\nAgent: Hm.\nCustomer: {Q}",
    "Chinese": f"问：{Q}\n答：",
}
#: Forms that can't be read back.
REFUSED = {
    "harmony": f"<|start|>user<|message|>{Q}<|end|><|start|>assistant",
    "Mistral": f"<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]{Q}[/INST]",
    "GLM": f"[gMASK]<sop><|user|>\n{Q}<|assistant|>",
    "Nemotron": f"<extra_id_0>System\n\n<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n",
    "Baichuan": f"<reserved_106>{Q}<reserved_107>",
    "parts": json.dumps([{"type": "text", "text": Q}]),
    "bytes": repr(Q.encode()),
}

#: Forms that a reply may have as an answer: they are rendered where they are the row's own turns.
AS_REPLY = {
    "JSON": json.dumps(CHAT[1:]),
    "Python": repr(CHAT[1:]),
    "parts": json.dumps(CHAT[1:]),
    "bytes": json.dumps(CHAT[1:]),
}


def prepare(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    out.mkdir()
    prepare_data(DataConfig(source=str(folder / "data.jsonl")), out)
    pairs = [p for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
             for p in files.read_rows(out / name, files.Pair)]  # fmt: skip
    return pairs, json.loads((out / files.SUMMARY).read_text())


def plain(i, **more):
    return {"prompt": f"{Q} {i}", "chosen": f"{R} {i}", "rejected": f"No. {i}", **more}


@pytest.mark.parametrize("form", [*PROMPTS, *WEAK])
def test_columns_of_chats_are_parsed(tmp_path, form):
    text = {**PROMPTS, **WEAK}[form]
    pairs, summary = prepare(
        tmp_path, [plain(i, prompt=text.replace("lamp", f"lamp {i}")) for i in range(20)]
    )
    assert len(pairs) == 20
    for pair in pairs:
        last = pair.prompt[-1]
        assert last["role"] == "user"
        assert last["content"] == Q.replace("lamp", last["content"].split("my ")[1][:7].strip())
    assert any("which are parsed" in note for note in summary["notes"])


@pytest.mark.parametrize("form", REFUSED)
def test_columns_that_can_not_be_read_back_are_refused(tmp_path, form):
    rows = [plain(i, prompt=REFUSED[form]) for i in range(20)]
    with pytest.raises(ConfigError, match="column 'prompt' holds chats written as"):
        prepare(tmp_path, rows)


@pytest.mark.parametrize("form", [*PROMPTS, *REFUSED])
def test_a_single_chat_leaves_its_row_out_wherever_it_stands(tmp_path, form):
    text = {**PROMPTS, **REFUSED}[form]
    rows = [plain(i, system="") for i in range(300)]
    rows[250] = plain(250, prompt=text)
    rows[251] = plain(251, prompt=[{"role": "user", "content": text}])
    rows[252] = plain(252, prompt=[{"role": "system", "content": text}, *CHAT[:1]])
    rows[253] = plain(253, system=text)
    text = AS_REPLY.get(form, text)
    rows[254] = plain(254, chosen=text)
    rows[255] = plain(255, rejected=text)
    pairs, summary = prepare(tmp_path, rows)
    assert len(pairs) == 294
    assert sum(summary["left_out"].values()) == 6
    assert text not in str(pairs)


def test_a_reply_that_goes_on_with_a_further_turn_is_left_out(tmp_path):
    rows = [plain(i) for i in range(30)]
    rows[7]["rejected"] += "\n\nHuman: And now?\n\nAssistant: Turn it."
    pairs, summary = prepare(tmp_path, rows)
    assert len(pairs) == 29
    assert summary["left_out"] == {"rejected goes on with a further turn": 1}


def test_many_chats_among_other_replies_stop_the_stage(tmp_path):
    rows = [plain(i, chosen=json.dumps(CHAT[1:]) if i % 3 == 0 else R) for i in range(30)]
    with pytest.raises(DataError, match="chosen is a chat written as text, unlike other rows"):
        prepare(tmp_path, rows)


@pytest.mark.parametrize(
    "text",
    ["**Note:** do this.", "### Steps\n1. Go.", "[1] Smith, 2020.", "{x | x > 0}", "<b>Go</b>",
     "User: is a role.", "Human: A Very Short History", "Q: Why?\nA: So.", "You are right.",
     '["a", "b"]', "b' is the derivative", "System: Linux\nShell: bash", "[[1, 2], [3, 4]]",
     "<think>Hm.</think>Go.", "You are kind.\nUSER is a name"],
)  # fmt: skip
def test_other_texts_are_left_alone(text):
    check_stray(text, "prompt")
    check_reply(text, "chosen")
