"""Stages for the tests of `cluster`, in a module of their own: the workers of a cluster import them."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from persona_coupling.errors import UserError
from persona_coupling.store import Stage, Work

FULL = "TEST_DISK_IS_FULL"  # a variable of the environment of a node that has no room


@dataclass(frozen=True)
class Step(Stage):
    """Writes a line into a log that all share, so that what is built twice is seen, and takes `seconds`."""

    name: str
    log: str
    parts: tuple[Stage, ...] = ()
    seconds: float = 0.0
    kind: ClassVar[str] = "step"

    def build(self, folder, lab):
        for part in self.parts:
            assert (lab.folder(part) / "made").is_file()
        self.happen()
        time.sleep(self.seconds)
        with Path(self.log).open("a", encoding="utf-8") as handle:
            handle.write(self.name + "\n")
        (folder / "made").write_text(self.name)
        (folder / "when").write_text(str(time.time_ns()))  # so that two makings can be told apart

    def happen(self):
        """What a kind of step does besides."""

    def work(self):
        return Work(seconds=self.seconds)


@dataclass(frozen=True)
class Killed(Step):
    """Kills its own worker with SIGKILL, half-way, the first time."""

    def happen(self):
        mark = Path(self.log + ".killed")
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Large(Step):
    """Meets a full disk on a node that has no room; elsewhere waits until that node has been asked, which on a busy machine
    comes late."""

    def happen(self):
        asked = Path(self.log + ".full")
        if os.environ.get(FULL):
            with asked.open("a", encoding="utf-8") as handle:
                handle.write(self.name + "\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        end = time.monotonic() + 60
        while not asked.is_file() and time.monotonic() < end:
            time.sleep(0.05)


@dataclass(frozen=True)
class Wrong(Step):
    """Cannot be made."""

    def happen(self):
        raise UserError("mend this")


@dataclass(frozen=True)
class Joined(Step):
    """Can be made together with others; member `13` fails."""

    def stack_key(self):
        return "joined"

    @staticmethod
    def build_together(stages, folders, lab):
        for stage, folder in zip(stages, folders, strict=True):
            if stage.name != "13":
                stage.build(folder, lab)
        return [UserError("unlucky") if s.name == "13" else {"how": f"x{len(stages)}"} for s in stages]
