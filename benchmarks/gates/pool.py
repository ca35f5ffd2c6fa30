"""Policies and their scored replies, which the simulated retrainings are drawn from.

Everything is trained by the product with the quickstart's settings; a folder that exists is kept:

- `champion`: the quickstart's policy; `peer`: the same settings with another seed of PPO;
- `weaker`: a sixth of the episodes, as in the issue that this benchmark answers;
- `gaming`: PPO against a reward model of 500 pairs with kl_coef 0.01: it exploits that model's
  errors. Its proxy is that weak reward model.

Each policy replies `REPLIES` times to `PROMPTS` fresh prompts. Reward model, judge and gold score
all replies: arrays of shape (prompts, replies), in `scores.npz`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.config import PipelineConfig
from rlhf.data.rows import PAIRS_JUDGE
from rlhf.files import write_json
from rlhf.gates import judge, require

#: Prompts that no other part of the benchmark has, and replies of each policy to each of them.
PROMPTS, REPLIES = 1000, 12
#: Seed of the world that the prompts come from.
_PROMPT_SEED = 90_001
POLICIES = ("sft", "champion", "peer", "weaker", "gaming")
Scores = dict[str, NDArray[np.float64]]


def make_pool(config: PipelineConfig, work: Path) -> Scores:
    """Train and score what is missing in a folder; return scores by `<policy>/<scorer>`."""
    path = work / "scores.npz"
    if not path.is_file():
        _train(config, work)
        scores = _score(config, work)
        np.savez(path, **scores)  # pyright: ignore[reportArgumentType]
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def make_start(config: PipelineConfig, work: Path) -> tuple[Path, Path]:
    """Prepare data and train the SFT policy, unless they are there; return their folders."""
    from rlhf.data.prepare import prepare_data
    from rlhf.sft import train_sft

    seed, data, sft = config.seed, work / "data", work / "sft"
    make_once(data, lambda out: prepare_data(config.data, out, seed=seed))
    make_once(
        sft,
        lambda out: train_sft(
            config.sft, config.base, data, out, seed=seed, runtime=config.runtime
        ),
    )
    return data, sft


def _train(config: PipelineConfig, work: Path) -> None:
    from rlhf.data.prepare import prepare_data
    from rlhf.ppo.train import train_policy
    from rlhf.reward import train_reward_model

    seed, runtime = config.seed, config.runtime
    data, sft = make_start(config, work)
    reward, weak = work / "reward-model", work / "weak-model"
    section = config.reward_model

    def reward_model(folder: Path, dataset: Path = data) -> None:
        make_once(
            folder,
            lambda out: train_reward_model(section, dataset, sft, out, seed=seed, runtime=runtime),
        )

    reward_model(reward)
    make_judge(config, data, sft, work / "judge")
    weak_data = work / "weak-data"
    world = config.data.world.model_copy(update={"pairs": 500})
    small = config.data.model_copy(update={"world": world})
    make_once(weak_data, lambda out: prepare_data(small, out, seed=seed))
    reward_model(weak, weak_data)
    ppo = config.ppo
    for name, changes, model, add in (
        ("champion", {}, reward, 0),
        ("peer", {}, reward, 1000),
        ("weaker", {"total_episodes": ppo.total_episodes // 6}, reward, 0),
        ("gaming", {"kl_coef": 0.01}, weak, 0),
    ):
        approved = require(model, "benchmark", judge("benchmark", "benchmark", {}, None))
        make_once(
            work / name,
            lambda out, c=changes, a=approved, s=add: train_policy(
                ppo.model_copy(update=c), data, sft, a, out, seed=seed + s, runtime=runtime
            ),
        )


def _score(config: PipelineConfig, work: Path) -> Scores:
    """Sample and score the replies of all policies."""
    from rlhf.data.rendering import load_renderer
    from rlhf.modeling.base import load_policy
    from rlhf.modeling.critic import freeze
    from rlhf.modeling.device import prepare_device
    from rlhf.modeling.generate import generate
    from rlhf.modeling.reward import Scorer
    from rlhf.modeling.sampling import Sampling
    from rlhf.world import generate as generate_world
    from rlhf.world import gold

    device = prepare_device(config.runtime)
    world = config.data.world.model_copy(update={"eval_prompts": PROMPTS, "pairs": 10})
    rows = generate_world(world, _PROMPT_SEED).eval_prompts
    prompts = [row.prompt for row in rows for _ in range(REPLIES)]
    scorers = {
        name: Scorer(work / folder, device, config.reward_model.max_length)
        for name, folder in (
            ("proxy", "reward-model"), ("judge", "judge"), ("weak-proxy", "weak-model"),
        )
    }  # fmt: skip
    sampling = Sampling(config.ppo.max_new_tokens, config.evaluation.temperature)
    scores: Scores = {"group": np.array([row.group for row in rows])}
    for name in POLICIES:
        model, renderer = freeze(load_policy(work / name)).to(device), load_renderer(work / name)
        texts: list[str] = []
        for start in range(0, len(prompts), 256):
            batch = [renderer.encode_prompt(p, 120) for p in prompts[start : start + 256]]
            replies = generate(
                model, batch, renderer.tokenizer, sampling, _PROMPT_SEED + start,
                ends=renderer.end_ids,
            )  # fmt: skip
            texts += [text.strip() for text in renderer.texts(replies.rows())]
        shape = (len(rows), REPLIES)
        for scorer_name, scorer in scorers.items():
            scores[f"{name}/{scorer_name}"] = scorer(prompts, texts).numpy().reshape(shape)
        golds = [gold(p, t) for p, t in zip(prompts, texts, strict=True)]
        scores[f"{name}/gold"] = np.array(golds).reshape(shape)
        print(name, {k: round(float(scores[f"{name}/{k}"].mean()), 3) for k in
                     ("proxy", "weak-proxy", "judge", "gold")}, flush=True)  # fmt: skip
    write_json(work / "pool.json", {k: float(v.mean()) for k, v in scores.items() if "/" in k})
    return scores


def make_judge(config: PipelineConfig, data: Path, sft: Path, folder: Path) -> None:
    """Train a judge with its own seed, and measure it, unless that was done."""
    from rlhf.judge import judge_section, measure_judge
    from rlhf.reward import train_reward_model

    limit, runtime = config.reward_model.max_length, config.runtime

    def make(out: Path) -> None:
        section = judge_section(config.reward_model, None, config.judge.negatives)
        result = train_reward_model(
            section, data, sft, out, pairs=PAIRS_JUDGE, seed=config.seed + 1, runtime=runtime
        )
        measure_judge(data, out, result.metrics, "sft", limits=limit, runtime=runtime)

    make_once(folder, make)


def make_once(folder: Path, make: Callable[[Path], Any]) -> None:
    """Make a folder, which appears when it is complete; one that exists is kept."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{folder.name} …", flush=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    make(partial)
    partial.rename(folder)
