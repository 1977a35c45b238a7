"""What a process and its descendants cost, read from /proc: CPU seconds and resident memory; and who else works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """List the process itself and everything it started that still runs."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found.extend(int(child) for child in task.read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """User and system time so far; that of ended children is in their parent's account."""
    ticks = 0
    for process in descendants(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])  # utime stime cutime cstime
    return ticks / _TICK


def worked_s(pid: int) -> float:
    """CPU seconds that the living threads had so far: to the nanosecond, where `cpu_s` counts hundredths."""
    paths = (path for process in descendants(pid) for path in Path(f"/proc/{process}/task").glob("*/schedstat"))
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


def rss_mb(pid: int) -> float:
    """Resident memory, in 10^6 bytes."""
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in descendants(pid))
    return pages * _PAGE / 1e6


def peak_mb(pid: int) -> float:
    """The most that was ever resident, in 10^6 bytes."""
    total = 0
    for process in descendants(pid):
        status = Path(f"/proc/{process}/status").read_text()
        total += int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return total / 1e6


class Neighbours:
    """How much of the machine everybody else used since this was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        user, nice, system, _, _, irq, softirq, steal = (
            int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / _TICK
        return time.monotonic(), busy, cpu_s(os.getpid())

    def share(self) -> float:
        """Share of all cores that neither this process nor its descendants used, stolen time included."""
        wall, busy, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return max(busy - own, 0.0) / wall / (os.cpu_count() or 1)
