"""SIGTERM, the word of a scheduler that wants the machine back: remembered, and acted on later."""

import signal
import threading
from types import FrameType
from typing import Any


class Notice:
    """Takes SIGTERM while it is entered; a second one ends the process as it always did.

    A process can only ask: `requested` travels with its rows of the next batch, and the step tells
    all processes together, so that they stop after the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._taken = False

    def __enter__(self) -> "Notice":
        # Python takes signals in the main thread only; a notebook may train in another.
        if threading.current_thread() is threading.main_thread():
            # After `jax.distributed`, whose own handler speaks to the coordinator only.
            self._before = signal.signal(signal.SIGTERM, self._take)
            self._taken = True
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._taken:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
