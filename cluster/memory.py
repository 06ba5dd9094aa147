"""How much memory a run takes on the node it is watched from."""

import os
import threading
from contextlib import suppress

PERIOD_S = 1.0


class PeakMemory:
    """Samples, in a thread, the memory of all Ray processes of this node and remembers the largest sum.

    Shared pages are counted once (proportional set size), so actors that share libraries are not overcounted.
    """

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End sampling; returns the peak in bytes."""
        self._done.set()
        self._thread.join(timeout=5 * PERIOD_S)
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(PERIOD_S):
            self._peak = max(self._peak, _node_memory())


def _node_memory() -> int:
    import psutil

    total = 0
    raylet = psutil.Process(os.getpid()).parent()
    if raylet is None:
        return 0
    head = raylet.parent()
    family = [raylet, *raylet.children(recursive=True)]
    if head is not None and head.pid != 1:
        family += [head, *head.children(recursive=True)]
    for process in {one.pid: one for one in family}.values():
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total
