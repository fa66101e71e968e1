"""What one start of a process tells the next one under the same torchrun: that a mistake of the user's ended it.

torchrun's `--max-restarts` starts a command again whatever its exit code was. A mistake is then repeated, with its
message, as often as that. So who ends with one leaves a note in the folder that torchrun has made for its ranks on
this host, and a later start that finds it ends at once. Imports nothing, so that it ends before anything is loaded.
"""

import os
from contextlib import suppress
from pathlib import Path

MISTAKE = 2  # exit code

_NOTE = "ended-by-a-mistake"


def is_pointless() -> bool:
    """Whether an earlier start under this torchrun was ended by a mistake that a restart does not mend."""
    folder = _folder()
    return folder is not None and (folder / _NOTE).exists()


def note_mistake() -> None:
    """Let later starts under this torchrun end at once; does nothing without torchrun."""
    if (folder := _folder()) is not None:
        with suppress(OSError):
            (folder / _NOTE).touch()


def _folder() -> Path | None:
    """torchrun's folder for the ranks of this host, over all restarts: FOLDER/attempt_0/0/error.json is of one rank."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if "TORCHELASTIC_RUN_ID" not in os.environ or not file.is_absolute() or len(file.parts) < 5:
        return None
    return file.parents[2] if file.parents[1].name.startswith("attempt_") else None
