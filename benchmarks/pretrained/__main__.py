"""A pretrained model end to end: `python -m benchmarks.pretrained --model DIR --pairs FILE`.

Real prompts, replies sampled from the model itself, and a gold rubric over their text that labels
pairs of them by Bradley–Terry, so that the truth is known on a real model. The whole pipeline runs
by its command once a seed; the figures are gold's: accuracy of the reward model beside the best
that the labels allow, wins of the policy over its SFT start on held-out prompts, and KL. Then a
reward model on the real pairs of the file, beside choosing the longer reply.

Results are kept in --work and not made again. Run nothing else meanwhile: times are reported.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.pretrained import report
from benchmarks.pretrained.rubric import gold, preference
from rlhf.data.rendering import load_renderer
from rlhf.files import read_json, write_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.critic import freeze
from rlhf.modeling.device import fast_float32
from rlhf.modeling.generate import generate
from rlhf.modeling.sampling import Sampling

PRESET = "configs/lora.yaml"
#: What somebody would write who wants short answers; it takes the place of the template's own.
SYSTEM = "Answer in one to three short sentences."
#: A model of this size writes nonsense at 1.0.
TEMPERATURE = 0.7
NEW_TOKENS, REPLIES, BATCH = 64, 2, 128
#: Gold points that make a preference e : 1.
LABEL_TEMPERATURE = 0.5
#: Exit code of a run that a gate stopped.
REJECTED = 3

#: Every third of the replies that were preferred is a demonstration.
DEMONSTRATED = 3
#: Settings in which a run differs from `PRESET`, which has the others that were measured.
RUN = [
    f"--ppo.max_new_tokens={NEW_TOKENS}", f"--ppo.temperature={TEMPERATURE}",
    "--reward_model.learning_rate=3e-4",
    "--data.eval_fraction=0.15", f"--evaluation.temperature={TEMPERATURE}",
    "--evaluation.prompts=120", "--evaluation.batch_size=60",
]  # fmt: skip
REAL = [
    "--sft.enabled=false", "--reward_model.max_length=256", "--data.max_pairs=800",
    "--data.eval_fraction=0.5", "--evaluation.batch_size=16",
]  # fmt: skip
REAL_STAGES = ("prepare-data", "train-sft", "train-reward-model", "evaluate-reward-model")


def main() -> None:
    """Make the missing results, then report."""
    args, overrides = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    work, model = Path(args.work), Path(args.model)
    work.mkdir(parents=True, exist_ok=True)
    once(work / "replies.json", lambda: sample_replies(model, prompts_of(Path(args.pairs))))
    pairs = work / "pairs.jsonl"
    write_pairs(read_json(work / "replies.json")["replies"], pairs)
    write_demonstrations(pairs, work / "demonstrations.jsonl")
    common = [f"--base.path={model}", "--tracking.trackers=[]", *overrides]
    for seed in args.seeds:
        name = f"seed{seed}"
        sources = [
            f"--data.source={pairs}", f"--data.sft_source={work / 'demonstrations.jsonl'}",
        ]  # fmt: skip
        given = [f"--seed={seed}", *sources, *RUN, *common]
        once(work / f"{name}.json", lambda name=name, given=given: run(work / name, given))
    if not args.no_real:
        given = [f"--data.source={args.pairs}", *REAL, *common]
        once(work / "real.json", lambda: run(work / "real", given, REAL_STAGES))
    report.show(work, args.seeds, LABEL_TEMPERATURE)


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse options, and overrides of the preset for every run (`--ppo.kl_coef=0.1`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a pretrained chat model")
    add("--pairs", required=True, help="real pairs, JSON lines of prompt, chosen, rejected")
    add("--seeds", type=int, nargs="*", default=[0, 1])
    add("--work", default=".rlhf/pretrained", help="folder of results; kept")
    add("--no-real", action="store_true", help="skip the reward model on the real pairs")
    return parser.parse_known_args(given)


def once(path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Write what `make` returns, and the seconds it took, unless that was done before."""
    if path.is_file():
        return
    print(f"{path.stem} …", flush=True)
    started = time.monotonic()
    result = make()
    write_json(path, {**result, "seconds": time.monotonic() - started})


def prompts_of(pairs: Path) -> list[str]:
    """Return the distinct prompts of a file of pairs, in its order."""
    opened = gzip.open if pairs.suffix == ".gz" else open
    with opened(pairs, "rt", encoding="utf-8") as lines:
        return [*dict.fromkeys(json.loads(line)["prompt"] for line in lines)]


@torch.no_grad()
def sample_replies(model: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Sample `REPLIES` replies to each prompt, prompts of one length together."""
    device, renderer = torch.device("cpu"), load_renderer(model)
    policy = freeze(load_policy(model))
    encoded = [renderer.encode_prompt(messages(p), 1024) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    rows = [i for i in order for _ in range(REPLIES)]
    replies: dict[int, list[str]] = {i: [] for i in order}
    tokens, started = 0, time.monotonic()
    with fast_float32(device):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            sampled = generate(
                policy, [encoded[i] for i in batch], renderer.tokenizer,
                Sampling(NEW_TOKENS, TEMPERATURE), start, ends=renderer.end_ids,
            )  # fmt: skip
            for i, ids in zip(batch, sampled.rows(), strict=True):
                replies[i].append(renderer.decode(ids))
            tokens += int(sampled.mask.sum())
            print(f"{start + len(batch)} of {len(rows)} replies", end="\r", flush=True)
    rate = tokens / (time.monotonic() - started)
    return {
        "replies": [[prompts[i], replies[i]] for i in range(len(prompts))],
        "tokens": tokens, "tokens_per_second": rate,
    }  # fmt: skip


def write_pairs(replies: Sequence[tuple[str, list[str]]], path: Path) -> None:
    """Write pairs of different replies to a prompt, labelled by Bradley–Terry on gold."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for prompt, texts in replies:
            for row in _pairs(rng, prompt, texts):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _pairs(rng: random.Random, prompt: str, texts: list[str]) -> Iterator[dict[str, Any]]:
    different = [*dict.fromkeys(text.strip() for text in texts if text.strip())]
    for first, second in zip(different[::2], different[1::2], strict=False):
        odds = preference(gold(prompt, first), gold(prompt, second), LABEL_TEMPERATURE)
        chosen, rejected = (first, second) if rng.random() < odds else (second, first)
        answers = (("chosen", chosen), ("rejected", rejected))
        yield {
            "prompt": messages(prompt),
            **{name: [{"role": "assistant", "content": text}] for name, text in answers},
        }


def write_demonstrations(pairs: Path, path: Path) -> None:
    """Write the chats of some of the replies that were preferred."""
    with pairs.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as file:
        for row in map(json.loads, islice(lines, 0, None, DEMONSTRATED)):
            chat = {"messages": [*row["prompt"], *row["chosen"]]}
            file.write(json.dumps(chat, ensure_ascii=False) + "\n")


def messages(prompt: str) -> list[dict[str, str]]:
    """Return the chat that a reply answers."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def run(place: Path, overrides: list[str], stages: Sequence[str] = ()) -> dict[str, Any]:
    """Run the pipeline, or some of its stages, by the command; return what it made.

    A gate may stop a run: its evaluation is there all the same, and the exit code is reported.
    """
    folders = {"store": "store", "runtime.work_dir": "work", "runtime.report_dir": "reports"}
    given = [*overrides, *(f"--{k}={place / v}" for k, v in folders.items())]
    # The last value of a field wins, so that the caller's do.
    options = [PRESET, *{text.partition("=")[0]: text for text in given}.values()]
    commands = [["stage", name] for name in stages] or [["run"]]
    place.mkdir(parents=True, exist_ok=True)
    code = 0
    with (place / "output.log").open("a") as log:
        for command in commands:
            line = [sys.executable, "-m", "flows.cli", *command, *options]
            code = subprocess.run(line, check=False, stdout=log, stderr=log).returncode
            if code not in (0, REJECTED):
                sys.exit(f"{' '.join(command)} ended with {code}: {log.name}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"exit_code": code, "peak_gib": peak, **report.made(place / "store")}


if __name__ == "__main__":
    main()
