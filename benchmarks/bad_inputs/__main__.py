"""Campaign of bad inputs: `python -m benchmarks.bad_inputs --seed 1`.

Hundreds of bad inputs to every command of `rlhf` (as the command lists them itself), in many states
of files, stores and the environment, and to a real Prefect server with workers (`--only api`). Each
must end in time with a right exit code or state and a line that says what is wrong: no traceback,
no stuck run, no server error, nothing half-written. Prints what does not, and a table by kind.
`--show 40` prints that many of the right ones too, to be read by eye.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.bad_inputs import commands, environment
from benchmarks.bad_inputs.cases import Case, Outcome, problems
from benchmarks.bad_inputs.running import Place

PARTS = ("arguments", "presets", "values", "data", "stores", "environment", "api")


def main() -> None:
    """Run the campaign, or parts of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=4, help="values per argument")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--runs", type=int, default=1000, help="most requests that are no 4xx")
    parser.add_argument("--kinds", nargs="*", default=(), help="of requests to the API; else all")
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all outcomes, a line of JSON each")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    done: list[tuple[Case, Outcome, list[str]]] = []
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
        for case, outcome in _outcomes(Path(folder), chance, options):
            found = problems(case, outcome)
            done.append((case, outcome, found))
            if options.json:
                row = {"case": case.shown, "kind": case.kind, **vars(outcome), "problems": found}
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if found:
                last = (outcome.errors.strip().splitlines() or [""])[-1][:300]
                print(f"WRONG {case.shown}\n      {'; '.join(found)}\n      {last}", flush=True)
    for case, outcome, _ in chance.sample(done, min(options.show, len(done))):
        print(f"{outcome.code}  {case.shown}\n      {outcome.errors.strip()[:600]}")
    totals, wrong = Counter(c.kind for c, *_ in done), Counter(c.kind for c, _, f in done if f)
    print("| kind | bad inputs | wrong ends |\n|---|---|---|")
    for kind, count in totals.items():
        print(f"| {kind} | {count} | {wrong[kind]} |")
    print(f"| all | {len(done)} | {sum(wrong.values())} |")


def _outcomes(
    folder: Path, chance: random.Random, options: argparse.Namespace
) -> Iterator[tuple[Case, Outcome]]:
    place = Place(folder)
    made: dict[str, Iterable[Case]] = {
        "arguments": commands.argument_cases(chance, options.each),
        "presets": commands.preset_cases(),
        "values": commands.value_cases(chance, 2),
        "data": commands.data_cases(),
        "stores": commands.store_cases(chance, 4),
    }
    for part, cases in made.items():
        listed = [*cases]  # the same whichever parts are run
        if part in options.only:
            yield from place.in_one_process(listed)
    if "environment" in options.only:
        with environment.bad_servers() as servers:
            for case in environment.cases(servers):
                yield case, place.in_own_process(case)
    if "api" in options.only:
        from benchmarks.bad_inputs.api import outcomes

        yield from outcomes(folder / "site", chance, options.runs, options.kinds)


if __name__ == "__main__":
    main()
