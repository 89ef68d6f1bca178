"""How a run of several processes ends on what it cannot use: with one line, not with one of each process."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from geochat.errors import stop

_PATIENCE = timedelta(seconds=10)


def stop_together(error: Exception) -> NoReturn:
    """`stop`, where the first of torchrun's processes that has this error says it. Raises: SystemExit(2)."""
    store = None
    with suppress(RuntimeError):  # a store that does not answer: then every process speaks for itself
        store = _agents_store()
        if store is not None and store.add(_key("had", error), 1) > 1:
            # torchrun ends all processes with the first that ends: not before the line is out.
            store.wait([_key("said", error)])
            raise SystemExit(2) from error
    try:
        stop(error)
    finally:
        with suppress(RuntimeError):
            if store is not None:
                store.set(_key("said", error), "")


def _agents_store() -> dist.Store | None:
    """What torchrun's processes meet by, there before they have met; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=_PATIENCE)


def _key(state: str, error: Exception) -> str:
    return f"{state} in start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}: {error}"
