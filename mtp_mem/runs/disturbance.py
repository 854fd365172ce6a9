"""Was the machine at work on something else while steps were timed?"""

import os
import time

import psutil

BUSY = 0.1
"""Share of the machine's CPU time that others may take."""
WIDE = 0.5
"""Largest width of the 20 to 80 % band of a case's step times, over their median."""
SHORTEST_S = 0.2
"""The system counts CPU time in hundredths of a second: over less than this it says little."""


class CpuWatch:
    """Measures CPU time of the machine and of this process from when it is made."""

    def __init__(self) -> None:
        self._begun = self._now()

    def others(self) -> float | None:
        """Share, 0 to 1, of the machine's CPU time since then that others took; None: less than SHORTEST_S ago."""
        wall, busy, own = (end - begin for end, begin in zip(self._now(), self._begun, strict=True))
        if wall < SHORTEST_S:
            return None
        return min(max((busy - own) / (wall * (psutil.cpu_count() or 1)), 0.0), 1.0)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: wall clock; CPU time of all processes and, in a virtual machine, of other guests; our CPU time."""
        system, own = psutil.cpu_times(), os.times()
        # Only Linux has all of these. Time for guests of this machine is in `user` already.
        rest = sum(getattr(system, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
        return time.monotonic(), system.user + system.system + rest, sum(own[:4])


def disturbed(others: float | None, step_ms: float, p20: float, p80: float) -> bool:
    """Whether times are not to be relied on: others were at work, or a case's own steps differ widely."""
    return (others or 0.0) > BUSY or p80 - p20 > WIDE * step_ms
