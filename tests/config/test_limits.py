"""Hostile text takes no more memory and time than the limits allow; each case in one line."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config import load_config, load_preset
from rlhf.errors import ConfigError
from rlhf.limits import (
    MAX_DEPTH,
    check_tree,
    load_json,
    matches_whole,
    pattern_errors,
    run_limited,
)

#: Bytes that the child process may use beyond what it needs to import the configuration.
CAP = 400 * 2**20

#: Repeats in repeats: 361 characters that took 17 GB, and some that take the time instead.
REPEATS = "(?:" * 40 + "a" + "{2,3})" * 40
BRANCHES = "(?:" * 30 + "ab" + "|c)+" * 30
LAZY = "(?:" * 60 + "a" + ")+?" * 60
#: Calls of themselves, for which matching took half a gigabyte.
CALLS = ["a(?R)?b|(?R)", "(a(?1)?)+", "(?<x>a|(?&x)b)", "(?<x>a(?P>x)?)", "(a)(?-1)"]
PATTERNS = [REPEATS, BRANCHES, LAZY, "(" * 900, "x" * 10_000]


def laughs(first: str, line: str) -> str:
    """Aliases of aliases, ten for each level."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {line.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, 12)]
    return "\n".join(lines)


DEEP = 5000
TEXTS = {
    "aliases": laughs("lol", "[{}]"),
    "merges": laughs("{x: 1}", "{{<<: [{}]}}"),
    "keys": laughs("[1]", "{{? [{}] : 1}}"),
    "deep": "[" * DEEP + "]" * DEEP,
    "deep by aliases": "\n".join(
        ["a0: &a0 x", *(f"a{n}: &a{n} {'[' * 50}*a{n - 1}{']' * 50}" for n in range(1, 100))]
    ),
    "long": "a: [" + "1," * 10**6 + "1]",
    "many": "a: [" + "1," * 60_000 + "1]",
    "long name": "x" * 200_000 + ": 1",
    "long metric": "gates: {policy: [{metric: " + "x" * 200_000 + ", min: 1}]}",
    "long bound": "gates: {policy: [{metric: sampled.kl, max: " + "x" * 200_000 + "}]}",
    "long value": "ppo: {kl_coef: " + "x" * 200_000 + "}",
    "itself": "ppo: &a {lora: *a}",
    "sexagesimal": "seed: " + "1:" * 5000 + "1.5",
    "sexagesimal whole": "seed: " + "1:" * 80_000 + "1",
    "hexadecimal": "seed: 0x" + "f" * 200_000,
    "no number": "seed: !!int ''",
    "no time": "seed: !!timestamp x",
    "no flag": "seed: !!bool x",
    "binary": "seed: !!binary x",
    "python": "seed: !!python/object/apply:os.system [ls]",
}


def commands(folder: Path) -> list[tuple[str, str | None, list[str]]]:
    """Return (name, preset, overrides) of each hostile configuration."""
    cases: list[tuple[str, str | None, list[str]]] = []
    for name, text in TEXTS.items():
        for use in ("preset", "environment")[: 2 if "a0:" in text else 1]:
            path = folder / f"{name.replace(' ', '-')}-{use}.yaml"
            path.write_text(text if use == "preset" else f"components: {{}}\n{text}\n")
            at = ["--ppo.env-type=multi_objective", f"--ppo.env-config={path}"]
            cases.append((path.name, *((str(path), []) if use == "preset" else (None, at))))
    for number, pattern in enumerate(PATTERNS):
        component = {"components": {"mine": {"type": "regex", "pattern": pattern}}}
        own = ["--ppo.env-type=multi_objective", f"--ppo.env-config={json.dumps(component)}"]
        cases.append((f"pattern {number}", None, own))
        lora = f"--sft.lora.target_modules={pattern}" if number < 4 else None
        cases.append((f"modules {number}", None, [lora or "--sft.lora.target_modules=(" + pattern]))
    words = {"components": {"a": {"type": "keyword", "words": ["ß" * 100_000]}}}
    cases += [
        ("words", None, ["--ppo.env-type=multi_objective", "--ppo.env-config", json.dumps(words)]),
        ("json", None, ["--ppo.env-config={" + '"a":{' * DEEP + "}" * DEEP + "}"]),
        ("argument", None, ["--gates.policy=" + "[" * DEEP]),
        ("argument json", None, ["--gates.policy=" + "[" * 900 + "]" * 900]),
        ("no file", "/dev/zero", []),
    ]
    return cases


def test_hostile_configurations_end_in_a_line_under_a_cap_of_memory(tmp_path):
    """In a process of its own, whose memory and time are limited by the system."""
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    cases = [*commands(tmp_path), ("link", str(tmp_path / "zero.yaml"), [])]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-m", "tests.config.test_limits", str(tmp_path / "cases.json")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in results] == [name for name, *_ in cases]
    for name, text, seconds in results:
        assert text, f"{name}: accepted"
        assert "\n" not in text, name
        assert len(text) < 4100, f"{name}: {text}"
        assert seconds < 20, f"{name}: {seconds} s"


def load_all(cases: Path) -> None:
    """Load each configuration under the cap, and write its error."""
    load_config()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CAP, used + CAP))
    for name, preset, overrides in json.loads(cases.read_text()):
        started, text = time.process_time(), ""
        try:
            load_config(preset, overrides)
        except ConfigError as error:
            text = str(error)
        sys.stdout.write(json.dumps([name, text, time.process_time() - started]) + "\n")


def test_overrides_of_the_api_are_measured():
    deep: object = 1
    for _ in range(MAX_DEPTH + 2):
        deep = [deep]
    with pytest.raises(ConfigError, match=r"overrides: is nested more than"):
        load_preset(None, {"gates": {"policy": deep}})
    with pytest.raises(ConfigError, match=r"overrides: holds more than 50,000 values"):
        load_preset(None, {"data": {"columns": list(range(60_000))}})


def test_ordinary_patterns_are_taken():
    good = (r"\bplease\b", r"(?i)(yes|no)\W*$", r".*\.(q|v)_proj", r"\d{1,3}(,\d{3})*")
    good = (*good, r"\(?R", r"what\(?1\)", r"(?i:a)(?P<x>b)(?P=x)")
    assert pattern_errors(good) == {}
    assert pattern_errors((*good, "(", REPEATS)).keys() == {"(", REPEATS}


def test_patterns_that_call_themselves_are_refused():
    assert pattern_errors(tuple(CALLS)).keys() == {*CALLS}
    assert "(?R) calls a pattern within itself" in pattern_errors((CALLS[0],))[CALLS[0]]
    with pytest.raises(ValueError, match=r"\(\?R\) calls"):
        matches_whole(CALLS[0], ["a" * 100])


def test_matching_a_name_has_a_time_limit():
    assert matches_whole(r".*\.(q|v)_proj", ["a.q_proj", "a.k_proj"]) == ["a.q_proj"]
    with pytest.raises(ValueError, match="takes more than 1 s on one name"):
        matches_whole(r"((?:a|aa)+)+[xyz]", ["a" * 200 + "c"])


def test_json_is_no_deeper_than_the_limit():
    assert load_json(b"[" * 60 + b"]" * 60)
    for text in ("[" * 70 + "]" * 70, "[" * 10**5):
        with pytest.raises(ValueError, match="nested more than 64 levels"):
            load_json(text)
    check_tree([[1] * 1000] * 40)
    with pytest.raises(ValueError, match="more than 50,000 values"):
        check_tree([[1] * 1000] * 60)


if __name__ == "__main__":
    load_all(Path(sys.argv[1]))


def test_a_check_that_can_not_run_is_not_the_text_s_fault():
    with pytest.raises(RuntimeError, match=r"can't run a check .* No module named 'nothing_there'"):
        run_limited("import nothing_there", ["a"], 2**28, 2.0)
    with pytest.raises(RuntimeError, match=r"can't run a check under a memory limit"):
        run_limited("import sys; sys.exit(3)", ["a"], 2**28, 2.0)
