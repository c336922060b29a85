"""The stages of the study as frozen descriptions: what is read, what is done, what is written.

rows (authored, file, hub, the model's own, coupling text) -> FineTune -> a change of weights
change -> Snapshot, RandomLike, Part, Rescaled, Truncated -> a change of weights
Checkpoint (source + changes) -> MergeCheck, Content, Evaluate -> tables of raw observations
"""

from persona_coupling.stages.changes import Part, RandomLike, Rescaled, Snapshot, Truncated
from persona_coupling.stages.measurement import Content, Evaluate, MergeCheck
from persona_coupling.stages.rows import Authored, CouplingText, FromFile, OwnAnswers, UltraChat, authored, from_file
from persona_coupling.stages.training import FineTune, Twin, twin

__all__ = [
    "Authored",
    "Content",
    "CouplingText",
    "Evaluate",
    "FineTune",
    "FromFile",
    "MergeCheck",
    "OwnAnswers",
    "Part",
    "RandomLike",
    "Rescaled",
    "Snapshot",
    "Truncated",
    "Twin",
    "UltraChat",
    "authored",
    "from_file",
    "twin",
]
