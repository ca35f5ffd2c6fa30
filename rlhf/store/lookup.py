"""From what people write to artifacts, and from artifacts to what they were made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rlhf.errors import ArtifactMissing
from rlhf.store.manifest import Ancestor, Artifact

_BEGINNING = re.compile(r"[0-9a-f]{6,64}")


def is_beginning(text: str) -> bool:
    """Whether the text can begin a digest."""
    return _BEGINNING.fullmatch(text) is not None


def digest_of(
    text: str,
    uri: str,
    digests: Callable[[str], Sequence[str]],
    pinned: Callable[[str], str | None],
) -> str:
    """The digest that is meant by a digest, its beginning, `artifact:<digest>`, a pin or a URI.

    Args:
        text: What somebody wrote.
        uri: The store's.
        digests: All digests with this beginning.
        pinned: The digest of a pin, None if there is no such pin.

    Raises:
        ArtifactMissing: None is meant, or several are.
    """
    wanted = text.strip().removeprefix("artifact:")
    base, slash, name = wanted.rpartition("/manifests/")
    if slash:
        if base != uri:
            raise ArtifactMissing(f"{text} is not in {uri}; open its own store")
        wanted = name.removesuffix(".json")
    if not is_beginning(wanted):
        pin = pinned(wanted)
        if pin is None:
            raise ArtifactMissing(
                f"{text!r} names no artifact; give 6 to 64 hex digits of its digest, "
                "artifact:<digest>, a pin's name or its URI"
            )
        return pin
    found = [wanted] if len(wanted) == 64 else digests(wanted)
    if not found:
        raise ArtifactMissing(
            f"{uri}: there is no artifact {wanted}; `rlhf artifacts ls` shows those there are"
        )
    if len(found) > 1:
        candidates = ", ".join(digest[:16] for digest in found[:5])
        raise ArtifactMissing(f"{uri}: {wanted} is ambiguous ({candidates}); give more digits")
    return found[0]


def lineage(digest: str, read: Callable[[str], Artifact]) -> list[Ancestor]:
    """The artifact itself and its ancestors, depth first; each one's own only once."""
    found: list[Ancestor] = []
    expanded: set[str] = set()

    def visit(depth: int, role: str, digest: str) -> None:
        artifact = read(digest)
        found.append(Ancestor(depth, role, artifact.ref))
        if digest in expanded:
            return
        expanded.add(digest)
        for name, parent in sorted(artifact.manifest.parents.items()):
            visit(depth + 1, name, parent)

    visit(0, "self", digest)
    return found
