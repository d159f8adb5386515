"""Batches prepared ahead by threads; decoding a photo leaves Python's lock to others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Makes batches before they are asked for.

    Args:
        make: a batch by its number and size.
        workers: threads; 0 makes every batch when it is asked for.
        stride: distance between the numbers that are asked for.
    """

    def __init__(self, make: Callable[[int, int], Made], workers: int, stride: int) -> None:
        self.make, self.workers, self.stride = make, workers, stride
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="crops") if workers else None
        self.coming: dict[tuple[int, int], Future[Made]] = {}

    def get(self, number: int, count: int) -> Made:
        """The batch; an error met by a thread is raised here."""
        if self.threads is None:
            return self.make(number, count)
        wanted = [(number + n * self.stride, count) for n in range(self.workers + 1)]
        self.coming = {key: future for key, future in self.coming.items() if key in wanted}
        for key in wanted:
            if key not in self.coming:
                self.coming[key] = self.threads.submit(self.make, *key)
        return self.coming.pop((number, count)).result()
