"""Bad inputs of every command of `rlhf`, as the command itself lists them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cyclopts import App

from benchmarks.bad_inputs.cases import Case
from benchmarks.bad_inputs.folders import DAMAGES, DATA, PRESETS, SOUND
from flows.cli import app
from rlhf.config import PipelineConfig
from rlhf.config.fields import field_types, flatten

#: What a user may give in place of any argument.
HOSTILE = (
    "", " ", "\t", "--", "-", "-1", "0", "[/x]", "[bold red]", "a\0b", "a\nb", "a\r\x1b[31mb",
    "\u202eabc", "\udcff\udcfe", "\ud800", "x" * 300, "x" * 100_000, "d/" * 3_000, "9" * 5_000,
    str(10**30), "1e400", "nan", "inf", "null", "true", "{}", "[]", "{a: [", "=", "a=b=c", "@", ".",
    "..", "/", "../../x", "~nobody/x", "~", "folder", "empty", "pipe", "pipe.yaml", "pipe.jsonl",
    "zero.yaml", "dangling.yaml", "loop.yaml", "folder.yaml", "bytes.yaml", "deep.yaml", "nothing",
    "nothing.yaml", "nothing.jsonl", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem",
    "/proc/1/root/x", "s3://", "s3:///x", "s3://b?x", "s3://b#x", "s3://u:p@b/x", "S3://bucket",
    "gs://b/x", "file://", "file://host/x", "file:///\0", "http://x", "https://user:pw@h/x",
    "http://169.254.169.254/", "ftp://x", "artifact:", "artifact:zz", "artifact:000000",
    "champion:", "champion:[/x]", "champion:../x", "000000", "f" * 64, "0" * 65,
    "\u0430\u0441\u0441", "\uff11\uff12", "\u2028", "\ufeffx", "caf\u00e9", "\U0001f4a5" * 50,
    "$(touch pwned)", "`touch pwned`", "; touch pwned", "%s%n", "{0}", "{x.__class__}", "*", "?",
    "--help-me", "--store", "!!python/object:os.system", "01234567-89ab-cdef-0123-456789abcdef",
)  # fmt: skip

#: What no field for numbers takes, and none for flags.
NO_NUMBERS = (
    "nan", "inf", "-inf", "1e400", str(10**30), "9" * 5_000, "[[1]]", "{}x", "\u2460", "--1", "0x",
    "1_", "''", '{"a": {"b": 1}}', "null\u200b",
)  # fmt: skip
NO_FLAGS = ("2", "yes!", "[true]", "nan", '{"a": 1}', "maybe", "")

#: Sound arguments for what a case does not try, by the argument's name; a digest as `<kind>`.
FITTING: Mapping[str, str] = {
    "config": "plain.yaml", "store": "stores/sound", "name": "train-sft", "input": "sft=<policy>",
    "source": "pairs.jsonl", "run": "<policy>", "policy": "<policy>", "ref": "<policy>",
    "refs": "<evaluation>", "folder": "folder", "kind": "policy", "model": "<policy>",
    "a": "<policy>", "b": "<policy>", "prompts": "prompts.txt", "why": "because", "ids": "0" * 32,
}  # fmt: skip
#: Sound arguments that commands need although their signature does not say so.
ADDED: Mapping[str, tuple[str, ...]] = {
    "judge": ("--prompts", "prompts.txt"), "compare": ("--prompts", "prompts.txt"),
    "approve": ("--store", "stores/sound"), "artifacts pull": ("--store", "stores/sound"),
}  # fmt: skip
#: Arguments whose sound value is another in one command.
SPECIAL: Mapping[tuple[str, str], str] = {
    ("artifacts pin", "name"): "mine", ("artifacts unpin", "name"): "kept",
    ("artifacts pull", "folder"): "pulled", ("promote", "name"): "default",
    ("rollback", "name"): "default", ("champion", "name"): "default",
    ("approve", "name"): "default",
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """An argument of a command: its name, and its option, or none for a positional one."""

    name: str
    option: str = ""
    required: bool = False
    is_flag: bool = False


@dataclass(frozen=True)
class Command:
    """A command with its words and arguments."""

    name: str
    arguments: tuple[Argument, ...]

    def line(self, tried: str = "", value: str = "") -> tuple[str, ...]:
        """Return the words of a call, in which one argument has this value."""
        words = self.name.split()
        added = ADDED.get(self.name, ())
        for argument in self.arguments:
            is_tried = argument.name == tried
            if not is_tried and not argument.required:
                if argument.option == "--store" and "--store" not in added:
                    words += ["--store", FITTING["store"]]
                continue
            fitting = SPECIAL.get((self.name, argument.name)) or FITTING.get(argument.name, "x")
            given = value if is_tried else fitting
            if argument.option and argument.is_flag:
                words.append(f"{argument.option}={given}" if is_tried else argument.option)
            elif argument.option:
                words += [argument.option, given]
            else:
                words.append(given)
        if tried and f"--{tried}" in added:
            return tuple(words)
        return (*words, *added)


def commands(root: App = app, before: str = "") -> Iterator[Command]:
    """Yield every command and subcommand that the program has."""
    for name in root:
        if name.startswith("-"):
            continue
        command = root[name]
        path = f"{before} {name}".strip()
        if command.default_command is None:
            yield from commands(command, path)
            continue
        yield Command(path, tuple(_arguments(command)))


def _arguments(command: App) -> Iterator[Argument]:
    for argument in command.assemble_argument_collection():
        if argument.children or not argument.parse:
            continue
        option = next((n for n in argument.names if n.startswith("--")), "")
        positional = argument.index is not None
        name = option.removeprefix("--") or argument.name.lower()
        name = argument.name.lower().strip("-") if positional else name
        yield Argument(
            name.replace("-", "_"),
            "" if positional else option,
            argument.required,
            argument.hint is bool,
        )


def argument_cases(chance: random.Random, each: int) -> Iterator[Case]:
    """Yield, for each argument of each command, some hostile values."""
    for command in commands():
        for argument in command.arguments:
            for value in chance.sample(HOSTILE, min(each, len(HOSTILE))):
                yield Case(f"arguments of {command.name}", command.line(argument.name, value))
        yield Case(f"arguments of {command.name}", (*command.line(), "--nonsense=1"), refused=True)
        if any(a.required for a in command.arguments):
            yield Case(f"arguments of {command.name}", tuple(command.name.split()), refused=True)
    # At a wrong address nothing is damaged, and rows have reached nothing.
    for words in (("artifacts", "ls"), ("artifacts", "verify"), ("artifacts", "gc"), ("champion",),
                  ("artifacts", "gc", "--delete"), ("forget", "--ids", "0" * 32),
                  ("forget", "--record", "--ids", "0" * 32), ("artifacts", "rm")):  # fmt: skip
        yield Case("stores that are none", (*words, "--store", "stores/misspelt"), refused=True)
        yield Case("stores that are none", (*words, "--store", ""), refused=True)
        yield Case("stores that are none", (*words, "--store="), refused=True)
    for word in ("", "nonsense", "--nonsense", "config nonsense", "artifacts", "data nonsense"):
        refused = word not in ("", "artifacts")
        yield Case("unknown commands", tuple(word.split() or [word]), refused=refused)


def preset_cases() -> Iterator[Case]:
    """Yield each hostile preset, read by a command that only shows it and by two that run it."""
    others = ("folder.yaml", "loop.yaml", "dangling.yaml", "zero.yaml", "pipe.yaml", "no.yaml")
    for n, name in enumerate((*PRESETS, *others)):
        if name in SOUND:
            continue
        yield Case("presets", ("config", "show", name), refused=True)
        users = (("run", name), ("preflight", name), ("stage", "train-sft", name),
                 ("data", "inspect", name), ("artifacts", "ls", "--config", name))  # fmt: skip
        yield Case("presets", users[n % len(users)], refused=True)


def value_cases(chance: random.Random, each: int) -> Iterator[Case]:
    """Yield, for each field of the configuration, values that no field of its type can have."""
    for key, value in flatten(PipelineConfig().model_dump(mode="json")):
        yield from _values_of(key, value, chance, each)
    unknown = ("nonsense", "ppo.nonsense", "ppo.kl_coef.x", "", ".", "ppo.", ".kl_coef", "ppo..x",
               "__class__", "ppo.__init__", "model_config", "sft.lora.lora", "rl_no")  # fmt: skip
    for key in unknown:
        yield Case("unknown fields", ("config", "show", "plain.yaml", f"--{key}=1"), refused=True)


def _values_of(key: str, value: object, chance: random.Random, each: int) -> Iterator[Case]:
    types = field_types(key) or ()
    numeric = bool({int, float} & {*types}) and str not in types
    wrong = [*NO_NUMBERS] if numeric else [*NO_FLAGS] if bool in types else []
    some = chance.sample(wrong, min(each, len(wrong)))
    for text in some:
        yield Case("values", ("config", "show", "plain.yaml", f"--{key}={text}"), refused=True,
                   says=(key.rpartition(".")[2],))  # fmt: skip
    if not wrong:
        for text in chance.sample(HOSTILE, min(each, len(HOSTILE))):
            yield Case("values of texts", ("config", "show", "plain.yaml", f"--{key}={text}"))


def data_cases() -> Iterator[Case]:
    """Yield each hostile file as pairs, and as what other commands read."""
    names = (*DATA, "bomb.jsonl.gz", "bomb-line.jsonl.gz", "bomb.csv.gz", "folder", "empty",
             "pipe.jsonl", "zero.jsonl", "nothing.jsonl")  # fmt: skip
    for n, name in enumerate(names):
        yield Case("data", ("data", "inspect", name), refused=True)
        other = (
            ("data", "inspect", name, "--as", "sft"),
            ("data", "inspect", name, "--as", "prompts"),
            ("forget", "--file", name, "--store", "stores/sound"),
        )[n % 3]
        yield Case("data", other, refused=None if n % 3 == 1 else True)


def store_cases(chance: random.Random, each: int) -> Iterator[Case]:
    """Yield what reads a store, on every damaged one."""
    readers = (
        ("artifacts", "ls"), ("artifacts", "show", "<policy>"), ("artifacts", "show", "kept"),
        ("artifacts", "lineage", "<policy>"), ("artifacts", "lineage", "--rows", "<policy>"),
        ("artifacts", "verify"), ("artifacts", "verify", "--deep", "<policy>"),
        ("artifacts", "pull", "<policy>", "pulled"), ("artifacts", "rm", "<policy>"),
        ("artifacts", "gc"), ("artifacts", "gc", "--delete", "--keep-runs", "1"),
        ("artifacts", "pin", "<policy>", "other"), ("artifacts", "unpin", "kept"), ("champion",),
        ("champion", "--history"), ("promote", "<policy>", "--unapproved", "--why", "x"),
        ("rollback", "--why", "x"), ("approve", "<policy>"), ("forget", "--ids", "0" * 32),
        ("judge", "<policy>", "--prompts", "prompts.txt"),
        ("compare", "champion:default", "<policy>", "--prompts", "prompts.txt"),
    )  # fmt: skip
    for name in DAMAGES:
        for words in chance.sample(readers, each):
            yield Case("damaged stores", (*words, "--store", f"stores/{name}"),
                       refused=must_be_refused(name, words))  # fmt: skip


def must_be_refused(damage: str, words: tuple[str, ...]) -> bool | None:
    """Return whether a command needs what is damaged."""
    part = damage.partition("-")[0]
    about = " ".join(words)
    if part == "manifest" and "<policy>" in words and words[1] in ("show", "lineage", "pull"):
        return True
    if part == "blob" and ("--deep" in about or words[1:2] == ("pull",)):
        return damage != "blob-endless" or None
    if part == "champion" and words[0] in ("champion", "rollback"):
        return True
    return None
