"""How a command ends on input that it cannot use."""

from __future__ import annotations

import sys
from typing import NoReturn


def stop(error: Exception) -> NoReturn:
    """End the command with one line on stderr. Raises: SystemExit(2), as for a flag that does not exist."""
    reason = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error
