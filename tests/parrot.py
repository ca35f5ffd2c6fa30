"""Tiny policies whose greedy reply is always the same: any text, as a model writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from rlhf.config import ArchitectureConfig
from rlhf.data.rendering import Renderer
from rlhf.modeling.base import from_scratch

#: Text that acts on pages and terminals, and characters of several tokens each.
HOSTILE_PARTS = (
    "<img src=x", " onerror=", "\"document.title='owned'\"", ">", " \x1b[31m ", "\u202e", " Gr", "ü",
    "n und ", "日", " or ", "👍",
)  # fmt: skip
HOSTILE = "".join(HOSTILE_PARTS)


def write_parrot(folder: Path, parts: Sequence[str] = HOSTILE_PARTS, context: int = 256) -> Path:
    """Write a policy that always replies with these parts, and return its folder.

    Attention and MLP add nothing to its hidden states, so that a token depends on the one before
    it alone. Parts of ASCII are one token each, others a token for each byte.
    """
    architecture = ArchitectureConfig(
        hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=300, context=context
    )
    model, tokenizer = from_scratch(architecture, ["tea or cup? good bad"] * 2, seed=0)
    tokenizer.add_tokens([part for part in parts if part.isascii()])
    model.resize_token_embeddings(len(tokenizer))
    renderer = Renderer(tokenizer)
    ids = [renderer.encode_prompt("?", 100)[-1], *renderer.encode_reply("".join(parts))]
    assert len({*ids}) == len(ids), "a token that occurs twice would have two followers"
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        weight.data.zero_()
    # What is left of the model, without the passes through its layers.
    embedding, norm = model.get_input_embeddings().weight, model.model.norm
    optimizer = torch.optim.Adam([embedding], 2e-2)
    now, following = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    for _ in range(400):
        loss = F.cross_entropy(norm(embedding[now]) @ embedding.T, following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
