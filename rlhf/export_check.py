"""Check of an exported model in a process that has nothing of this project.

`python -I rlhf/export_check.py <request.json> <result.json>` loads the folder as a user would, by
transformers alone, answers prompts one at a time and greedily, and renders conversations by the
folder's own chat template. `rlhf/export.py` compares that with the policy in the store. It stands
apart because it runs as a script: an import of anything here, or of trl, is refused.
"""

from __future__ import annotations

import gc
import importlib.abc
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Packages that a user of an export does not have.
FOREIGN = ("rlhf", "tasks", "flows", "trl", "prefect")

Ids = list[int]


class Refused(importlib.abc.MetaPathFinder):
    """Refuses imports of this project, which may be installed beside transformers."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Refuse a module of `FOREIGN`; say nothing of others."""
        if fullname.partition(".")[0] in FOREIGN:
            raise ImportError(f"{fullname} is no part of an export")


def main(arguments: Sequence[str]) -> None:
    """Run the check that a request describes, and write its result."""
    sys.meta_path.insert(0, Refused())
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        result = check(request)
    except Exception as error:  # a broken export can raise anything
        line = " ".join(str(error).split())[:300]
        result = {"error": f"{type(error).__name__}: {line}"}
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the folder's model and tokenizer say, and the versions that said it.

    `templates` has the token ids of each conversation; `replies` those of each prompt, computed in
    float32; `own` those in the model's own dtype; `adapter` those of its adapter, merged.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(request["threads"])
    folder, device = request["folder"], torch.device(request["device"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    result: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "templates": [_rendered(tokenizer, each) for each in request["conversations"]],
    }  # fmt: skip
    model = _load(folder, torch.float32, device)
    result["replies"] = [_answer(model, *pair) for pair in _pairs(request)]
    del model
    gc.collect()
    model = _load(folder, "auto", device)
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    own = model.dtype != torch.float32
    result["own"] = [_answer(model, *pair) for pair in _pairs(request)] if own else None
    del model
    gc.collect()
    if request["adapter"]:
        import peft

        result["versions"]["peft"] = peft.__version__
        merged = _merged(request, device)
        result["adapter"] = [_answer(merged, *pair) for pair in _pairs(request)]
    return result


def _pairs(request: Mapping[str, Any]) -> list[tuple[Ids, Ids, int]]:
    length = request["max_new_tokens"]
    return [(p, r, length) for p, r in zip(request["prompts"], request["replies"], strict=True)]


def _load(folder: str, dtype: Any, device: Any) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM.from_pretrained
    model, info = loader(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if info["missing_keys"]:  # transformers draws them at random
        raise ValueError(f"the files lack the weights of {min(info['missing_keys'])}")
    return model.to(device).eval()


def _merged(request: Mapping[str, Any], device: Any) -> Any:
    """Return the adapter's base with the adapter merged, rounded as the merged files are."""
    import peft
    import torch

    base = _load(request["adapter"]["base"], torch.float32, torch.device("cpu"))
    adapted: Any = peft.PeftModel.from_pretrained(base, request["adapter"]["folder"])
    inner = adapted.get_base_model()
    touched = {f"{n}.weight" for n, each in inner.named_modules() if hasattr(each, "lora_A")}
    merged = adapted.merge_and_unload()
    stored = dict(_load(request["folder"], "auto", torch.device("cpu")).named_parameters())
    for name, weight in merged.named_parameters():
        if name in touched:
            weight.data = weight.data.to(stored[name].dtype).float()
    return merged.to(device).eval()


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> Ids:
    ids: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(ids["input_ids"])


def _answer(model: Any, prompt: Ids, expected: Ids, length: int) -> dict[str, Any]:
    """Return the greedy reply to a prompt, and where it is another than expected by how much.

    That is the difference of the log-probabilities of the two tokens at the first place where the
    replies differ: rounding alone makes another choice only between equals.
    """
    import torch
    from transformers import GenerationConfig

    own = model.generation_config
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id,
    )  # fmt: skip
    ids = torch.tensor([prompt], device=model.device)
    # Unset values would be taken from the model's own, such as a penalty for repetitions.
    model.generation_config = config
    try:
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        reply = output[0, len(prompt) :].tolist()
        return {"ids": reply, "gap": _gap(model, prompt, reply, expected)}
    finally:
        model.generation_config = own


def _gap(model: Any, prompt: Ids, reply: Ids, expected: Ids) -> float | None:
    """Return the difference at the first place where replies differ; None if they are equal.

    Infinite where one of them ends before the other with the same tokens.
    """
    import torch

    if reply == expected:
        return None
    pairs = enumerate(zip(reply, expected, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), None)
    if place is None:
        return float("inf")
    ids = torch.tensor([[*prompt, *reply[:place]]], device=model.device)
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
    return float((logs[reply[place]] - logs[expected[place]]).abs())


if __name__ == "__main__":
    main(sys.argv[1:])
