"""The process's resident memory while a step runs, as the operating system counts it.

Shown beside the tracked bytes and never instead of them: the heap keeps what it once held, so resident memory hides
growth and depends on what ran before.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class RssPeak:
    """The largest resident size seen."""

    nbytes: int = 0


@contextmanager
def sampled_rss(interval_s: float = 0.005) -> Iterator[RssPeak]:
    """Sample this process's resident bytes in the background; the peak is complete after the block."""
    process, peak, done = psutil.Process(), RssPeak(), threading.Event()

    def sample() -> None:
        while True:
            peak.nbytes = max(peak.nbytes, process.memory_info().rss)
            if done.wait(interval_s):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
