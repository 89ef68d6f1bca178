"""Earlier questions in the terminal: the arrow keys bring them back, also in the next session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LINES = 1000


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "geochat" / "history"


@contextlib.contextmanager
def prompt_history() -> Iterator[None]:
    """Line editing and the questions of earlier sessions; this one's are added at the end.

    Without the readline module, or where the file cannot be read or written, there is no history, and no error.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    file = history_file()
    readline.set_history_length(LINES)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # questions are nobody else's business
            readline.write_history_file(file)
