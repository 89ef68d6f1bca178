"""Worker processes that do not outlive the one that started them."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor

_SECONDS = 0.5


def process_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool whose processes end when this one is killed; the standard library's would wait for work for ever."""
    return ProcessPoolExecutor(workers, initializer=_follow)


def _follow() -> None:
    """End this process when it has lost its parent. Asking is the one way that no inherited pipe can keep open."""
    parent = os.getppid()  # the process that started the pool, or a fork server, which ends with that one

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
