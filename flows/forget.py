"""The `rlhf forget` command: rows of the data that later runs go without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.artifacts import ConfigOption, StoreOption, open_existing
from rlhf.errors import ConfigError
from rlhf.files import read_text
from tasks.console import say


def forget(
    *,
    ids: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    file: Path | None = None,
    record: bool = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """List the artifacts that rows of the data reached; let later runs go without them.

    Parameters
    ----------
    ids
        Ids of rows, as `rlhf artifacts lineage <artifact> --rows` and quarantine.jsonl list them.
    file
        A text file with one id on each line.
    record
        Record the ids in the store: data are prepared anew without them. Only looks otherwise.
    """
    from rlhf.data.lineage import forget_rows, reach

    wanted = _wanted(ids or [], file)
    opened = open_existing(store, config)
    found = reach(opened, wanted)
    reached = {ref.digest: ref for row_id in wanted for ref, _ in found.rows[row_id]}
    reached |= {ref.digest: ref for row_id in wanted for ref in found.derived[row_id]}
    reached |= {ref.digest: ref for row_id in wanted for ref in found.tested[row_id]}
    for row_id in wanted:
        if not found.rows[row_id]:
            say(f"{row_id}  in no dataset of this store")
        for ref, row in found.rows[row_id]:
            say(f"{row_id}  {row.source}:{row.line}  {row.split}  dataset {ref.digest[:12]}")
        for ref in found.derived[row_id]:
            say(f"{row_id}  reached {ref.kind} {ref.digest[:12]}")
        for ref in found.tested[row_id]:
            say(f"{row_id}  held out for {ref.kind} {ref.digest[:12]}")
    for ref, reason in found.unknown:
        say(f"dataset {ref.digest[:12]} may hold them: {reason}")
    if record:
        new = forget_rows(opened, wanted)
        say(f"recorded: {new} more rows that data are prepared without")
    else:
        say("nothing was recorded; --record does it")
    if reached:
        say(
            f"{len(reached)} artifacts that exist stay as they are, and may hold the rows' text or "
            "what was learned from it; `rlhf artifacts rm <digest>` removes one, then "
            "`rlhf artifacts gc --delete` its files; runtime.work_dir of each machine holds copies"
        )


def _wanted(ids: list[str], file: Path | None) -> list[str]:
    """Return the ids of the options, each once.

    Raises:
        ConfigError: There is none, one is not an id, or the file can't be read.
    """
    words = list(ids)
    if file is not None:
        try:
            words += read_text(file).split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--file {str(file)!r}: can't be read ({error}); name a text file"
            ) from None
    for word in words:
        if not re.fullmatch("[0-9a-f]{32}", word):
            raise ConfigError(
                f"{word!r} is no id of a row, which has 32 hex digits; "
                "`rlhf artifacts lineage <artifact> --rows` lists them"
            )
    if not words:
        raise ConfigError("no rows are named; give --ids or --file")
    return list(dict.fromkeys(words))
