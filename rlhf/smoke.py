"""The last look before promotion: does the published policy answer, loaded as a user would?

`python -m rlhf.smoke <folder> <request.json>` loads the folder by transformers alone, in a process
that knows nothing of the training and reaches no network, answers the request's prompts, and prints
the replies as JSON on its last line.
"""
# ruff: noqa: T201 (a command prints)

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rlhf
from rlhf.config import RuntimeConfig
from rlhf.data.rows import PROMPTS_EVAL, Prompt, PromptRow, read_rows
from rlhf.errors import RLHFError, SmokeTestFailed
from rlhf.stage import read_json, write_json

SMOKE = "smoke.json"
PROMPTS = 4
NEW_TOKENS = 32
#: Seconds after its time in which it is ended from outside.
_GRACE = 5.0


def smoke_test(
    bundle: Path, data: Path, *, seconds: float, runtime: RuntimeConfig | None = None
) -> list[dict[str, Any]]:
    """The policy's replies to a few held-out prompts, each {prompt, reply}.

    Args:
        bundle: The policy's published files.
        data: A dataset's folder.
        seconds: Time limit for all of it.
        runtime: Device and threads.

    Raises:
        SmokeTestFailed: It can't be loaded, computes what is no number, says nothing at all, or
            takes too long.
    """
    prompts = [row.prompt for row in read_rows(data / PROMPTS_EVAL, PromptRow)[:PROMPTS]]
    if not prompts:
        raise SmokeTestFailed("smoke test: the dataset has no held-out prompts to ask")
    runtime = runtime or RuntimeConfig()
    with tempfile.TemporaryDirectory(prefix="smoke-") as scratch:
        request = Path(scratch, "request.json")
        write_json(
            request,
            {"prompts": prompts, "runtime": runtime.model_dump(mode="json"), "seconds": seconds},
        )
        command = [sys.executable, "-m", "rlhf.smoke", str(bundle.resolve()), str(request)]
        answer = _asked(command, Path(scratch), seconds)
    if "error" in answer:
        raise _failed(answer["error"])
    return [{"prompt": p, "reply": r} for p, r in zip(prompts, answer["replies"], strict=True)]


def _failed(reason: str) -> SmokeTestFailed:
    return SmokeTestFailed(
        f"smoke test: the published policy can't answer, so it is not promoted: {reason}"
    )


def _asked(command: Sequence[str], scratch: Path, seconds: float) -> Mapping[str, Any]:
    with (
        (scratch / "stderr").open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, cwd=scratch, env=_environment(scratch), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, start_new_session=True, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise _failed(
                f"it took more than promotion.smoke_seconds = {seconds:g}; raise that if the model "
                "is large, or try a faster runtime.device"
            ) from None
        finally:  # also of what interrupts us
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode < 0:
            return {"error": f"its process was ended by signal {-process.returncode}"}
        errors.seek(0)
        last = [line for line in errors if line.strip()][-1:]
        return json.loads(said.splitlines()[-1]) if said else {"error": "".join(last).strip()}


def _environment(scratch: Path) -> dict[str, str]:
    """This code, no network, and no cache: what the bundle lacks is not found elsewhere."""
    paths = [str(Path(rlhf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def answer(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The replies of the model in that folder, or the error in the way."""
    try:
        runtime = RuntimeConfig.model_validate(request["runtime"])
        replies = _replies(folder, request["prompts"], runtime)
    except Exception as error:  # whatever a broken bundle leads to is the answer
        name = "" if isinstance(error, RLHFError) else f"{type(error).__name__}: "
        return {"error": name + str(error).strip().partition("\n")[0]}
    if not any(replies):
        return {"error": f"all of its {len(replies)} replies are empty"}
    return {"replies": replies}


def _replies(folder: Path, prompts: Sequence[Prompt], runtime: RuntimeConfig) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.data.rendering import Renderer
    from rlhf.modeling.base import context_of, device_of

    own: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    renderer = Renderer(AutoTokenizer.from_pretrained(folder, **own))
    device = device_of(runtime)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(folder, use_safetensors=True, output_loading_info=True, **own)
    if found["missing_keys"]:  # transformers would draw them at random
        raise SmokeTestFailed(f"its files lack the weights of {sorted(found['missing_keys'])[0]}")
    model = model.to(device).eval()
    room = context_of(model) - NEW_TOKENS
    torch.manual_seed(0)
    with torch.no_grad():
        return [_reply(model, renderer, renderer.encode_prompt(prompt, room)) for prompt in prompts]


def _reply(model: Any, renderer: Any, ids: list[int]) -> str:
    """Sampled as the gates' replies were: the likeliest one of a small policy may be empty."""
    import torch

    asked = torch.tensor([ids], device=model.device)
    if not model(input_ids=asked).logits.isfinite().all():
        raise SmokeTestFailed("its logits are not finite")
    end = renderer.tokenizer.eos_token_id
    made = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW_TOKENS,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return renderer.decode(made[0, len(ids) :].tolist())


def main() -> None:
    """Run the command."""
    folder, request = Path(sys.argv[1]), read_json(Path(sys.argv[2]))
    # Whoever asked ends this process in time; this is for when they are gone.
    faulthandler.dump_traceback_later(request["seconds"] + _GRACE, exit=True)
    with contextlib.redirect_stdout(sys.stderr):
        said = answer(folder, request)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
