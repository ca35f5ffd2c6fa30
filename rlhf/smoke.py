"""Smoke test before promotion: load the published policy and sample a few replies.

`python -m rlhf.smoke <folder> <request.json>` loads the folder as a user would: by transformers
alone, in a process of its own without network or cache. It answers the request's prompts, and
prints the replies as JSON on its last line.
"""
# ruff: noqa: T201 (a command prints)

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import rlhf
from rlhf.config import RuntimeConfig
from rlhf.data.rendering import Renderer, configured_ends, known_ends, listed_ids
from rlhf.data.rows import PROMPTS_EVAL, Prompt, PromptRow, read_rows
from rlhf.errors import PromptUnusable, RLHFError, SmokeTestFailed
from rlhf.files import read_json, write_json

#: File with the replies.
SMOKE = "smoke.json"
#: Number of prompts, and most tokens of a reply.
PROMPTS = 4
NEW_TOKENS = 32
#: Seconds from the parent's time limit to the process's own, and from that to SIGALRM.
_GRACE = 5.0


def smoke_test(
    bundle: Path, data: Path, *, seconds: float, runtime: RuntimeConfig | None = None
) -> list[dict[str, Any]]:
    """Return the policy's replies to a few held-out prompts, each {prompt, reply}.

    Args:
        bundle: The policy's published files.
        data: A dataset's folder.
        seconds: Time limit, loading included.
        runtime: Device and threads.

    Raises:
        SmokeTestFailed: The policy can't be loaded, its logits are not finite, all replies are
            empty, or the time limit has passed.
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
        result = _output(command, Path(scratch), seconds)
    if "error" in result:
        raise _failed(result["error"])
    return [{"prompt": p, "reply": r} for p, r in zip(prompts, result["replies"], strict=True)]


def main() -> None:
    """Run the command."""
    folder, request = Path(sys.argv[1]), read_json(Path(sys.argv[2]))
    # The parent ends this process at its time limit; this ends it if the parent died.
    end_after(request["seconds"] + _GRACE)
    with contextlib.redirect_stdout(sys.stderr):
        result = answer(folder, request)
    print(json.dumps(result))


def answer(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the replies of a folder's model as `replies`, or the failure as `error`."""
    try:
        runtime = RuntimeConfig.model_validate(request["runtime"])
        replies = sample_replies(folder, request["prompts"], runtime)
    except Exception as error:  # a broken bundle can raise anything
        name = "" if isinstance(error, RLHFError) else f"{type(error).__name__}: "
        return {"error": name + str(error).strip().partition("\n")[0]}
    if not any(replies):
        return {"error": f"all of its {len(replies)} replies are empty"}
    return {"replies": replies}


def end_after(seconds: float) -> None:
    """Start a watchdog that ends this process with status 1 after `seconds`.

    Code that holds the GIL is ended by SIGALRM, `_GRACE` seconds later.
    """

    def end() -> None:
        # Neither print nor sys.exit: the main thread may hold the stream's lock, or never return.
        os.write(2, f"Timeout ({timedelta(seconds=seconds)})!\n".encode())
        os._exit(1)

    # `faulthandler.dump_traceback_later` reads the stacks of running threads, and crashed with
    # SIGSEGV in one of twelve runs.
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # The default action of SIGALRM is the kernel's and needs no GIL.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)


def _output(command: Sequence[str], scratch: Path, seconds: float) -> Mapping[str, Any]:
    """Run the command, and return its last line's JSON, or the failure as `error`."""
    with (
        (scratch / "stderr").open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, cwd=scratch, env=_environment(scratch), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, start_new_session=True, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise _failed(
                f"it took more than promotion.smoke_seconds = {seconds:g}; raise that if the model "
                "is large, or try a faster runtime.device"
            ) from None
        finally:  # also after an interrupt
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode < 0:
            return {"error": f"its process was ended by signal {-process.returncode}"}
        errors.seek(0)
        last = [line for line in errors if line.strip()][-1:]
        return json.loads(output.splitlines()[-1]) if output else {"error": "".join(last).strip()}


def _environment(scratch: Path) -> dict[str, str]:
    """Return an environment with this code, offline and with an empty hub cache.

    So a bundle that lacks a file fails.
    """
    paths = [str(Path(rlhf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _failed(reason: str) -> SmokeTestFailed:
    return SmokeTestFailed(
        f"smoke test: the published policy can't answer, so it is not promoted: {reason}"
    )


def sample_replies(folder: Path, prompts: Sequence[Prompt], runtime: RuntimeConfig) -> list[str]:
    """Load a published model and its tokenizer by transformers alone; sample replies.

    Raises:
        SmokeTestFailed: Weights are missing or not finite, or replies end elsewhere than in
            training; or whatever transformers raises.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.modeling.base import context_length
    from rlhf.modeling.device import prepare_device

    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    renderer = Renderer(tokenizer, known_ends(tokenizer, configured_ends(folder)))
    device = prepare_device(runtime)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(folder, use_safetensors=True, output_loading_info=True, **local)
    if info["missing_keys"]:  # transformers initialises them at random
        raise SmokeTestFailed(f"its files lack the weights of {sorted(info['missing_keys'])[0]}")
    _check_end(model, renderer)
    model = model.to(device).eval()
    max_length = context_length(model) - NEW_TOKENS
    torch.manual_seed(0)
    with torch.no_grad():
        return [_reply(model, renderer, prompt, max_length) for prompt in prompts]


def _check_end(model: Any, renderer: Renderer) -> None:
    """Check that plain `generate` ends a reply where the policy learnt to end it."""
    ends = model.generation_config.eos_token_id
    if renderer.end_id not in listed_ids(ends):
        token = renderer.tokenizer.convert_ids_to_tokens(renderer.end_id)
        raise SmokeTestFailed(
            f"its replies end with {token}, and its generation_config.json has eos_token_id {ends}"
        )


def _reply(model: Any, renderer: Renderer, prompt: Prompt, max_prompt: int) -> str:
    """Sample a reply as evaluation does: a small policy's greedy reply may be empty.

    A prompt that no stage could give the model gets none.
    """
    import torch

    try:
        ids = renderer.encode_prompt(prompt, max_prompt)
    except PromptUnusable:
        return ""

    input_ids = torch.tensor([ids], device=model.device)
    if not model(input_ids=input_ids).logits.isfinite().all():
        raise SmokeTestFailed("its logits are not finite")
    # The ends are those of the published generation configuration, as a user has them.
    output = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW_TOKENS,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=renderer.tokenizer.pad_token_id, return_dict_in_generate=False,
        tokenizer=renderer.tokenizer,  # for `stop_strings`
    )  # fmt: skip
    return renderer.decode(output[0, len(ids) :].tolist())


if __name__ == "__main__":
    main()
