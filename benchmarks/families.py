"""Matrix of families and stages: `python -m benchmarks.families [FAMILY ...] --results FILE`.

Each tiny model of `tests/library/families.py` goes through loading, the rehearsal that precedes a
run's training, log-probabilities and their gradients, values, decoding, LoRA, SFT, reward model and
PPO, in a process of its own with limits of CPU time and memory. Batched results are compared with
plain transformers calls on single rows; what the stages publish is loaded by transformers alone.
What the rehearsal refuses is measured all the same, to see whether it is right.

`--results` keeps each family's results as soon as they are there, a line of JSON each; families
that it holds are not run again, so the matrix can be run in parts. `--write` puts the table of all
of them into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.family_checks import (
    CHECKS,
    REHEARSAL,
    REHEARSAL_LORA,
    Case,
    NotRehearsed,
    Wrong,
)
from rlhf.errors import RLHFError
from rlhf.modeling.base import from_scratch
from tests.library import toys
from tests.library.families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

#: Limits of one family's process: of CPU time, which other processes do not change; of time, for
#: one that sleeps; of memory.
CPU_SECONDS, SECONDS, BYTES = 240, 20 * 60, 12 * 2**30

Row = Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the matrix, print the table, and write it on request."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("families", nargs="*", default=[*FAMILIES])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="file of results; those in it are not run")
    parser.add_argument("--again", action="store_true", help="run families that have results too")
    parser.add_argument("--at-most", type=int, help="run no more families; 0 only makes the table")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.families if name not in FAMILIES]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; choose from {', '.join(FAMILIES)}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        file = args.results or root / "results.jsonl"
        known = () if args.again else read_results(file)
        _run(missing(args.families, known, args.at_most), root, file, args.jobs)
        text = table(read_results(file))
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")


def read_results(file: Path) -> dict[str, Row]:
    """Return the latest results of each family, in the order of `FAMILIES`."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = {line["family"]: line["results"] for line in map(json.loads, lines)}
    return {family: found[family] for family in FAMILIES if family in found}


def missing(families: Sequence[str], known: Container[str], at_most: int | None) -> list[str]:
    """Return the families that have no results yet, no more than `at_most`."""
    return [name for name in families if name not in known][:at_most]


def _run(families: list[str], root: Path, file: Path, jobs: int) -> None:
    """Run families and append their results to the file."""
    if not families:
        return
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    _, tokenizer = from_scratch(toys.ARCHITECTURE, ["good bad tea cup"] * 4, seed=3)
    tokenizer.save_pretrained(root / "tokenizer")
    toys.write_data(root / "data", pairs=16)
    llama = Case("llama", root / "llama-reward")
    for stage in ("load", "SFT", "reward"):
        CHECKS[stage](llama)
    with ThreadPoolExecutor(jobs) as pool, file.open("a", encoding="utf-8") as out:
        for line in pool.map(_in_process(root), families):
            out.write(json.dumps(line) + "\n")
            out.flush()


def _in_process(root: Path) -> Callable[[str], dict[str, object]]:
    """Return a function that checks one family in a child process."""
    context = multiprocessing.get_context("fork")

    def check(family: str) -> dict[str, object]:
        began = time.monotonic()
        folder = root / family
        folder.mkdir()
        child = context.Process(target=_check, args=(family, root))
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
        path = folder / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        if child.exitcode:
            at = CHECKS.keys() - results.keys()
            stage = next((name for name in CHECKS if name in at), "the end")
            results["process"] = f"**crash**: ended with {child.exitcode} in {stage}"
        shutil.rmtree(folder)
        seconds = round(time.monotonic() - began)
        sys.stderr.write(f"{family}: {json.dumps(results)} {seconds} s\n")
        return {"family": family, "seconds": seconds, "results": results}

    return check


def _check(family: str, root: Path) -> None:
    """Run all checks of a family; each result is written at once."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    case = Case(family, root / family)
    log = (case.root / "output").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    for name, check in CHECKS.items():
        try:
            note = check(case)
            case.results[name] = f"exact ({note})" if note else "exact"
        except RLHFError as error:
            case.results[name] = f"refused: {str(error).replace(str(case.root), family)}"
        except Wrong as error:
            case.results[name] = f"**wrong**: {error}"
        except NotRehearsed as error:
            case.results[name] = f"none: {error}"
        except Exception as error:  # whatever a model's code raises
            at = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).partition("\n")[0][:160]
            place = f"{Path(at.filename).name}:{at.lineno}"
            case.results[name] = f"**crash**: {type(error).__name__}: {text} ({place})"
        (case.root / "results.json").write_text(json.dumps(case.results))
        if name == "load" and not case.results[name].startswith("exact"):
            break
    os._exit(0)  # the parent's threads and handlers are not this process's


def table(rows: Mapping[str, Row]) -> str:
    """Format the families by what a user meets: exact, refused before training, or a fault."""
    exact = [f for f, row in rows.items() if not _failed(row)]
    refused = {f: r for f, r in rows.items() if _failed(r) and not faults(r)}
    wrong = {f: faults(r) for f, r in rows.items() if faults(r)}
    counts = f"{len(exact)} are exact in every stage, {len(refused)} refused before training"
    lines = [
        f"Of {len(FAMILIES)} configurations {len(rows)} were run: {counts} in whole or in part, "
        f"{len(wrong)} at fault."
    ]
    ways: dict[str, list[str]] = {}
    for family in exact:
        way = rows[family]["decode"].partition(" (")[2].rstrip(")")
        ways.setdefault(way, []).append(family)
    for way, families in ways.items():
        lines += ["", f"Decoded {way}: " + ", ".join(f"`{f}`" for f in families) + "."]
    if refused:
        lines += ["", "Refused, and what the stages would do:", ""]
        lines += ["| configuration | refused | without the refusal |", "| --- | --- | --- |"]
    for family, row in refused.items():
        doors = "; ".join(v for v in map(row.get, DOORS) if v and v.startswith("refused"))
        rest = {k: v for k, v in _failed(row).items() if k not in DOORS}
        past = "; ".join(f"{k}: {v}" for k, v in rest.items())
        lines.append(f"| `{family}` | {_cell(doors)} | {_cell(past) or 'not measured'} |")
    if wrong:
        lines += ["", "| configuration | fault |", "| --- | --- |"]
    for family, found in wrong.items():
        lines.append(f"| `{family}` | {_cell('; '.join(found))} |")
    return "\n".join(lines)


#: Where a family can be refused before training.
DOORS = ("load", REHEARSAL, REHEARSAL_LORA)


def faults(row: Row) -> list[str]:
    """Return what a user would meet after training began, and refusals without a cause."""
    found = [f"process: {row['process']}"] if "process" in row else []
    if not row.get("load", "").startswith("exact"):
        is_refused = row.get("load", "").startswith("refused: base.path")
        return found if is_refused else [*found, f"load: {row.get('load')}"]
    adapters = {"LoRA", "PPO with LoRA"}
    stages = CHECKS.keys() - {*DOORS, *adapters}
    for door, names in ((REHEARSAL, stages), (REHEARSAL_LORA, adapters)):
        failed = {k: row[k] for k in CHECKS if k in names & _failed(row).keys()}
        opens = not row.get(door, "").startswith("refused")
        if opens:
            found += [f"{name}: {value}" for name, value in failed.items()]
            if not row.get(door, "").startswith("exact"):
                found.append(f"{door}: {row.get(door)}")
        elif not failed and not (door == REHEARSAL_LORA and REHEARSAL in _failed(row)):
            found.append(f"{door}: exact, but {row[door]}")
    return found


def _failed(row: Row) -> dict[str, str]:
    return {name: value for name, value in row.items() if not value.startswith("exact")}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


if __name__ == "__main__":
    main()
