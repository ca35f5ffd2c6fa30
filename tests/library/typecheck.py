"""Run-time checks of types and array shapes in `rlhf`, by beartype and jaxtyping."""

from __future__ import annotations

import builtins
import re
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype._decor import decorcache
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
#: A TypeError, as jaxtyping's and Python's own.
CONF = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, violation_type=TypeError)
check = beartype(conf=CONF)


def install() -> None:
    """Check all functions of `MODULES`, which must not be imported yet; idempotent.

    jaxtyping binds the arguments of each call anew, 100 µs of it. So it is left to functions that
    name shapes; of others beartype's own checks are as strict, and nearly free.

    Raises:
        RuntimeError: Some of them are imported already and would not be checked.
    """
    if any(getattr(finder, "_rlhf", False) for finder in sys.meta_path):
        return
    names = [f"rlhf.{module}" for module in MODULES]
    if early := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"imported before the type checker was installed: {early}")
    _leave_named_tuples()
    _leave_inner_functions()
    _leave_functions_without_shapes()
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


def _leave_inner_functions() -> None:
    """Leave functions within functions: each call of the outer one would compile their checks."""
    decorate = decorcache.beartype_object

    def outer_only(obj: object, *args: object, **options: object) -> object:
        inner = isinstance(obj, FunctionType) and "<locals>" in obj.__qualname__
        return obj if inner else decorate(obj, *args, **options)

    decorcache.beartype_object = outer_only


def _leave_functions_without_shapes() -> None:
    """Let jaxtyping's import hook give functions that name no shapes to beartype alone."""
    bind = jaxtyping.jaxtyped

    def decorator(*, typechecker: object) -> object:
        def decorate(obj: object) -> object:
            if isinstance(obj, type) and "__init__" in vars(obj) and is_dataclass(obj):
                if not _is_bound(obj.__init__):
                    obj.__init__ = check(obj.__init__)
                    return obj
            elif isinstance(obj, FunctionType):
                if "<locals>" in obj.__qualname__:
                    return obj
                if not _is_bound(obj):
                    return check(obj)
            return bind(typechecker=typechecker)(obj)

        return decorate

    jaxtyping.jaxtyped = decorator


def _is_bound(function: FunctionType) -> bool:
    """Whether it names shapes, or a name that only type checkers import: jaxtyping skips those."""
    text = " ".join(map(str, function.__annotations__.values()))
    names = re.findall(r"(?<![.\w])[A-Za-z_]\w*", text)
    known = vars(builtins) | function.__globals__
    return any(
        name not in known or type(known[name]).__module__.startswith("jaxtyping") for name in names
    )


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
