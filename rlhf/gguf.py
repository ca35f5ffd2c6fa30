"""GGUF files of exports: made by llama.cpp's converter, checked by llama-cpp-python.

The converter (convert_hf_to_gguf.py) is in no package of its own: it comes with the sources of
llama.cpp, which llama-cpp-python's source distribution holds. Both tools run in processes of
their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import gguf_check
from rlhf.errors import ConfigError, ExportFailed
from rlhf.files import is_file, read_json, write_json
from rlhf.plain_text import one_line

#: Environment variable with the path of the converter.
CONVERTER = "RLHF_GGUF_CONVERTER"
FILE = "model.gguf"
#: Largest mean difference of the log-probabilities of a reply's tokens between transformers, in
#: float32, and llama.cpp, which rounds activations to the weights' 16 bits in each product.
TOLERANCE = 0.05
_INSTALL = "pip install 'rlhf-pipeline[gguf]'"
_SOURCES = (
    "pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz"
)
#: The converter's names of types that hold a model's own weights without a loss.
_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Tools:
    """Converter that makes a GGUF file; llama-cpp-python checks it."""

    converter: Path


def find_tools(converter: Path | None) -> Tools:
    """Return the tools for GGUF files.

    Args:
        converter: convert_hf_to_gguf.py, or the folder of llama.cpp; None reads `CONVERTER`.

    Raises:
        ConfigError: One is missing.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(
            f"--format gguf: llama-cpp-python, which checks the file, is not installed; {_INSTALL}"
        )
    named = converter or Path(os.environ.get(CONVERTER) or "convert_hf_to_gguf.py")
    path = named if named.suffix == ".py" else named / "convert_hf_to_gguf.py"
    if not is_file(path):
        raise ConfigError(
            f"--converter {str(named)!r}: there is no convert_hf_to_gguf.py of llama.cpp; get it "
            f"by `{_SOURCES}`, and give --converter llama_cpp_python-*/vendor/llama.cpp"
        )
    return Tools(path.absolute())


def add_gguf(
    export: Path, prompts: Sequence[list[int]], replies: Sequence[list[int]], tools: Tools
) -> str:
    """Add `model.gguf` to an export, checked against its own weights; return what was found.

    Args:
        export: A folder that transformers loads.
        prompts: Tokens of prompts.
        replies: Tokens of the policy's replies to them.
        tools: See `find_tools`.

    Raises:
        ExportFailed: The converter does not know the model, or llama.cpp computes something else.
    """
    dtype = str(read_json(export / "config.json").get("dtype", "float32"))
    kind = _TYPES.get(dtype, "f32")
    file = export / FILE
    _convert(export, file, kind, tools)
    request = {
        "file": str(file.resolve()),
        "texts": _texts(export, prompts),
        "prompts": prompts,
        "replies": replies,
    }
    found = _check(request)
    wrong = [i for i, same in enumerate(found["tokens_equal"]) if not same]
    if wrong:
        raise ExportFailed(f"llama.cpp reads prompt {wrong[0] + 1} as other tokens{_NOTHING}")
    expected = _log_probs(export, prompts, replies)
    pairs = [
        (a, b)
        for ours, theirs in zip(expected, found["log_probs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    gaps = [abs(a - b) for a, b in pairs]
    mean, most = sum(gaps) / len(gaps), max(gaps)
    if not mean <= TOLERANCE:
        raise ExportFailed(
            f"llama.cpp gives the tokens of the replies other probabilities: their logarithms "
            f"differ by {mean:.3g} in the mean, and at most {TOLERANCE:g} is rounding{_NOTHING}"
        )
    best, count = sum(map(sum, found["is_best"])), len(gaps)
    return (
        f"{FILE} ({kind}), made by llama.cpp's converter, was loaded by llama-cpp-python "
        f"{found['version']}: it reads {len(prompts)} prompts as the same tokens, {best:,} of "
        f"{count:,} tokens of the policy's greedy replies are its first choice too, and their "
        f"log-probabilities differ by {mean:.2g} in the mean and {most:.2g} at most "
        f"(tolerance of the mean: {TOLERANCE:g})."
    )


_NOTHING = "; nothing was written"


def _convert(export: Path, file: Path, kind: str, tools: Tools) -> None:
    command = [
        sys.executable, str(tools.converter), str(export), "--outfile", str(file),
        "--outtype", kind,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        command, cwd=export.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if process.returncode != 0 or not file.is_file():
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        reason = one_line((lines or ["no message"])[-1])[:200]
        if "get_vocab_base_pre" in process.stderr:
            reason = "it does not know this tokenizer, such as one trained from scratch"
        raise ExportFailed(f"llama.cpp's converter refuses the model ({reason}){_NOTHING}")


def _texts(export: Path, prompts: Sequence[list[int]]) -> list[str | None]:
    """Return the prompts as texts that transformers reads as the same tokens; else None."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(export, local_files_only=True)
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in prompts]
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [
        text if back == ids else None for text, back, ids in zip(texts, again, prompts, strict=True)
    ]


def _log_probs(
    export: Path, prompts: Sequence[list[int]], replies: Sequence[list[int]]
) -> list[list[float]]:
    """Return the log-probabilities of the replies' tokens by transformers, in float32."""
    import torch

    from rlhf.modeling.base import load_policy

    model = load_policy(export).eval()
    found: list[list[float]] = []
    with torch.no_grad():
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([[*prompt, *reply]])
            logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logs.gather(1, torch.tensor(reply)[:, None])[:, 0].tolist())
    return found


def _check(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gguf-check-") as scratch:
        asked, answer = Path(scratch, "request.json"), Path(scratch, "result.json")
        write_json(asked, request)
        process = subprocess.run(
            [sys.executable, "-I", gguf_check.__file__, str(asked), str(answer)], cwd=scratch,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if process.returncode != 0 or not answer.is_file():
            last = [line for line in process.stderr.splitlines() if line.strip()][-1:]
            raise ExportFailed(
                f"llama.cpp can't load the file ({one_line(*last or [''])}){_NOTHING}"
            )
        return json.loads(answer.read_text(encoding="utf-8"))
