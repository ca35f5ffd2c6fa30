"""Generator of docs/ppo.md: `python -m docs.generate_ppo > docs/ppo.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from docs.fields import advised_of, bounds_of, default_of, meaning_of
from rlhf.config.ppo import ALIASES, COMPAT, PPOConfig
from rlhf.config.text import as_written

HEAD = """# PPO's parameters

All fields of section `ppo`. Those with a name in the second column also go by it: in YAML (in the
section or at the top), in Python (`PPOConfig(rl_kl_coef=0.05)`), in a Prefect parameter, and on the
command line, where every field is `--ppo.<name>=<value>` and dashes are as good as underscores:
`--rl-kl-coef 0.05`. A field that is true or false may stand alone, as `--ppo.kl-audit` or
`--rl-optimize-device-cache`, and is switched off by `--ppo.no-kl-audit`,
`--no-rl-optimize-device-cache` or `--no-optimize-device-cache`. One field under both of its names
in one place is an error; an override replaces a preset's value under either name.
A mapping given whole (`--rl-env-config '{...}'`) replaces the preset's; a dotted name changes one
value in it (`--ppo.env_config.components.length.weight=2`), and adds a component if there is none.

With a pretrained base some defaults differ: [models.md](models.md#defaults-for-a-pretrained-base).

A value beyond its bounds is an error. One outside the advised range is allowed: if it is your own,
a warning names it before work starts, and it is recorded in the report (`report.html` and
`report.json` of the report's artifact). Bounds such as (0, 1] leave 0 out and let 1 in.

This page is written by `python -m docs.generate_ppo > docs/ppo.md`.

| field | also | default | bounds | advised | meaning |
|---|---|---|---|---|---|
"""
COMPAT_HEAD = """
## What `compat` sets

Where the peers differ. A field that is given by itself wins.

| field | default | {peers} |
|---|---|{dashes}
"""


def page() -> str:
    """Render the page."""
    return HEAD + "".join(f"{row}\n" for row in rows()) + compat_table()


def rows() -> Iterator[str]:
    """Yield a table row for each field of section `ppo`, in their order."""
    alias_of = {name: alias for alias, name in ALIASES.items()}
    for name, field in PPOConfig.model_fields.items():
        alias = f"`{alias_of[name]}`" if name in alias_of else ""
        cells = (f"`{name}`", alias, default_of(field), bounds_of(field), advised_of(field))
        yield "| " + " | ".join((*cells, meaning_of(field))) + " |"


def compat_table() -> str:
    """Render the table of the values that each `compat` sets."""
    names = dict.fromkeys(name for values in COMPAT.values() for name in values)
    peers = " | ".join(f"`{peer}`" for peer in COMPAT)
    lines = [COMPAT_HEAD.format(peers=peers, dashes="---|" * len(COMPAT))]
    for name in names:
        cells = (
            f"`{as_written(v[name])}`" if name in v else "as by default" for v in COMPAT.values()
        )
        default = default_of(PPOConfig.model_fields[name])
        lines.append(f"| `{name}` | {default} | {' | '.join(cells)} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
