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
    "<img src=x", " onerror=", "\"document.title='owned'\"", ">", " \x1b[31m ", "\u202e", " Gr",
    "ü", "n und ", "日", " or ", "👍",
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
    embedding = model.get_input_embeddings()
    embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    renderer = Renderer(tokenizer)
    ids = [renderer.encode_prompt("?", 100)[-1], *renderer.encode_reply("".join(parts))]
    assert len({*ids}) == len(ids), "a token that occurs twice would have two followers"
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        weight.data.zero_()
    # With tied weights no token could have a follower other than one that it follows itself.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    now, following = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    states = model.model.norm(embedding(now)).detach()
    optimizer = torch.optim.Adam([model.lm_head.weight], 0.1)
    for _ in range(100):
        loss = F.cross_entropy(model.lm_head(states), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
