"""The parent process at the start of this one: a launcher that is killed later leaves another parent, such as init."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit")  # parents of orphans; no launchers


@dataclass(frozen=True)
class Parent:
    """A process id, and its name in /proc ("" on a system without that)."""

    pid: int
    name: str

    @property
    def is_gone(self) -> bool:
        """Whether the launcher that started this process has ended, now or before it was recorded."""
        return os.getppid() != self.pid or self.name in ADOPTERS


_recorded: Parent | None = None


def record() -> None:
    """Record the parent of this process; for entry points only, before they import anything slow."""
    global _recorded
    _recorded = _current()


def started_by() -> Parent:
    """Return the recorded parent, or the current one if none was recorded."""
    return _recorded or _current()


def _current() -> Parent:
    pid, name = os.getppid(), ""
    with suppress(OSError):  # not every system has /proc
        name = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return Parent(pid, name)
