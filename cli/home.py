"""Where the command keeps logs and made checkpoints."""

import os
from pathlib import Path


def home() -> Path:
    """$OSSIA_HOME, else ~/.ossia."""
    return Path(os.environ.get("OSSIA_HOME", "~/.ossia")).expanduser()


def cluster_dir(number: int) -> Path:
    """Logs and state of the cluster whose REST port, or whose launcher's process id where that was 0, is `number`."""
    return home() / "clusters" / str(number)
