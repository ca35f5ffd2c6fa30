"""The store of a run that a command names: of this machine's record of it, or of the server's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from flows.artifacts import not_empty, open_existing
from flows.runs import find_run, read_run, records_folder
from rlhf.config import PipelineConfig, load_config
from rlhf.config.store_uri import parse_store_uri
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import is_dir
from rlhf.plain_text import one_line
from rlhf.store.manifest import is_digest_prefix
from tasks.evaluations import CHAMPION
from tasks.prefect_server import check_settings, prefect_server
from tasks.run_record import RunRecord, find_record, read_records

if TYPE_CHECKING:
    from rlhf.store import Store

#: How a run's summary on Prefect's server says where its report is.
_PULL = re.compile(r"rlhf artifacts pull ([0-9a-f]{12}) report --store (\S+)( --config)?")


def open_for_run(
    text: str, store: str | None, config: Path | None, work_dir: Path | None = None
) -> tuple[Store, str]:
    """Open the store that has a run, and return what it is called there: its name or a digest.

    That is the store that is given, or else that of this machine's record of the run, or that of
    its summary on Prefect's server, if one is set; or else the default.

    Raises:
        ArtifactMissing: Nothing was ever stored there.
        ConfigError: Several runs are called that.
    """
    is_artifact = is_digest_prefix(text) or text.partition(":")[0] in (CHAMPION, "artifact")
    if store is not None or config is not None or is_artifact or is_dir(Path(text)):
        return open_existing(store, config), text
    record = find_record(read_records(records_folder(work_dir)), text)
    if record is not None:
        return open_recorded(record), record.name
    found = _on_server(text)
    if found is not None:
        return open_existing(found[1], None), found[0]
    return open_existing(None, None), text


def recorded_config(record: RunRecord) -> PipelineConfig:
    """Return a configuration that has the store of a run of this machine, and its options.

    Raises:
        ConfigError: Another version wrote the record, without options that S3 may need.
    """
    options = record.store_options
    if options is None and record.store.startswith("s3://"):
        raise ConfigError(
            one_line(
                f"{record.name}: its record, of another version, does not tell the store_options "
                f"of {record.store}; give the run's configuration with --config"
            )
        )
    loaded = load_config(None, [f"--store={record.store}"] if record.store else []).config
    return loaded if options is None else loaded.model_copy(update={"store_options": options})


def read_pull(run: str, summary: str) -> tuple[str, str] | None:
    """Return digest and store of the report that a run's summary on the server tells of.

    Raises:
        ConfigError: The store has options, of which the summary tells nothing.
    """
    match = _PULL.search(summary)
    if match is None:
        return None
    if match[3]:
        raise ConfigError(
            one_line(
                f"{run}: its store {match[2]} has store_options, which the server does not tell; "
                f"give the digest of its report, {match[1]}, and --config <the configuration>"
            )
        )
    return match[1], match[2]


def open_recorded(record: RunRecord) -> Store:
    """Open the store of a run of this machine, with the options that its record has."""
    from tasks.stage import store_of

    return not_empty(store_of(recorded_config(record)))


def _on_server(text: str) -> tuple[str, str] | None:
    """Return digest and store of a run's report as Prefect's server has them; None without."""
    check_settings()
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return None
    with prefect_server(text) as client:
        try:
            run = find_run(client, text)
        except ArtifactMissing:
            return None  # it may have been a run of another machine, with its report in the store
        artifacts = read_run(client, run)[2]
    newest = next((a for a in artifacts if a.key == "report"), None)
    found = read_pull(text, str(newest.data)) if newest is not None else None
    if found is None:
        return None
    try:
        place = parse_store_uri(found[1])
    except ValueError:
        return None
    # A folder of the machine that ran it need not be one of this.
    is_here = place.folder is None or is_dir(Path(place.folder))
    return found if is_here else None
