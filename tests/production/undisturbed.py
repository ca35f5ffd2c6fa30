"""A run of every stage without Prefect, which a disturbed run must equal."""

from __future__ import annotations

import json
import sys
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.store import ArtifactRef
from tasks.runner import run_stage
from tasks.stages import STAGES


def digests(tree: dict[str, Any]) -> dict[str, str]:
    """Return the digest of each stage's artifact."""
    config = PipelineConfig.model_validate(tree)
    refs: dict[str, ArtifactRef] = {}
    for name, stage in STAGES.items():
        inputs = {role: refs[producer] for role, producer in stage.needed_inputs(config).items()}
        refs[name] = run_stage(stage, config, inputs).ref
    return {name: ref.digest for name, ref in refs.items()}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(digests(json.loads(sys.argv[1]))))
