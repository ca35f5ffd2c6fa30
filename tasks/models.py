"""Models that a command names: artifacts, local folders and champions; what they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.champions import champion, model_lines
from rlhf.config.lengths import TokenLimits
from rlhf.data.chat import loose_key
from rlhf.data.gate_prompts import MAX_KNOWN, trained_on
from rlhf.data.lineage import forgotten_ids
from rlhf.data.rows import PROMPTS_GATE, PromptRow, read_rows
from rlhf.errors import ArtifactMissing, ConfigError, RLHFError
from rlhf.files import expand_home, is_dir, is_file
from rlhf.judge import JUDGE as JUDGE_FILE
from rlhf.judge import Judge, read_judge
from rlhf.modeling.source import CONFIG
from rlhf.saved import read_saved
from rlhf.store import ArtifactRef, Store
from tasks import challenge
from tasks.model_options import SUITE_LENGTH

if TYPE_CHECKING:
    from rlhf.modeling.reward import Scorer

#: Kinds of models, as artifacts have them; a judge is a reward model.
ModelKind = Literal["policy", "reward-model"]
POLICY: ModelKind = "policy"
REWARD_MODEL: ModelKind = "reward-model"
JUDGE, DATASET, EVALUATION = "judge", "dataset", "evaluation"
#: Prefix of a model line's name, for its champion.
CHAMPION = "champion:"


@dataclass(frozen=True)
class NamedModel:
    """A model on this machine, and its artifact, if it is one."""

    text: str
    """What the user wrote."""
    kind: ModelKind
    folder: Path
    ref: ArtifactRef | None = None
    judge: Judge | None = None
    """What is known of it, if it is a judge."""

    @property
    def label(self) -> str:
        """Short digest of the artifact, or the folder's name."""
        return self.ref.short if self.ref else self.folder.name

    @property
    def facts(self) -> dict[str, Any]:
        """Identity of a model for results, and the accuracy of a judge."""
        digest = {"digest": self.ref.digest} if self.ref else {}
        known = self.judge.facts() if self.judge else {}
        return {**known, "name": self.text, "kind": JUDGE if self.judge else self.kind, **digest}


def find_model(text: str, store: Store) -> NamedModel:
    """Find a model by digest, pin, URI, `champion:<line>`, or as a local folder; fetch it.

    Raises:
        ArtifactMissing: It names nothing.
        ConfigError: It is no model, or one that was not trained.
    """
    folder = expand_home(text)
    if is_folder(text, folder):
        if not is_dir(folder):
            raise ConfigError(f"{text}: no such folder; give a model's folder or an artifact")
        return NamedModel(text, _kind(text, folder), folder, None, _judge(text, folder))
    ref = _champion(text, store) if text.startswith(CHAMPION) else store.resolve(text)
    return fetch_model(text, ref, store)


def is_folder(text: str, folder: Path) -> bool:
    """Return whether a name is written like a path, or is that of a model's folder."""
    try:
        is_model = is_file(folder / CONFIG) or is_file(folder / JUDGE_FILE)
        return text.startswith((".", "/", "~")) or is_model or ("/" in text and is_dir(folder))
    except (OSError, ValueError):  # too long for a name, or with a null
        return False


def fetch_model(text: str, ref: ArtifactRef, store: Store) -> NamedModel:
    """Fetch the model of an artifact.

    Raises:
        ConfigError: It is no model, or one that was not trained.
    """
    if ref.kind not in (POLICY, REWARD_MODEL, JUDGE):
        raise ConfigError(
            f"{text}: {ref.short} is of kind {ref.kind}; give a policy, a reward model or a judge"
        )
    folder = store.fetch(ref)
    judge = _judge(text, folder)
    return NamedModel(text, _kind(text, folder), folder, ref, judge)


def _champion(text: str, store: Store) -> ArtifactRef:
    line = text.removeprefix(CHAMPION)
    entry = champion(store, line)
    if entry is None:
        known = ", ".join(model_lines(store)) or "none"
        raise ArtifactMissing(
            f"{text}: {store.uri} has no champion of that line; lines that have: {known}"
        )
    return store.resolve(entry.policy)


def _judge(text: str, folder: Path) -> Judge | None:
    """Return what is known of a judge; None of another model.

    Raises:
        ConfigError: None was trained.
    """
    if not is_file(folder / JUDGE_FILE):
        return None
    judge = read_judge(folder)
    if not judge.trained:
        raise ConfigError(f"{text}: no judge was trained ({judge.reason}); give a reward model")
    return judge


def _kind(text: str, folder: Path) -> ModelKind:
    """Return the kind of model that a folder's configuration names.

    Raises:
        ConfigError: It is neither a policy nor a reward model.
    """
    if not is_file(folder / CONFIG):
        if is_file(folder / JUDGE_FILE):
            _judge(text, folder)  # says why there is none
        raise ConfigError(f"{text}: holds no {CONFIG}; give the folder of a whole model")
    names = [str(name) for name in read_saved(folder / CONFIG).get("architectures") or ()]
    if any("ForSequenceClassification" in name for name in names):
        return REWARD_MODEL
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return POLICY
    raise ConfigError(
        f"{text}: is {', '.join(names) or 'a model of no named architecture'}; give a causal "
        "language model (a policy) or a sequence classifier (a reward model)"
    )


def require_kind(model: NamedModel, kind: ModelKind, why: str) -> NamedModel:
    """Refuse a model of the other kind.

    Raises:
        ConfigError: It is of the other kind.
    """
    if model.kind == kind:
        return model
    is_, needed = ("a policy", "a reward model or judge") if kind == REWARD_MODEL else (
        "a reward model", "a policy"
    )  # fmt: skip
    raise ConfigError(f"{model.text}: {model.label} is {is_}, and {why} needs {needed}")


def scorer_of(policy: NamedModel, store: Store) -> tuple[NamedModel, str] | None:
    """Return the judge of a policy's lineage, or else its reward model; and why it was chosen."""
    judge, reason = judge_of(policy, store)
    if judge is not None:
        return judge, "the judge of its lineage"
    model = reward_model_of(policy, store)
    if model is None:
        return None
    return model, f"the reward model that it was trained on: {reason}"


def judge_of(policy: NamedModel, store: Store) -> tuple[NamedModel | None, str]:
    """Return the usable judge of a policy's lineage, or None and why there is none.

    It is an ancestor, or made from the same data and SFT policy.
    """
    if policy.ref is None:
        return None, "a folder has no lineage"
    refs = [*_ancestors(policy.ref, JUDGE, store)]
    if not refs:
        parents = store.manifest(policy.ref).parents
        data, sft = parents.get("data"), parents.get("sft", policy.ref.digest)
        refs = [
            ref
            for ref, manifest, _ in sorted(store.list(), key=lambda each: each.age)
            if ref.kind == JUDGE
            and manifest.parents.get("data") == data
            and manifest.parents.get("sft") == sft
        ]
    reasons: list[str] = []
    for ref in refs:
        judge = read_judge(store.fetch(ref, [JUDGE_FILE]))
        if judge.trained and judge.usable:
            return fetch_model(ref.short, ref, store), ""
        reasons.append(f"judge {ref.short} is not usable: {judge.reason}")
    return None, (reasons or ["it has no judge"])[0]


def reward_model_of(policy: NamedModel, store: Store) -> NamedModel | None:
    """Return the reward model that a policy was trained on."""
    ref = reward_model_ref(policy, store)
    return fetch_model(ref.short, ref, store) if ref else None


def reward_model_ref(policy: NamedModel, store: Store) -> ArtifactRef | None:
    """Return the artifact of the reward model that a policy was trained on."""
    return next(_ancestors(policy.ref, REWARD_MODEL, store), None) if policy.ref else None


def dataset_of(model: NamedModel, store: Store) -> ArtifactRef | None:
    """Return the dataset that a model was trained on last."""
    return next(_ancestors(model.ref, DATASET, store), None) if model.ref else None


def _ancestors(ref: ArtifactRef, kind: str, store: Store) -> Iterator[ArtifactRef]:
    """Yield the ancestors of a kind, the nearest first."""
    found = sorted(store.lineage(ref), key=lambda each: each.depth)
    yield from {e.ref.digest: e.ref for e in found if e.ref.kind == kind and e.depth}.values()


def known_prompts(models: Iterable[NamedModel], store: Store) -> frozenset[str]:
    """Return the loose keys of all prompts that decided what models became.

    That is what they, or what they were made from, were trained on, and where a judge chose among
    a policy's updates its prompts.
    """
    keys: set[str] = set()
    for model in models:
        if model.ref is None:
            continue
        judged = model.judge is not None or any(_ancestors(model.ref, JUDGE, store))
        for ref in _ancestors(model.ref, DATASET, store):
            for _, prompts in trained_on(store.fetch(ref), judged=judged):
                keys.update(map(loose_key, prompts))
    return frozenset(keys)


@dataclass(frozen=True)
class GatePrompts:
    """Prompts on which a gate compared a policy, and where they are from."""

    rows: list[PromptRow]
    evaluation: ArtifactRef
    policy: NamedModel


def gate_prompts_of(
    policies: Sequence[NamedModel], seen: Set[str], store: Store
) -> tuple[GatePrompts | None, list[str]]:
    """Return the gate prompts of a policy's own evaluation, or None; and remarks on others.

    Those of the first policy that has some, of its newest evaluation; without forgotten rows. Like
    at a gate, not if the policies were trained on more than a tenth of them.

    Args:
        policies: All of them have to be artifacts.
        seen: Loose keys of the prompts that they know from their training.
        store: Where their evaluations are.
    """
    notes: list[str] = []
    if not all(policy.ref for policy in policies):
        return None, notes
    artifacts = sorted(store.list(), key=lambda each: each.age)
    forgotten = forgotten_ids(store)
    for policy in policies:
        for ref, manifest, _ in artifacts:
            is_own = policy.ref and manifest.parents.get(POLICY) == policy.ref.digest
            files = {file.path for file in manifest.files}
            if ref.kind != EVALUATION or not is_own or PROMPTS_GATE not in files:
                continue
            found = read_rows(store.fetch(ref, [PROMPTS_GATE]) / PROMPTS_GATE, PromptRow)
            rows = [row for row in found if forgotten.isdisjoint(row.row_ids)]
            known = sum(loose_key(row.prompt) in seen for row in rows)
            if rows and known <= MAX_KNOWN * len(rows):
                return GatePrompts(rows, ref, policy), notes
            notes.append(
                f"the gate prompts of evaluation {ref.short} are not used: the policies were "
                f"trained on {known:,} of {len(rows):,}"
            )
    return None, notes


def limits_of(model: NamedModel, store: Store) -> TokenLimits | None:
    """Return the token limits with which a model was trained, if they are known."""
    if model.ref is None:
        return None
    limits = store.manifest(model.ref).producer.config.get("limits")
    try:
        return TokenLimits.model_validate(limits) if isinstance(limits, dict) else None
    except ValueError:  # of another version
        return None


def reply_settings(policy: NamedModel, store: Store) -> tuple[int | None, tuple[str, ...]]:
    """Return the most tokens of a reply and the stop sequences with which a policy was trained."""
    if policy.ref is None:
        return None, ()
    trained = challenge.reply_settings(policy.ref, store)
    if trained is not None:
        return trained
    limits = limits_of(policy, store)
    if limits is None or limits.max_prompt is None:
        return None, ()
    return max(1, limits.max_length - limits.max_prompt), ()


def load_scorer(model: NamedModel, device: Any, max_length: int | None, store: Store) -> Scorer:
    """Load a reward model or judge with the token limits of its training, or with those given.

    Raises:
        ConfigError: It or its tokenizer can't be loaded.
    """
    from rlhf.modeling.members import open_scorer
    from rlhf.modeling.pretrained import loading_error

    limits = None if max_length else limits_of(model, store)
    try:
        return open_scorer(model.folder, device, limits or max_length or SUITE_LENGTH)
    except RLHFError:
        raise
    except (OSError, ValueError) as error:  # transformers' own
        raise loading_error(model.text, error) from error
