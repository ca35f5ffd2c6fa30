"""The smoke test before promotion, on real models, whole and broken.

test_promotion.py has it answer, and fail, in a process of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.data.rows import PROMPTS_EVAL, write_rows
from rlhf.errors import SmokeTestFailed, is_retriable
from rlhf.smoke import answer, smoke_test
from tests.library import toys

WEIGHTS = "model.safetensors"
REQUEST = {"prompts": ["tea?", "a cup why"], "runtime": toys.RUNTIME.model_dump()}


def reason(bundle: Path, data: Path, seconds: float = 120) -> str:
    """Why the test fails, in a process of its own."""
    with pytest.raises(SmokeTestFailed) as caught:
        smoke_test(bundle, data, seconds=seconds, runtime=toys.RUNTIME)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("smoke test: ")
    assert not is_retriable(caught.value)
    return text


def change_weights(bundle: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(bundle / WEIGHTS)
    change(weights)
    save_file(weights, bundle / WEIGHTS, {"format": "pt"})


@pytest.fixture
def endless(sft, copy_of) -> Path:
    """A bundle whose chat template loops for hours."""
    bundle = copy_of(sft)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (bundle / "chat_template.jinja").write_text(loop)
    return bundle


def test_whoever_takes_too_long_is_stopped(endless, data):
    begun = time.monotonic()
    assert "promotion.smoke_seconds = 1;" in reason(endless, data, seconds=1)
    assert time.monotonic() - begun < 600  # the template loops for hours


def test_it_ends_by_itself_when_nobody_is_there_to_stop_it(endless, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps({**REQUEST, "seconds": -4.5}))
    command = [sys.executable, "-m", "rlhf.smoke", str(endless), str(request)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("Timeout (0:00:00.500000)!\n")


def test_code_that_holds_the_gil_is_ended_too():
    code = (
        "import ctypes; from rlhf import smoke; smoke._GRACE = 0.5; smoke.end_after(0.1); "
        "ctypes.PyDLL(None).sleep(60)"  # unlike CDLL, keeps the GIL
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert done.returncode == -signal.SIGALRM


def test_without_anything_to_ask(sft, tmp_path):
    write_rows(tmp_path / PROMPTS_EVAL, [])
    assert "no held-out prompts" in reason(sft, tmp_path)


def test_without_weights(sft, copy_of):
    bundle = copy_of(sft)
    (bundle / WEIGHTS).unlink()
    assert WEIGHTS in answer(bundle, REQUEST)["error"]


def test_weights_that_are_no_numbers(sft, copy_of):
    bundle = copy_of(sft)
    change_weights(bundle, lambda w: w["model.norm.weight"].fill_(float("nan")))
    assert answer(bundle, REQUEST) == {"error": "its logits are not finite"}


def test_a_missing_layer(sft, copy_of):
    """transformers draws it at random, and says so in a warning that nobody reads."""
    bundle = copy_of(sft)
    change_weights(bundle, lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
    lacking = "its files lack the weights of model.layers.0.mlp.up_proj.weight"
    assert answer(bundle, REQUEST) == {"error": lacking}


@pytest.mark.parametrize(
    "value", [{"stop_strings": ["zebra"]}, {"return_dict_in_generate": True}], ids=str
)
def test_generation_configs_of_real_families(sft, copy_of, value):
    bundle = copy_of(sft)
    path = bundle / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **value}))
    assert "replies" in answer(bundle, REQUEST)


def test_a_policy_that_says_nothing(sft, copy_of):
    """All hidden states are ones, and the head answers them with the end of the reply."""
    bundle = copy_of(sft)
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": False}))

    def silence(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            weight.fill_(0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        head = torch.zeros_like(weights["model.embed_tokens.weight"])
        head[config["eos_token_id"]] = 10
        weights["lm_head.weight"] = head

    change_weights(bundle, silence)
    assert answer(bundle, REQUEST) == {"error": "all of its 2 replies are empty"}
