"""How much memory this process can have, so that a case that is too large raises instead of ending the process."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with a container's limit in bytes, of cgroup version 2 and version 1."""


def host_bytes() -> int:
    """Bytes that this process cannot exceed: the least of the machine's, the container's, `ulimit -v` and `-d`."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min(psutil.virtual_memory().total, _container(), *(n for n in limits if n != resource.RLIM_INFINITY))


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """A block in which an allocation fails once memory runs out; else the kernel would kill a process, ours perhaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    process = psutil.Process().memory_info()
    room = min(psutil.virtual_memory().available, _container() - process.rss)
    bound = getattr(process, "data", process.vms) + max(room, 0)
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _container() -> int:
    for path in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            return int(Path(path).read_text())
    return 2**63 - 1
