"""Time and memory of a block of code, for the benchmark."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

MIB = 2**20


class Peak:
    """Seconds and peak memory of a block: the allocator's on a GPU, else the process's resident memory, polled."""

    def __init__(self, tell: Callable[[Peak], None] = lambda peak: None) -> None:
        """`tell` is called at both ends."""
        self.seconds = self.busy = self.mib = self.held = 0.0
        self._tell_ends = tell
        self._stop = threading.Event()

    def __enter__(self) -> Peak:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.held = memory_now()
        self._tell_ends(self)
        self._poll = threading.Thread(target=self._watch, daemon=True)
        self._poll.start()
        self._began, self._began_busy = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.mib = torch.cuda.max_memory_allocated() / MIB
        self.seconds, self.busy = time.perf_counter() - self._began, time.process_time() - self._began_busy
        self._stop.set()
        self._poll.join()
        self._tell_ends(self)

    def _watch(self) -> None:
        import torch

        while not torch.cuda.is_available():
            self.mib = max(self.mib, memory_now())
            if self._stop.wait(0.005):
                break


def memory_now() -> float:
    """MiB that the allocator (GPU) or the process (CPU) holds."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    return float(psutil.Process(os.getpid()).memory_info().rss / MIB)
