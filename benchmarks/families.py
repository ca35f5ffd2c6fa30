"""Matrix of families and stages: `python -m benchmarks.families [FAMILY ...] [--write]`.

Each tiny model of `tests/library/families.py` goes through loading, log-probabilities and their
gradients, values, decoding, LoRA, SFT, reward model and PPO, in a process of its own with limits of
time and memory. Batched results are compared with plain transformers calls on single rows; what the
stages publish is loaded by transformers alone. `--write` puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rlhf.config import BaseModelConfig, LoraConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf.data.rendering import Renderer
from rlhf.data.rows import DEMONSTRATIONS, Demonstration, read_rows
from rlhf.errors import RLHFError
from rlhf.modeling.agreement import hidden_of
from rlhf.modeling.base import context_length, from_scratch, load_base, load_tokenizer
from rlhf.modeling.critic import critic_from
from rlhf.modeling.decoders import check_exactness, decoder_of, pad_left
from rlhf.modeling.generate import Replies
from rlhf.modeling.logprobs import log_probs_and_entropy, reply_values
from rlhf.modeling.lora import POLICY, lora_config, parameters_of, target_module_errors
from rlhf.modeling.reward import Scorer
from rlhf.modeling.structure import backbone_of, call, facts_of
from rlhf.ppo.train import train_policy
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys
from tests.library.families import FAMILIES, make_model

PAGE = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

#: Limits of one family's process.
SECONDS, BYTES = 240, 12 * 2**30
#: Nats, and units of logits, scores and values, that float32 may differ by.
TOLERANCE = 1e-3

# The first is longer than the small windows and rotary limits of the families.
PROMPTS = [[(7 * i + 5) % 97 for i in range(26)], [8, 40, 11], [70, 6], [31, 18, 90, 22, 41], [15]]
REPLIES = [[20, 44, 9], [13, 52, 77, 30, 8, 26, 61], [10, 3, 88, 34], [29], [55, 42, 19, 84, 66]]

# Five steps on all rows at a learning rate that changes nothing: the loss logged is the base's.
SFT = SFTConfig(epochs=5, batch_size=16, learning_rate=1e-12, max_length=48)
REWARD = RewardModelConfig(epochs=1, batch_size=8, learning_rate=1e-3, max_length=48)
PPO = PPOConfig(
    total_episodes=8, chunk_size=8, mini_batch_size=4, num_ppo_epochs=1, learning_rate=1e-4,
    kl_coef=0.05, max_new_tokens=6, top_k=0,
)  # fmt: skip


class Wrong(Exception):
    """A result differs from the plain one."""


@dataclass
class Case:
    """One family's model and the folders of its stages."""

    family: str
    root: Path
    results: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.root / "base"

    def model(self) -> Any:
        """Load the base as a stage does."""
        config = BaseModelConfig(path=str(self.base))
        return load_base(config, [], 0)[0].eval()

    def plain(self, folder: Path | None = None) -> Any:
        """Load a folder by transformers alone."""
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(folder or self.base, dtype=torch.float32, output_loading_info=True)
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if lost:
            raise Wrong(f"published weights: {lost[:2]}")
        return model.eval()

    def folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder


def main() -> None:
    """Run the matrix, print it, and write it on request."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("families", nargs="*", default=[*FAMILIES])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _, tokenizer = from_scratch(toys.ARCHITECTURE, ["good bad tea cup"] * 4, seed=3)
        tokenizer.save_pretrained(root / "tokenizer")
        toys.write_data(root / "data", pairs=16)
        llama = Case("llama", root / "llama-reward")
        for stage in (_load, _sft, _reward):
            stage(llama)
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = dict(zip(args.families, pool.map(_in_process(root), args.families), strict=True))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(table(rows) + "\n")


def table(rows: dict[str, dict[str, str]]) -> str:
    """Format the families that are exact everywhere as a list, and the others as a table."""
    exact = {f: r for f, r in rows.items() if set(r) >= set(CHECKS) and _is_exact(r)}
    ways: dict[str, list[str]] = {}
    for family, row in exact.items():
        ways.setdefault(row["decode"].partition(" (")[2].rstrip(")"), []).append(family)
    lines = [f"{len(exact)} of {len(rows)} configurations are exact in every stage."]
    for way, families in ways.items():
        lines += ["", f"Decoded {way}: " + ", ".join(f"`{f}`" for f in families) + "."]
    others = {f: r for f, r in rows.items() if f not in exact}
    if others:
        lines += ["", "| configuration | result |", "| --- | --- |"]
    for family, row in others.items():
        cells = "; ".join(f"{k}: {v}" for k, v in row.items() if not v.startswith("exact"))
        lines.append(f"| `{family}` | {cells.replace('|', '/')} |")
    return "\n".join(lines)


def _is_exact(row: dict[str, str]) -> bool:
    return all(value.startswith("exact") for value in row.values())


def _in_process(root: Path) -> Callable[[str], dict[str, str]]:
    """Return a function that checks one family in a child process."""
    context = multiprocessing.get_context("fork")

    def check(family: str) -> dict[str, str]:
        began = time.monotonic()
        folder = root / family
        folder.mkdir()
        child = context.Process(target=_check, args=(family, root))
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
        path = folder / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        if child.exitcode:
            results["process"] = f"ended with {child.exitcode} after {sorted(results)[-1:]}"
        shutil.rmtree(folder)
        seconds = time.monotonic() - began
        sys.stderr.write(f"{family}: {json.dumps(results)} {seconds:.0f} s\n")
        return results

    return check


def _check(family: str, root: Path) -> None:
    """Run all checks of a family; each result is written at once."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    case = Case(family, root / family)
    log = (case.root / "output").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    for name, check in CHECKS.items():
        try:
            note = check(case)
            case.results[name] = f"exact ({note})" if note else "exact"
        except RLHFError as error:
            case.results[name] = f"refused: {error}"
        except Wrong as error:
            case.results[name] = f"**wrong**: {error}"
        except Exception as error:  # whatever a model's code raises
            at = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).partition("\n")[0][:160]
            place = f"{Path(at.filename).name}:{at.lineno}"
            case.results[name] = f"**crash**: {type(error).__name__}: {text} ({place})"
        (case.root / "results.json").write_text(json.dumps(case.results))
        if name == "load" and not case.results[name].startswith("exact"):
            break
    os._exit(0)  # the parent's threads and handlers are not this process's


def _load(case: Case) -> str:
    """Load the base as SFT does, with the test of exactness; save and load it again."""
    make_model(case.family, 300).save_pretrained(case.base)
    shutil.copytree(case.root.parent / "tokenizer", case.base, dirs_exist_ok=True)
    model = case.model()
    check_exactness(model)
    _compare(logits_of(model, PROMPTS[0]), logits_of(case.plain(), PROMPTS[0]), "logits")
    return ""


def _log_probs(case: Case) -> str:
    """Compare log-probabilities and their gradients."""
    model, plain = case.model(), case.plain()
    ours, _ = log_probs_and_entropy(model, batch(), 1.0)
    theirs = [plain_log_probs(plain, p, r) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    for i, row in enumerate(theirs):
        _compare(ours[i, : len(row)], row, "log-prob")
    (ours * batch().mask).sum().backward()
    torch.stack([t.sum() for t in theirs]).sum().backward()
    gradients = dict(plain.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in gradients.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        other = gradients[name].grad
        if (parameter.grad is None) != (other is None):
            sizes = [0.0 if g is None else float(g.abs().max()) for g in (parameter.grad, other)]
            if any(sizes):
                raise Wrong(f"gradient of {name}: {sizes[0]:.3g}, plain {sizes[1]:.3g}")
        elif other is not None:
            assert parameter.grad is not None
            _compare(parameter.grad / scale, other / scale, f"gradient of {name}")
    return ""


def _values(case: Case) -> str:
    """Compare a critic's values with its head on the plain model's hidden states."""
    critic, plain = critic_from(case.model()), case.plain()
    nn.init.normal_(critic.value_head.weight)
    with torch.no_grad():
        ours = reply_values(critic, batch())
        for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            theirs = critic.value_head(hidden_of(backbone_of(plain), [*p, *r])).squeeze(-1)
            _compare(ours[i, : len(r) + 1], theirs[len(p) - 1 :], "value")
    return ""


@torch.no_grad()
def _decode(case: Case) -> str:
    """Compare decoding, while rows end at different steps, with whole rows without a cache."""
    model, plain, steps = case.model(), case.plain(), 7
    tokens = [[(17 * i + 5 * step + 3) % 97 for step in range(steps)] for i in range(len(PROMPTS))]
    ends = {0: [3], 2: [0, 4], 4: [2]}
    decoder = decoder_of(model, PROMPTS, steps)
    logits, live = decoder.start(), list(range(len(PROMPTS)))
    for step in range(steps):
        for row, i in zip(logits, live, strict=True):
            _compare(row, logits_of(plain, [*PROMPTS[i], *tokens[i][:step]])[-1], "logit")
        if step in ends:
            live = [live[i] for i in decoder.drop([i in ends[step] for i in live])]
        logits = decoder.step(torch.tensor([tokens[i][step] for i in live]))
    kept = [k for k, v in facts_of(model).items() if k.startswith("decodes") and v.holds]
    return kept[-1].removeprefix("decodes ")


def _lora(case: Case) -> str:
    """Compare a random adapter on all linear layers with single rows, then publish it merged."""
    section = LoraConfig(r=2, alpha=4.0)
    with target_module_errors("ppo", section):
        config = lora_config(section, "CAUSAL_LM", dropout=0.0)
        model: Any = peft.get_peft_model(case.model(), config).eval()
    for parameter in parameters_of(model, POLICY).values():
        nn.init.normal_(parameter, std=0.1)
    ours, _ = log_probs_and_entropy(model, batch(), 1.0)
    for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        _compare(ours[i, : len(r)], plain_log_probs(model, p, r), "log-prob")
    before = logits_of(model, PROMPTS[0])
    model.merge_and_unload().save_pretrained(case.folder("lora"))
    _compare(logits_of(case.plain(case.root / "lora"), PROMPTS[0]), before, "merged logit")
    return ""


def _sft(case: Case) -> str:
    """Train by SFT; the published configuration is the base's."""
    out, data = case.folder("sft"), case.root.parent / "data"
    base = BaseModelConfig(path=str(case.base))
    metrics = train_sft(SFT, base, data, out, runtime=toys.RUNTIME).metrics
    _published(case, out)
    plain = case.plain()
    renderer = Renderer(load_tokenizer(case.base))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in read_rows(data / DEMONSTRATIONS, Demonstration):
            encoded = renderer.encode(row.prompt, row.response, SFT.max_length)
            log_p = plain_log_probs(plain, encoded.prompt, encoded.response)
            total, tokens = total - float(log_p.sum()), tokens + len(log_p)
    _compare(torch.tensor(metrics["loss"]), torch.tensor(total / tokens), "SFT loss")
    return ""


def _reward(case: Case) -> str:
    """Train a reward model; scores of rows together are those of single rows."""
    out, data = case.folder("reward"), case.root.parent / "data"
    train_reward_model(REWARD, data, case.root / "sft", out, runtime=toys.RUNTIME)
    scorer = Scorer(out, toys.DEVICE, 128)
    rows = [[*p, *r] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    rows = [row for row in rows if len(row) <= context_length(scorer.model)]
    alone = torch.cat([scorer.score_ids([row]) for row in rows])
    _compare(scorer.score_ids(rows), alone, "score")
    return ""


def _ppo(case: Case) -> str:
    """Train by PPO and publish; with a LoRA adapter once more."""
    data, sft = case.root.parent / "data", case.root / "sft"
    reward, critic = case.root / "reward", "reward_model"
    if not (reward / "config.json").is_file():  # a family without a classifier
        reward, critic = case.root.parent / "llama-reward" / "reward", "policy"
    for name, lora in (("ppo", None), ("ppo-lora", LoraConfig(r=2, alpha=4.0))):
        out = case.folder(name)
        config = toys.changed(PPO, critic="policy" if lora else critic, lora=lora)
        train_policy(config, data, sft, toys.approve(reward), out, runtime=toys.RUNTIME)  # pyright: ignore[reportArgumentType]
        _published(case, out)
    return ""


def _published(case: Case, folder: Path) -> None:
    """Check that a folder loads by transformers alone, with the configuration of the base."""
    plain = case.plain(folder)
    if not logits_of(plain, PROMPTS[0]).isfinite().all():
        raise Wrong("published logits are not finite")
    base, other = (json.loads((f / "config.json").read_text()) for f in (case.base, folder))
    different = {k for k in base.keys() | other.keys() if base.get(k) != other.get(k)}
    if different - {"pad_token_id"}:
        raise Wrong(f"published config: {sorted(different)}")


def batch() -> Replies:
    """Return the prompts and replies as `generate` does."""
    ids, attention = pad_left(PROMPTS, 0)
    width = max(len(r) for r in REPLIES)
    tail = torch.tensor([r + [0] * (width - len(r)) for r in REPLIES])
    mask = torch.arange(width) < torch.tensor([len(r) for r in REPLIES])[:, None]
    return Replies(
        torch.cat([ids, tail], 1), torch.cat([attention, mask.long()], 1), mask,
        torch.ones(len(REPLIES), dtype=torch.bool),
    )  # fmt: skip


def logits_of(model: Any, row: Sequence[int]) -> Tensor:
    """Compute a row's logits by the model's own call."""
    return call(model, input_ids=torch.tensor([[*row]])).logits[0]


def plain_log_probs(model: Any, prompt: list[int], reply: list[int]) -> Tensor:
    """Compute log-probabilities of one reply by the model's own call."""
    log_p = logits_of(model, [*prompt, *reply]).log_softmax(-1)[len(prompt) - 1 : -1]
    return log_p.gather(1, torch.tensor(reply)[:, None]).squeeze(1)


def _compare(ours: Tensor, theirs: Tensor, name: str) -> None:
    gap = float((ours.detach() - theirs.detach()).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(theirs.detach().abs().max())) or math.isnan(gap):
        raise Wrong(f"{name} differs by {gap:.3g}")


CHECKS: dict[str, Callable[[Case], str]] = {
    "load": _load, "log-probs": _log_probs, "values": _values, "decode": _decode, "LoRA": _lora,
    "SFT": _sft, "reward": _reward, "PPO": _ppo,
}  # fmt: skip

if __name__ == "__main__":
    main()
