"""The quickstart's configuration, and its trained models from the archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Context, SectionFailedError
from rlhf.config import GateRule, PipelineConfig, load_config
from rlhf.gates import Approved, judge, require

PRESET = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
#: Overrides that make the quickstart a smoke test; `pack --tiny` trains with them.
TINY = [
    "--data.world.pairs=64", "--data.world.demonstrations=64", "--data.world.prompts=32",
    "--data.world.eval_pairs=32", "--data.world.eval_prompts=10", "--sft.epochs=1",
    "--base.architecture.hidden_size=32", "--base.architecture.layers=1",
    "--base.architecture.intermediate_size=64", "--ppo.total_episodes=32", "--ppo.chunk_size=16",
    "--ppo.mini_batch_size=8", "--ppo.max_new_tokens=12", "--evaluation.prompts=8",
]  # fmt: skip


def configuration(tiny: bool) -> PipelineConfig:
    """Return the quickstart's configuration; `tiny` for a smoke test."""
    return load_config(str(PRESET), TINY if tiny else []).config


def folder(context: Context, name: str) -> Path:
    """Return a folder of the archive: data, sft or reward-model.

    Raises:
        SectionFailedError: The archive was not carried, or has no such folder.
    """
    path = Path(context.unpacked) / "quickstart" / name
    if not path.is_dir():
        raise SectionFailedError(
            f"{context.carried}/carried.tar.gz is missing, broken or has no quickstart/{name}; "
            "make it with python -m benchmarks.gpu.pack, where the project's environment is"
        )
    return path


def approved(path: Path, metrics: dict[str, Any], rules: tuple[GateRule, ...]) -> Approved[Path]:
    """Return a reward model that has passed its gate."""
    return require(path, "carried", judge("gate-reward-model", "carried", metrics, rules))


def approved_without_gate(path: Path) -> Approved[Path]:
    """Approve a reward model of any quality, for measurements of speed."""
    return approved(path, {"accuracy": 1.0}, (GateRule(metric="accuracy", min=0.0),))
