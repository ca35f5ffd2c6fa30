"""HTML pages that a command writes into a file that the user names."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.files import is_file

#: What every page of this project holds.
_OURS = b"Written by rlhf-pipeline."


def write_page(option: str, file: Path, page: str) -> None:
    """Write a page whole or not at all; an earlier page is replaced, another file is not.

    Raises:
        ConfigError: A file of something else is there, or it can't be written.
    """
    try:
        if is_file(file) and _OURS not in file.read_bytes():
            raise ConfigError(
                f"{option} {str(file)!r}: is there already, and no page of this command; name a "
                "new file"
            )
        scratch = file.with_name(f".{os.getpid()}.page.tmp")
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{option} {str(file)!r}: can't be written ({error.strerror or error}); name another"
        ) from None
