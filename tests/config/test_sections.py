"""Properties of all sections: frozen, closed, documented, and light to load."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from pydantic import ValidationError

from rlhf.config import PipelineConfig, PPOConfig, load_config
from rlhf.config.section import Section


def subclasses(section: type[Section]) -> set[type[Section]]:
    return {s for child in section.__subclasses__() for s in {child, *subclasses(child)}}


SECTIONS = sorted(
    (s for s in subclasses(Section) if s.__module__.startswith("rlhf.config")),
    key=lambda s: s.__name__,
)


def test_frozen():
    config = load_config().config
    for section, field in ((config, "seed"), (config.ppo, "gamma"), (config.data.world, "pairs")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_is_documented_and_no_other_is_taken(section):
    assert [n for n, field in section.model_fields.items() if not field.description] == []
    assert section.__doc__
    with pytest.raises(ValidationError, match="extra"):
        section.model_validate({"no_such_field": 1})


def test_round_trip_by_json_and_pickle():
    config = load_config(None, ["--ppo.lora.r=4", "--data.max_pairs=20"]).config
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_updates_are_rounded_up():
    # 300 / 128 = 2.34…
    assert PPOConfig(total_episodes=300, chunk_size=128).updates == 3
    assert PPOConfig(total_episodes=256, chunk_size=128).updates == 2


def test_loading_a_configuration_loads_no_heavy_library():
    script = (
        "import sys\n"
        "from rlhf.config import load_config\n"
        "load_config('configs/quickstart.yaml', ['--ppo.kl_coef=0.1'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'boto3', 'prefect'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_defaults_are_of_their_fields_types():
    """A default 16 of a float field is 16.0 after a flow's parameters: another fingerprint."""
    config = PipelineConfig()
    again = PipelineConfig.model_validate_json(config.model_dump_json())
    assert json.dumps(again.model_dump(mode="json")) == json.dumps(config.model_dump(mode="json"))
