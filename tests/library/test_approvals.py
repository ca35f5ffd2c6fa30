"""People's approvals and refusals of a policy before its promotion."""

from __future__ import annotations

import pytest

from rlhf.champions import acting_person, approval_of, record_approval, require_approval
from rlhf.errors import ApprovalMissing, ApprovalRefused, ArtifactCorrupt
from rlhf.store import Store, open_store

A, B = "a" * 64, "b" * 64


@pytest.fixture
def local(tmp_path) -> Store:
    return open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")


def test_who(monkeypatch):
    for name in ("RLHF_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "carl")
    assert acting_person() == "carl"
    monkeypatch.setenv("RLHF_USER", "bob")
    assert (acting_person(), acting_person("ann")) == ("bob", "ann")


def test_approvals(local):
    with pytest.raises(
        ApprovalMissing, match=f"{A[:12]} of model line 'ours' waits .*rlhf approve"
    ):
        require_approval(local, "ours", A)
    with pytest.raises(ApprovalMissing, match=r"--store \S+ --config <the configuration of"):
        require_approval(local, "ours", A, options=True)
    said = record_approval(local, "ours", A, approved=False, by="ann", why="too\nshort", run="r-1")
    assert approval_of(local, "ours", A) == said
    with pytest.raises(ApprovalRefused, match=r"refused by ann in run r-1 at 20.* \(too short\); "):
        require_approval(local, "ours", A)
    with pytest.raises(ApprovalMissing):
        require_approval(local, "theirs", A)
    yes = record_approval(local, "ours", A, approved=True, by="bob")
    assert require_approval(local, "ours", A) == yes
    entries = local.history.entries(f"approvals/ours/{A}")
    assert [(e["approved"], e["by"], e["why"], e["run"]) for e in entries] == [
        (False, "ann", "too short", "r-1"), (True, "bob", "", None),
    ]  # fmt: skip
    local.history.append(f"approvals/ours/{B}", {"by": "ann"})
    with pytest.raises(ArtifactCorrupt, match="approved: "):
        require_approval(local, "ours", B)
