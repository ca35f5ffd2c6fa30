"""Tiny policies that always give the same reply, learned by heart: any text, as a model writes it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from rlhf.config import ArchitectureConfig
from rlhf.data.rendering import Renderer
from rlhf.modeling.base import from_scratch

#: Text that acts on pages and terminals, and characters of several tokens each.
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> \x1b[31m \u202e Grüße 👩‍👩‍👧 日本"
STEPS = 400


def write_parrot(folder: Path, reply: str, context: int = 256) -> Path:
    """Write a policy whose greedy reply to anything is this text, and return its folder."""
    architecture = ArchitectureConfig(
        hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=300, context=context
    )
    model, tokenizer = from_scratch(architecture, ["tea or cup? good bad " + reply] * 2, seed=0)
    renderer = Renderer(tokenizer)
    whole = renderer.encode_reply(reply)
    # Replies to prompts of several lengths: it must know the reply by itself, not by positions.
    prompts = [renderer.encode_prompt("a " * n + "?", 200) for n in (0, 3, 8, 20, 40)]
    width = max(len(prompt) for prompt in prompts) + len(whole)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    targets = torch.full((len(prompts), width), -100)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + len(whole)
        ids[row, :end] = torch.tensor([*prompt, *whole])
        targets[row, len(prompt) : end] = torch.tensor(whole)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(STEPS):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 2e-3:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
