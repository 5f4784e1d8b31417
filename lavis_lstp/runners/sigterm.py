"""SIGTERM as a request: schedulers send it some time before SIGKILL, enough to save a checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopRequest:
    """A context manager; `asked` becomes True when the signal comes.

    Only the main thread may set a handler; elsewhere nothing changes.
    """

    EXIT_STATUS = 128 + signal.SIGTERM

    def __init__(self):
        self.asked = False
        self.before: Any = None

    def _ask(self, *unused: Any) -> None:
        self.asked = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
