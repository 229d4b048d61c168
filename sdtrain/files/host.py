"""How much memory this machine can still give."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
"""Where a container says how much it may take."""


def memory_kib(meminfo: Path = MEMINFO) -> dict[str, int] | None:
    """Return what the kernel says of the memory, in KiB by name; None where it says nothing, as only Linux does."""
    try:
        text = meminfo.read_text(encoding="ascii")
    except OSError:
        return None
    return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if len(line.split()) > 1}


def free_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Return how many bytes a process can still have, a container's limit regarded; None where it is not known."""
    found = memory_kib(meminfo)
    if found is None or "MemAvailable" not in found:
        return None
    free = found["MemAvailable"] * 2**10
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
    except OSError:  # no container, or one of the older kind
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
