"""Memory and time that a chat template takes for a chat of two short turns, before it is used.

A template is a program, and its sandbox limits what it may reach, not what it may compute: one line
can loop for ever or ask for a terabyte. So one that could is rendered once in a process under a
limit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from rlhf.limits import MAX_CONFIG_BYTES, run_limited

#: Bytes of memory and seconds of CPU for one short chat; a real template takes milliseconds.
MEMORY, SECONDS = 2**29, 2.0
#: Loops, and values that are set, that can't multiply to much over a short chat.
_LOOPS, _VALUES = 3, 8
#: Filters whose result is about as long as what they are given.
_PLAIN_FILTERS = frozenset(("trim", "upper", "lower", "string", "length", "first", "last"))

#: Renders the templates of its input; see `rlhf.limits.run_limited`. What else may be wrong with
#: one is found where it is used.
_RENDERER = """
import json, resource, signal, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
memory, seconds = int(sys.argv[1]), float(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
def refuse(text="", *_):
    raise ValueError(text)
made = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
made.globals |= {"raise_exception": refuse, "strftime_now": str}
made.filters["tojson"] = lambda value, *_, **__: json.dumps(value)
turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "A reply."}]
values = {"messages": turns, "bos_token": "", "eos_token": "", "tools": None, "documents": None}
print("true", flush=True)
for template in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_PROF, seconds)
    sizes = [0, 0]
    for start in (False, True):
        try:
            text = made.from_string(template)
            for piece in text.generate(**values, add_generation_prompt=start):
                sizes[start] += len(piece)
                if sizes[start] > 2**20:
                    raise MemoryError
        except MemoryError:
            sizes = None
            break
        except Exception:
            pass
    print(json.dumps(sizes), flush=True)
"""


@functools.lru_cache(maxsize=64)
def cost_error(template: str) -> str | None:
    """Return why a template costs too much, or None; one that is no Jinja costs nothing."""
    from jinja2 import Environment, TemplateError

    if len(template) > MAX_CONFIG_BYTES:
        return f"has {len(template):,} characters, and at most {MAX_CONFIG_BYTES:,} are read"
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError):
        return None
    if _is_cheap(parsed) or run_limited(_RENDERER, [template], MEMORY, SECONDS) not in ([], [None]):
        return None
    return (
        f"takes more than {SECONDS:g} s, {MEMORY // 2**20} MB or a million characters for two "
        "short turns"
    )


def _is_cheap(tree: Any) -> bool:
    """Return whether a template can't take much for a short chat, whatever the chat is."""
    from jinja2 import nodes

    costly = (
        nodes.Mul, nodes.Pow, nodes.Mod, nodes.Call, nodes.Macro, nodes.CallBlock,
        nodes.AssignBlock, nodes.FilterBlock, nodes.Include, nodes.Import, nodes.Extends,
        nodes.With,
    )  # fmt: skip
    if any(True for _ in tree.find_all(costly)):
        return False
    filters = [*tree.find_all(nodes.Filter)]
    loops, values = ([*tree.find_all(kind)] for kind in (nodes.For, nodes.Assign))
    return (
        all(each.name in _PLAIN_FILTERS and not each.args + each.kwargs for each in filters)
        and not any(loop.recursive for loop in loops)
        # Once through the chat each: not through a long literal, its characters, or in each other.
        and all(
            isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages" for loop in loops
        )
        and not any(True for loop in loops for _ in loop.find_all(nodes.For))
        and not any(_sets_messages(each.target) for each in (*loops, *values))
        and not any(isinstance(each, (nodes.Add, nodes.Concat)) for v in values for each in _all(v))
        and len(loops) <= _LOOPS
        and len(values) <= _VALUES
    )


def _sets_messages(target: Any) -> bool:
    return any(getattr(each, "name", None) == "messages" for each in _all(target))


def _all(node: Any) -> Iterator[Any]:
    """Yield a node of a template, and all within it."""
    yield node
    for child in node.iter_child_nodes():
        yield from _all(child)
