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
    if (place := _place()) is None:
        return False
    folder, attempt = place
    notes = (path.name.rpartition("-")[2] for path in folder.glob(f"{_NOTE}-*"))
    return any(note.isdecimal() and int(note) < attempt for note in notes)


def note_mistake() -> None:
    """Let later starts under this torchrun end at once; does nothing without torchrun."""
    if (place := _place()) is not None:
        folder, attempt = place
        with suppress(OSError):
            (folder / f"{_NOTE}-{attempt}").touch()


def _place() -> tuple[Path, int] | None:
    """torchrun's folder for the ranks of this host, over all restarts, and which start this is.

    FOLDER/attempt_0/0/error.json is of one rank. The ranks of one start do not begin at the same time: what one of them
    notes is for later starts only.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if "TORCHELASTIC_RUN_ID" not in os.environ or not file.is_absolute() or len(file.parts) < 5:
        return None
    word, _, number = file.parents[1].name.partition("_")
    return (file.parents[2], int(number)) if word == "attempt" and number.isdecimal() and len(number) < 10 else None
