"""Writing files so that none is ever torn."""

import os
from pathlib import Path


def write_aside(path: Path, data: bytes) -> None:
    """Write beside `path`, flush, rename. A failure leaves nothing behind."""
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
