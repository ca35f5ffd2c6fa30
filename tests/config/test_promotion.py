"""`promotion: manual`: a text in place of the section, over it, and beside its fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import PipelineConfig, load_config
from rlhf.config.pipeline import PromotionConfig
from rlhf.errors import ConfigError


@pytest.mark.parametrize(
    ("preset", "overrides", "name", "approval"),
    [
        ("promotion: manual", [], "default", "manual"),
        ("promotion: {name: ours}", ["--promotion=manual"], "ours", "manual"),
        ("promotion: {name: ours}", ["--promotion", "manual"], "ours", "manual"),
        ("promotion: manual", ["--promotion.name=trial"], "trial", "manual"),
        ("promotion: manual", ["--promotion=automatic"], "default", "automatic"),
        ("seed: 1", ["--promotion=manual", "--promotion.name=trial"], "trial", "manual"),
        ("promotion: {approval: manual, name: ours}", [], "ours", "manual"),
        ("promotion: {name: ours}", ["--promotion={approval: manual}"], "ours", "manual"),
        ("promotion:", [], "default", "automatic"),
    ],
)
def test_the_text_is_the_approval(tmp_path: Path, preset, overrides, name, approval):
    path = tmp_path / "my.yaml"
    path.write_text(preset)
    loaded = load_config(path, overrides)
    assert loaded.config.promotion == PromotionConfig(name=name, approval=approval)
    origin = "command line" if any("manual" in o or "automatic" in o for o in overrides) else None
    if origin or approval == "manual":
        assert loaded.sources["promotion.approval"] == (origin or "my.yaml")


def test_in_python():
    tree = {"promotion": "manual", "seed": 3}
    assert PipelineConfig.model_validate(tree).promotion.approval == "manual"
    assert tree == {"promotion": "manual", "seed": 3}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--promotion=maybe"], "promotion.approval = 'maybe': must be 'automatic' or 'manual'"),
        (["--promotion"], "promotion has no value"),
        (["--promotion=manual", "--promotion.approval=manual"], "two values for one field"),
        (["--promotion.smoke_seconds=0"], "promotion.smoke_seconds = 0: must be more than 0"),
    ],
)
def test_mistakes(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert expected in str(caught.value)
