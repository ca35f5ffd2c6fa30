"""Exports of policies: what the store knows of one, its prompts, and where an export goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.champions import latest_entry, model_lines, verdict_of
from rlhf.config import RuntimeConfig
from rlhf.config.pipeline import PromotionConfig, StoreConfig
from rlhf.data.lineage import forgotten_ids
from rlhf.data.rows import PROMPTS_EVAL, Prompt, PromptRow, read_rows
from rlhf.errors import ArtifactMissing, ConfigError, ExportFailed, StoreError, UnexpectedError
from rlhf.export import OWN_PROMPTS, Checked, Sampled, verify_export, write_model
from rlhf.files import exists, is_dir
from rlhf.plain_text import counted, one_line
from rlhf.store import ArtifactRef, Store
from tasks.challenge import ppo_settings
from tasks.chat_models import find_policy
from tasks.models import (
    DATASET,
    POLICY,
    NamedModel,
    dataset_of,
)

S3 = "s3://"
#: Uploaded last: without it a folder on S3 is no model.
_LAST = "config.json"


def find_stored(text: str, store: Store, promotion: PromotionConfig) -> NamedModel:
    """Find a policy of the store as a chat does, by any name but a folder's.

    Args:
        text: What the user wrote.
        store: Where it is.
        promotion: Has the model line of a bare `champion`.

    Raises:
        ConfigError: It is a local folder, or no policy.
        ArtifactMissing: There is none.
    """
    found = find_policy(text, promotion, store, purpose="export")
    if found.ref is None:
        raise ConfigError(
            f"{text}: is a folder, of which no store knows data, gates or lineage; store it first: "
            f"rlhf artifacts push {text} policy"
        )
    return found


def check_destination(folder: str, hub: str | None) -> None:
    """Refuse a destination that exists, and a hub that can't be written to, before any work.

    Raises:
        ConfigError: The folder is there and not empty, the hub's id is none, or no token is set.
    """
    if not folder.startswith(S3):
        path = Path(folder).absolute()
        if exists(path) and (not is_dir(path) or any(path.iterdir())):
            raise ConfigError(f"{folder!r} is there already; name a new folder")
    if hub is not None:
        from huggingface_hub import get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(hub)
        except HFValidationError as error:
            raise ConfigError(f"--push {hub!r}: {one_line(error)}; write owner/name") from None
        if "/" not in hub:
            raise ConfigError(f"--push {hub!r}: has no owner; write owner/name")
        if get_token() is None:
            raise ConfigError(f"--push {hub!r}: there is no token; set HF_TOKEN or `hf auth login`")


def export_policy(
    policy: NamedModel, store: Store, out: Path, runtime: RuntimeConfig, *, prompts: int,
    new_tokens: int | None, licence: str | None, extra: Callable[..., str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[Any, Checked]:  # fmt: skip
    """Write a policy, checked and with its card, into an empty folder.

    Args:
        policy: Of the store, fetched.
        store: What else is known of it.
        out: The folder.
        runtime: Device and threads of the check.
        prompts: Most prompts of the check.
        new_tokens: Most tokens of a reply in the check; None is that of the training, at most 64.
        licence: For the card; None states none.
        extra: Adds another format, of `(out, prompts' tokens, replies' tokens)`; returns a line
            for the card.
        report: Receives a line before each step that takes time.

    Returns:
        The facts of the card, and the check.

    Raises:
        ExportFailed: The export does not behave like the policy.
    """
    from rlhf.model_card import model_card

    assert policy.ref is not None
    facts = facts_of(policy.ref, store, licence)
    asked, held_out = _prompts(policy, store, prompts)
    report("writing weights, tokenizer and settings")
    write_model(policy.folder, out, facts.sampled)
    adapter = (out / "adapter").is_dir()
    length = new_tokens or min(64, facts.sampled.max_new_tokens if facts.sampled else 64)
    report(
        f"comparing {counted(len(asked), 'reply', 'replies')} of up to {length} tokens with those "
        "of a fresh process, which takes minutes on a CPU"
    )
    checked, ids, replies = verify_export(
        policy.folder, out, asked, runtime, max_new_tokens=length, held_out=held_out,
        adapter_base=_sft(policy.ref, store) if adapter else None,
    )  # fmt: skip
    more = extra(out, ids, replies) if extra else ""
    card = model_card(facts, checked, has_adapter=adapter, gguf=more)
    (out / "README.md").write_text(card, encoding="utf-8")
    return facts, checked


def facts_of(ref: ArtifactRef, store: Store, licence: str | None) -> Any:
    """Return what the store knows of a policy, for its card."""
    from rlhf.model_card import CardFacts, Step

    lineage: dict[str, Step] = {}
    for each in store.lineage(ref):
        made_by = store.manifest(each.ref).producer.stage if store.exists(each.ref) else "?"
        step = Step(each.role or POLICY, each.ref.kind, each.ref.digest, made_by)
        lineage.setdefault(each.ref.digest, step)
    manifest = store.manifest(ref)
    base, on_hub, scratch = _base([*lineage], store)
    facts = CardFacts(
        digest=ref.digest, stage=manifest.producer.stage, base=base, base_is_on_hub=on_hub,
        from_scratch=scratch,
        licence=licence,
        champion_of=tuple(
            line for line in model_lines(store)
            if (entry := latest_entry(store, line)) and entry.get("policy") == ref.digest
        ),
        sampled=_sampled(ref, store), lineage=tuple(lineage.values()),
        versions=manifest.producer.versions, code_version=manifest.producer.code_version,
        data=_metrics(next((d for d, s in lineage.items() if s.kind == DATASET), None), store),
    )  # fmt: skip
    gate = manifest.parents.get("verdict")
    if gate and store.exists(gate):
        evaluated = store.manifest(gate).parents.get("evaluation")
        facts = replace(facts, reward_metrics=_metrics(evaluated, store))
    judged = verdict_of(store, ref.digest)
    if judged is None:
        return facts
    evaluated = store.manifest(judged[0]).parents.get("evaluation")
    return replace(
        facts, verdict=judged[1], verdict_digest=judged[0].digest,
        metrics=_metrics(evaluated, store),
    )  # fmt: skip


@contextmanager
def uploaded(uri: str, options: StoreConfig, fill: Path) -> Iterator[Path]:
    """Provide a folder to fill, whose files are stored under an empty s3:// prefix at the end.

    config.json comes last, and what was uploaded is removed after an error: a reader never takes
    a part for a model.

    Raises:
        ConfigError: Something is stored there already.
        StoreError: The server can't be reached, or refuses.
    """
    from rlhf.store.store import backend_of

    backend = backend_of(uri, options)
    if backend.list(""):
        raise ConfigError(f"{uri}: something is stored there already; name a new prefix")
    yield fill
    files = sorted(path for path in fill.rglob("*") if path.is_file())
    names = [path.relative_to(fill).as_posix() for path in files]
    names.sort(key=lambda name: name == _LAST)
    from rlhf.store.objects import Source

    sent: list[str] = []
    try:
        for name in names:
            sent.append(name)
            with (fill / name).open("rb") as file:
                backend.put_file(name, Source(file, name, lambda _: None))
    except BaseException:
        with suppress(StoreError):
            backend.delete(sent)
        raise


def push_to_hub(folder: Path, hub: str, *, private: bool, endpoint: str | None = None) -> str:
    """Upload an export to a new repository of the Hugging Face Hub; return its address.

    Raises:
        ConfigError: The repository exists and holds files, or the hub refuses the token.
        UnexpectedError: The hub can't be reached, or fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint)
    try:
        url = str(api.create_repo(hub, private=private, exist_ok=True))
        present = [name for name in api.list_repo_files(hub) if name != ".gitattributes"]
        if present:
            raise ConfigError(
                f"--push {hub}: the repository holds files already ({present[0]}); name a new one"
            )
        api.upload_folder(repo_id=hub, folder_path=str(folder), commit_message="Export")
    except HfHubHTTPError as error:
        status = error.response.status_code
        cure = "check that HF_TOKEN may write there" if status in (401, 403, 404) else "try again"
        said = one_line(error.server_message or f"status {status}")[:200]
        raise ConfigError(f"--push {hub}: the hub refuses ({status}: {said}); {cure}") from None
    except ConfigError:
        raise
    except Exception as error:  # of whichever HTTP library this version uses
        raise UnexpectedError(
            f"--push {hub}: the hub can't be reached ({one_line(error)[:160]}); try again, or "
            f"export without --push and use `hf upload {hub} <folder>`"
        ) from None
    return url


def _prompts(policy: NamedModel, store: Store, count: int) -> tuple[list[Prompt], bool]:
    """Return held-out prompts of a policy's dataset, without forgotten rows; else our own."""
    dataset = dataset_of(policy, store)
    if dataset is None:
        return [*OWN_PROMPTS[:count]], False
    forgotten = forgotten_ids(store)
    rows = read_rows(store.fetch(dataset, [PROMPTS_EVAL]) / PROMPTS_EVAL, PromptRow)
    kept = [row.prompt for row in rows if forgotten.isdisjoint(row.row_ids)]
    return (kept[:count], True) if kept else ([*OWN_PROMPTS[:count]], False)


def _sft(policy: ArtifactRef, store: Store) -> Path:
    """Return the files of the policy onto which an adapter belongs.

    Raises:
        ExportFailed: They are not in the store.
    """
    digest = store.manifest(policy).parents.get("sft")
    try:
        return store.fetch(str(digest))
    except ArtifactMissing as error:
        raise ExportFailed(f"its adapter can't be checked: {error}") from error


def _sampled(policy: ArtifactRef, store: Store) -> Sampled | None:
    ppo = ppo_settings(policy, store)
    if ppo is None:
        return None
    stops = tuple(ppo.generation.stop_sequences)
    return Sampled(ppo.max_new_tokens, ppo.temperature, ppo.top_k, ppo.top_p, stops)


def _base(digests: Sequence[str], store: Store) -> tuple[str, bool, bool]:
    """Return the base's name for others, if it is a hub id, and if the model is from scratch.

    SFT notes them. Of a base that is an artifact the base that it was made from is named, if it is
    in the lineage. Without a note, as in what was pushed, it is not known.
    """
    from rlhf.model_card import is_hub_id

    known = [metrics for d in digests if "base_model" in (metrics := _metrics(d, store))]
    named = [str(name) for metrics in known if (name := metrics["base_model"]) is not None]
    outside = [name for name in named if not name.startswith("artifact:")]
    name = next(iter(outside or named), "")
    return name, is_hub_id(name), bool(known) and not named


def _metrics(digest: str | None, store: Store) -> Mapping[str, Any]:
    return store.manifest(digest).metrics if digest and store.exists(digest) else {}
