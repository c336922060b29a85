"""What was derived about a model before anything runs: printed, kept with the results, and read by the paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import adapters, architecture, chat, models
from persona_coupling.architecture import Architecture
from persona_coupling.chat import Chat

if TYPE_CHECKING:
    from persona_coupling.store import Stage, Store


@dataclass(frozen=True)
class Card:
    """A model's architecture, and how a conversation is written for it."""

    architecture: Architecture
    chat: Chat
    stop_id: int
    pad: str
    pad_id: int
    pieces: tuple[str, ...]  # what each of the marker's tokens reads as

    def thirds(self) -> dict[str, tuple[int, int]]:
        """First and last layer of each third."""
        numbers = {name: adapters.layer_numbers([name], self.architecture.layers) for name in adapters.THIRDS}
        return {name: (min(found), max(found)) for name, found in numbers.items()}

    def text(self) -> str:
        """For people: two dozen facts in a dozen lines."""
        made, said = self.architecture, self.chat
        thirds = ", ".join(f"{name} {first} to {last}" for name, (first, last) in self.thirds().items())
        marker = " ".join(f"{token}:{piece!r}" for token, piece in zip(said.marker, self.pieces, strict=True))
        joined = "" if said.joined == said.marker else f"; read with its answer it would end {list(said.joined)}"
        forward = f"the library's, for {made.departs}" if made.departs else "our own for sampling and scoring"
        biases = f"; biases on {', '.join(made.biases)}" if made.biases else ""
        rows = {
            "family": f"{made.family}, {count(made.parameters)} parameters, {'tied' if made.tied else 'untied'} head",
            "layers": f"{made.layers}: {thirds}",
            "modules": f"model.layers.N.self_attn.{{{','.join(architecture.ATTENTION)}}}, "
            f"mlp.{{{','.join(architecture.MLP)}}}{biases}",
            "marker": f"{marker}; the first {said.blank} the blank line{joined}",
            "turn ends": f"{said.stop} ({self.stop_id}); padding {self.pad} ({self.pad_id})",
            "persona": said.says(),
            "several turns": "trained as one row" if said.turns else "refused: the template rewrites earlier turns",
            "forward pass": forward + (f"; layers see {made.window} tokens at most" if made.window else ""),
        }
        return "\n".join(f"  {name:<13} {what}" for name, what in rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the record."""
        plain: dict[str, Any] = asdict(self)
        plain["architecture"]["modules"] = list(self.architecture.modules)
        return {**plain, "thirds": {name: list(ends) for name, ends in self.thirds().items()}}


def count(parameters: int) -> str:
    """A number of parameters in words."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {word}"
    return f"{parameters:,}"


def read(folder: Path) -> Card:
    """The card of a folder with a configuration and a tokenizer; weights are not needed. Raises UserError for a model
    that does not fit, with the reason."""
    with models.quiet_transformers():
        made = architecture.of(architecture.read_config(folder))
    tokenizer = models.tokenizer_in(folder)
    said = chat.derive(tokenizer)
    return Card(
        made,
        said,
        stop_id=int(tokenizer.eos_token_id),
        pad=str(tokenizer.pad_token),
        pad_id=int(tokenizer.pad_token_id),
        pieces=tuple(str(tokenizer.decode([token])) for token in said.marker),
    )


def folder_of(source: Stage, store: Store) -> Path | None:
    """Where a source's configuration and tokenizer lie if they are there already; None for one that must be made or
    fetched first."""
    if isinstance(source, models.LocalModel):
        return Path(source.path)
    if isinstance(source, models.HubModel):
        from persona_coupling import hub

        return hub.described(source)
    return store.folder(source) if store.has(source) else None
