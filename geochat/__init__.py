"""Grounded vision-language models for remote sensing: data, training, merging, evaluation and chat.

The public names are imported when they are first used, so that `import geochat` needs no torch and costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geochat.chat.engine import Chat as Chat
    from geochat.data.boxes import Box as Box
    from geochat.data.boxes import parse_boxes as parse_boxes
    from geochat.model.checkpoint import load as load

__version__ = "0.1.0"

_HOME = {
    "Box": "geochat.data.boxes",
    "Chat": "geochat.chat.engine",
    "load": "geochat.model.checkpoint",
    "parse_boxes": "geochat.data.boxes",
}

__all__ = ["Box", "Chat", "__version__", "load", "parse_boxes"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'geochat' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}"
        )
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
