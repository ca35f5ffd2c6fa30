"""Two settings whose truth is known: the quickstart's world, and a rubric over a real model.

On the world everything is the quickstart's. On the rubric (`benchmarks.pretrained`) the policy is a
pretrained chat model with LoRA, prompts are real, and gold is points for the form of a reply. Pairs
are few there, and most are the judge's: its default tenth of them would teach it nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.gates.over_optimisation import Setting
from benchmarks.gates.pool import make_judge, make_start
from benchmarks.pretrained import __main__ as pretrained
from benchmarks.pretrained.rubric import gold as rubric_gold
from rlhf.config import PipelineConfig, load_config
from rlhf.data.rows import PAIRS_EVAL, Pair, Prompt, PromptRow, read_rows
from rlhf.files import read_json

#: Prompts that gold is measured on.
PROMPTS = {"world": 400, "rubric": 96}
#: Seed of the world that the prompts come from.
_PROMPT_SEED = 90_002


def world(config: PipelineConfig, work: Path) -> Setting:
    """Make what is missing for runs on the world in a folder."""
    from rlhf.world import generate, gold

    data, sft = make_start(config, work)
    make_judge(config, data, sft, work / "judge")
    section = config.data.world.model_copy(update={"eval_prompts": PROMPTS["world"], "pairs": 10})
    rows = [PromptRow(r.prompt, r.group) for r in generate(section, _PROMPT_SEED).eval_prompts]

    def points(prompt: Prompt, reply: str) -> float:
        return gold(str(prompt), reply)

    return Setting(config, data, sft, work / "judge", points, rows)


def rubric(work: Path, model: Path, replies: Path) -> Setting:
    """Make what is missing for runs on a pretrained model in a folder.

    Args:
        work: Folder.
        model: Pretrained chat model.
        replies: `replies.json` of `benchmarks.pretrained`: prompts, and the model's own replies.
    """
    work.mkdir(parents=True, exist_ok=True)
    pairs, demonstrations = work / "pairs.jsonl", work / "demonstrations.jsonl"
    if not demonstrations.is_file():
        shutil.copy(replies, work / "replies.json")
        pretrained.write_pairs(read_json(replies)["replies"], pairs)
        pretrained.write_demonstrations(pairs, demonstrations)
    options = [
        *pretrained.RUN, f"--base.path={model}", f"--data.source={pairs}",
        f"--data.sft_source={demonstrations}", "--data.judge_fraction=0.6",
    ]  # fmt: skip
    config = load_config(Path(pretrained.PRESET), options).config
    data, sft = make_start(config, work)
    make_judge(config, data, sft, work / "judge")
    held_out = {repr(pair.prompt): pair for pair in read_rows(data / PAIRS_EVAL, Pair)}
    rows = [PromptRow(pair.prompt, pair.group) for pair in held_out.values()]
    return Setting(config, data, sft, work / "judge", _rubric_points, rows[: PROMPTS["rubric"]])


def _rubric_points(prompt: Prompt, reply: str) -> float:
    messages: Any = prompt
    return rubric_gold(str(messages[-1]["content"]), reply)
