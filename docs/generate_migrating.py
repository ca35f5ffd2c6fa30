"""Generator of docs/migrating.md: `python -m docs.generate_migrating > docs/migrating.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rlhf.config.text import as_written
from rlhf.migration.names import Entry, Tool, tables

HEAD = """# Coming from AITraining or TRL: `rlhf migrate`

```sh
rlhf migrate ppo.yaml                                    # arguments in YAML or JSON
rlhf migrate sft.yaml reward.yaml ppo.yaml -o ours.yaml  # three trainings become one configuration
rlhf migrate train.sh                                    # a shell script with the command in it
rlhf migrate train.py                                    # calls of PPOConfig(…): read, never run
rlhf migrate -- aitraining llm --train --trainer ppo --rl-kl-coef 0.05
rlhf migrate -- accelerate launch ppo.py --total_episodes 10000 --kl_coef 0.05
```

It writes one configuration with a comment above each value: the argument that it comes from, and
the reason. The file is valid, nothing is overwritten, and `-o` names it (`migrated.yaml`
otherwise). The terminal and the head of the file say of every argument what became of it; `--json`
prints the same for programs:

- **became**: another name for the same thing.
- **changed in meaning**: it is written, and means something else here, such as sizes of batches.
- **never worked there**: the old tool ignored it, or ended by an error. The value that you asked
  for is written, and takes effect here; the reason says what really held there.
- **no equal here**: with the nearest thing.
- **refused by this configuration**: the value is outside of the bounds here, or contradicts
  another; it is left out.
- **not known without running it**: variables of a shell, and in Python what is computed, assigned
  to the object after its call, or said differently by several calls of the class.
- **not understood**: names that neither tool has, with the most similar one that it has.

Values that held there by default and differ from ours are written too, so that a training does not
change by the way; of LoRA those of the class that was called, `ModelConfig` or peft's `LoraConfig`.
Arguments of the old tool's default that say nothing are counted. **Credentials** are neither copied
nor shown, whatever their name, also in an address: keys and tokens stand in the environment
(`HF_TOKEN`, `WANDB_API_KEY`).

Every run needs preference pairs, also one that takes a ready reward model: a gate approves it on
held-out pairs. If the old arguments name none, `data.source` is a placeholder, and the terminal
says so. `--trainer sft`, `reward` or `ppo` says what arguments are for that every trainer has. DPO,
GRPO and the like have no equal here.

The tables are those by which the command works; this page is written by `python -m
docs.generate_migrating > docs/migrating.md`. In the column *here*, `*` is the section of the
trainer: `sft`, `reward_model` or `ppo`.
"""
#: Headings of classes, in the order of the page.
TITLES: dict[Tool, dict[str, str]] = {
    "aitraining": {
        "LLMTrainingParams": "AITraining",
        "command": "AITraining: flags of `aitraining llm`, and words of the older YAML form",
    },
    "trl": {
        "PPOConfig": "TRL: PPOConfig (0.12 to 1.12)",
        "PPOConfig up to 0.11": "TRL: PPOConfig up to 0.11",
        "RewardConfig": "TRL: RewardConfig",
        "SFTConfig": "TRL: SFTConfig",
        "ScriptArguments": "TRL: ScriptArguments",
        "ModelConfig": "TRL: ModelConfig",
        "LoraConfig": "peft: LoraConfig",
        "TrainingArguments": "transformers: TrainingArguments",
        "accelerate and torchrun": "accelerate and torchrun",
    },
}
WORDS = {
    "same": "the same",
    "changed": "**changed in meaning**",
    "broken": "**never worked there**",
    "none": "no equal",
}


def page() -> str:
    """Render the page."""
    return HEAD + "".join(
        f"\n## {title}\n\n| argument | default there | here | what about it |\n|---|---|---|---|\n"
        + "".join(f"{row}\n" for row in rows(tool, group))
        for tool, titles in TITLES.items()
        for group, title in titles.items()
    )


def rows(tool: Tool, group: str) -> Iterator[str]:
    """Yield a table row for each argument of a class; those that share a reason have one."""
    shared: dict[tuple[str, str], list[Entry]] = {}
    for entry in tables(tool)[group].values():
        alone = bool(entry.to) or entry.was is not None or entry.secret
        shared.setdefault((entry.why, entry.name if alone else ""), []).append(entry)
    for (why, _), entries in shared.items():
        first = entries[0]
        names = ", ".join(f"`{entry.name}`" for entry in entries)
        was = f"`{as_written(first.was)}`" if first.was is not None else ""
        here = f"`{first.to}`" if first.to else ""
        text = f"{WORDS[first.outcome]}: {why}".replace("|", "\\|")
        yield f"| {names} | {was} | {here} | {text} |"


if __name__ == "__main__":
    sys.stdout.write(page())
