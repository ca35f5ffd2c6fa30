"""Run-time checks of types and array shapes in `rlhf`, by beartype and jaxtyping."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

from beartype import BeartypeConf, beartype
from beartype.claw import beartype_packages
from jaxtyping import config, install_import_hook

#: Without `config` and `store`, as beartype refuses typing.Self in pydantic's validators, and
#: without `world`, which has no arrays and whose small functions are called a million times.
MODULES = [
    *("champions", "custom_code", "data", "environments", "errors", "external"),
    *("files", "gates", "launch", "modeling", "ppo", "ranks", "report", "reward", "sft"),
    *("signals", "smoke", "stage", "statistics", "trl_adapter"),
]

#: Of these, the packages and modules with small functions, which beartype checks by itself.
SMALL = [
    f"rlhf.{module}" for module in ("data", "errors", "files", "gates", "report", "statistics")
]

#: Accepts an int for a float, as type checkers do (PEP 484). Variables are left to pyright.
CONF = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False)
check = beartype(conf=CONF)


def install() -> None:
    """Check all functions of `MODULES`, which must not be imported yet; idempotent.

    jaxtyping binds the arguments of each call anew, 100 µs of it, which functions of `SMALL` are
    called for a million times. There beartype's own checks are as strict, and nearly free.

    Raises:
        RuntimeError: Some of them are imported already and would not be checked.
    """
    if any(getattr(finder, "_rlhf", False) for finder in sys.meta_path):
        return
    names = [f"rlhf.{module}" for module in MODULES]
    if early := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"imported before the type checker was installed: {early}")
    _leave_named_tuples()
    beartype_packages(SMALL, conf=CONF)
    # Before it on the path, so that these modules have jaxtyping's checks instead.
    install_import_hook(bound_by_jaxtyping(names), f"{__name__}.check")
    sys.meta_path[0]._rlhf = True


def _leave_named_tuples() -> None:
    """Leave their constructors, whose module is no real one: beartype finds no names there."""
    make = typing._make_nmtuple

    def unchecked(*args: object, **options: object) -> type:
        made = make(*args, **options)
        made.__new__.__no_type_check__ = True
        return made

    typing._make_nmtuple = unchecked


def bound_by_jaxtyping(names: list[str]) -> list[str]:
    """Return the modules that jaxtyping checks: all but those of `SMALL` that name no shapes.

    Of names that only type checkers import beartype fails at the first call; jaxtyping leaves them
    unchecked. It fails too where a dataclass inherits fields of another module's, as in `modeling`.

    Raises:
        FileNotFoundError: One of them is no module any more, and would not be checked.
    """
    root = Path(__file__).parents[2]
    marks = ("from jaxtyping import", "if TYPE_CHECKING:")
    bound = []
    for name in names:
        place = root.joinpath(*name.split("."))
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        texts = {path: path.read_text("utf-8") for path in files}
        if name not in SMALL:
            bound.append(name)
            continue
        bound += [
            ".".join(path.relative_to(root).with_suffix("").parts)
            for path, text in texts.items()
            if any(mark in text for mark in marks)
        ]
    return bound


def enable(wanted: bool) -> None:
    """Switch the checks of shapes on or off for calls from now on."""
    config.update("jaxtyping_disable", not wanted)
