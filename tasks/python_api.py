"""The Python API: a pipeline as an object, and what a run of it made (docs/python.md).

`rlhf.Pipeline` is the class of this module. The flows that it runs stand above this package, so
that `flows.python_api` hands them down. Nothing heavy is imported before a run.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rlhf.config import LoadedConfig, PipelineConfig, load_source
from rlhf.errors import ArtifactMissing, explained
from rlhf.plain_text import one_line
from tasks.model_handles import Policy, RewardModel

if TYPE_CHECKING:
    from rlhf.report import RunOutcome, StageState
    from rlhf.store import Store
    from tasks.report import PipelineRun
    from tasks.runner import Outcome

#: Height of a report in a notebook.
HEIGHT = "42em"


@dataclass(frozen=True)
class Flows:
    """The flows, as functions that a pipeline object calls."""

    check: Callable[[LoadedConfig], list[str]]
    """Makes the checks of `rlhf preflight`, and returns its remarks."""
    run: Callable[[LoadedConfig, bool], PipelineRun]
    """Runs the pipeline, silently if the second argument is true."""
    stage: Callable[[LoadedConfig, str, Mapping[str, str], bool], tuple[str, Any]]
    """Runs one stage with inputs by role; returns its state, and its outcome or error."""


class Pipeline:
    """A pipeline: its configuration, checked, and the runs of it.

        run = Pipeline("quickstart", ppo={"kl_coef": 0.05}).run()

    Args:
        config: Name of a preset, path of a YAML file, values by section, or a configuration
            object; without it all values are defaults.
        sections: Sections and fields that differ from it, sections as mappings.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """

    flows: ClassVar[Flows]

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | PipelineConfig | LoadedConfig | None = None,
        /,
        **sections: Any,
    ) -> None:
        self._loaded = load_source(config, sections)

    @property
    def config(self) -> PipelineConfig:
        """All effective values, immutable."""
        return self._loaded.config

    @property
    def advice(self) -> tuple[str, ...]:
        """A line for each unusual value of one's own."""
        return tuple(self._loaded.advice())

    def preflight(self) -> tuple[str, ...]:
        """Check folders, store, data and models, and rehearse every stage in small.

        A run does the same by itself. A model that is trained from scratch is not rehearsed.

        Returns:
            Remarks on what could not be rehearsed.

        Raises:
            RLHFError: A run would stop; one line with the cure.
        """
        return tuple(self.flows.check(self._loaded))

    def run(self, *, quiet: bool = False) -> Run:
        """Run the whole pipeline, or whatever of it has not been done yet.

        A run that ends without a promotion (`GateRejected`, `NotBetter`, …) is returned like any
        other; `Run.raise_for_outcome` raises its error.

        Args:
            quiet: Print nothing; otherwise progress is printed, a line per event.

        Raises:
            RLHFError: The run failed; one line with the cure.
        """
        return Run(self.flows.run(self._loaded, quiet))

    def stage(
        self, name: str, /, *, inputs: Mapping[str, str | StageEnd] | None = None,
        quiet: bool = False,
    ) -> StageEnd:  # fmt: skip
        """Run one stage, unless that has been done.

        Args:
            name: Of the stage, as in `Run.stages`.
            inputs: Artifacts by role; a role that is not given is what this configuration made.
            quiet: Print nothing.

        Raises:
            RLHFError: It failed, or an earlier stage has not run.
        """
        from tasks.stage import store_of

        given = {
            role: str(ref.artifact if isinstance(ref, StageEnd) else ref)
            for role, ref in (inputs or {}).items()
        }
        state, result = self.flows.stage(self._loaded, name, given, quiet)
        return _stage_end(name, state, result, store_of(self.config))

    def __repr__(self) -> str:
        config = self.config
        return f"<Pipeline {config.name}: store {config.store}, seed {config.seed}>"


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended, and what it made."""

    name: str
    state: StageState
    """`Completed`, `Cached` (taken from the store), `GateRejected`, …"""
    seconds: float | None
    """Time that it took; None if it did not run."""
    summary: str
    """Its most important metrics, or why it ended otherwise."""
    artifact: str | None
    """Digest of what it made."""
    _store: Store = field(repr=False)

    @property
    def metrics(self) -> dict[str, Any]:
        """Its metrics by name."""
        return {} if self.artifact is None else dict(self._store.manifest(self.artifact).metrics)

    @property
    def folder(self) -> Path:
        """A verified copy of the files that it made, on this machine; not to be changed.

        Raises:
            ArtifactMissing: It made nothing.
        """
        if self.artifact is None:
            raise ArtifactMissing(f"{self.name} made nothing: {self.state}")
        return self._store.fetch(self._store.resolve(self.artifact))


class Report:
    """A run's report: an HTML page that works offline; a notebook shows it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str | None:
        try:
            page = self.path.read_text(encoding="utf-8")
        except OSError:
            return None
        # The page holds replies of models: no script of it could run here, and none is in it.
        style = f"width:100%;height:{HEIGHT};border:1px solid #8884"
        return (
            f'<iframe sandbox title="Report" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
        )


class Run:
    """A run of the pipeline that has ended."""

    def __init__(self, result: PipelineRun) -> None:
        from tasks.stage import store_of

        self._result = result
        self._store = store_of(result.config)

    @property
    def name(self) -> str:
        """Name of the run, as `rlhf runs` lists it."""
        return self._result.name

    @property
    def config(self) -> PipelineConfig:
        """Its configuration."""
        return self._result.config

    @property
    def outcome(self) -> RunOutcome:
        """`Promoted`, `GateRejected`, `NotBetter`, `AwaitingApproval` or `Refused`."""
        return self._result.outcome

    @property
    def reason(self) -> str:
        """Why it ended so, in a sentence."""
        return self._result.reason

    @property
    def ok(self) -> bool:
        """Whether it ended as it should: promoted, waiting for approval, or champion kept."""
        from rlhf.report import GREEN

        return self.outcome in GREEN

    def raise_for_outcome(self) -> Self:
        """Return the run if it is `ok`.

        Raises:
            RLHFError: It is not: GateRejected, ApprovalRefused.
        """
        if not self.ok and self._result.error is not None:
            raise explained(self._result.error)
        return self

    @cached_property
    def stages(self) -> dict[str, StageEnd]:
        """How each stage ended, by name, in the order of the pipeline."""
        return {
            row.name: StageEnd(
                row.name, row.state, row.seconds, row.metric or row.message, row.artifact,
                self._store,
            )
            for row in self._result.rows
        }  # fmt: skip

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Figures of the evaluations, `reward_model` and `policy`, by the names that gates use."""
        from rlhf.gates import flat_metrics
        from rlhf.saved import read_saved
        from tasks.stages import EVALUATE_POLICY, EVALUATE_REWARD_MODEL, EVALUATION

        found: dict[str, dict[str, Any]] = {}
        evaluations = {"reward_model": EVALUATE_REWARD_MODEL, "policy": EVALUATE_POLICY}
        for section, stage in evaluations.items():
            ref = self._result.refs.get(stage.name)
            if ref is not None:
                whole = read_saved(self._store.fetch(ref) / EVALUATION)
                found[section] = dict(flat_metrics(whole))
        return found

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out prompts with the replies before and after PPO, and their scores."""
        from rlhf.report.samples import read_samples
        from tasks.stages import EVALUATE_POLICY, SAMPLES

        ref = self._result.refs.get(EVALUATE_POLICY.name)
        return read_samples(self._store.fetch(ref) / SAMPLES) if ref else []

    @property
    def report(self) -> Report | None:
        """The report, a path that a notebook shows as the page."""
        return Report(self._result.report) if self._result.report else None

    @cached_property
    def sft(self) -> Policy:
        """The SFT policy, from which PPO started."""
        from tasks.stages import TRAIN_SFT

        return Policy(self._made_by(TRAIN_SFT.name), config=self.config)

    @cached_property
    def reward_model(self) -> RewardModel:
        """The reward model."""
        from tasks.stages import TRAIN_REWARD_MODEL

        return RewardModel(self._made_by(TRAIN_REWARD_MODEL.name), config=self.config)

    @cached_property
    def policy(self) -> Policy:
        """The policy after PPO, also if a gate rejected it."""
        from tasks.stages import TRAIN_POLICY

        return Policy(self._made_by(TRAIN_POLICY.name), config=self.config)

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.outcome}>"

    def __str__(self) -> str:
        lines = [
            f"{end.name:<22}{end.state:<14}{one_line(end.summary)}" for end in self.stages.values()
        ]
        return "\n".join([*lines, f"{self.outcome}: {one_line(self.reason)}"])

    def _made_by(self, stage: str) -> str:
        ref = self._result.refs.get(stage)
        if ref is None:
            raise ArtifactMissing(
                f"{stage} did not run: the run {self.name} ended as {self.outcome} "
                f"({one_line(self.reason)})"
            )
        return ref.digest


def _stage_end(name: str, state: str, result: Outcome | BaseException, store: Store) -> StageEnd:
    """Return how a stage ended; raise the error of one that failed."""
    from rlhf.errors import GateRejected, explain
    from rlhf.report import StageState
    from tasks.runner import Outcome

    if isinstance(result, Outcome):
        return StageEnd(
            name, StageState(state), result.seconds, result.headline, result.ref.digest, store
        )
    if not isinstance(result, GateRejected):
        raise explained(result)
    return StageEnd(name, StageState(state), None, explain(result), None, store)
