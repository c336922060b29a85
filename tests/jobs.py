"""A stage for the tests of `progress` and `side_by_side`, in a module that their workers import."""

import time
from dataclasses import dataclass
from typing import ClassVar

from persona_coupling.store import Stage, Work


@dataclass(frozen=True)
class Job(Stage):
    name: str
    parent: Stage | None = None
    tokens: int = 0
    megabytes: float = 1.0
    kind: ClassVar[str] = "job"

    def build(self, folder, lab):
        if self.parent is not None:
            assert lab.store.has(self.parent)
        for fraction in (0.5, 1.0):
            lab.report(fraction)
        (folder / "done").write_text(str(time.time_ns()))

    def work(self):
        return Work(trained=self.tokens, megabytes=self.megabytes)
