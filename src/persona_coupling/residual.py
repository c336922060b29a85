"""Hooks on the residual stream: reading it at chosen tokens, and adding to it at one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from persona_coupling.errors import GuardError
from persona_coupling.generate import Prefill

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POSITIONS = ("prompt", "answer")  # the last prompt token; the mean over the tokens of the question's fixed answer
SITES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # modules that read one and the same normed stream


@contextmanager
def recording(model: PreTrainedModel, average: torch.Tensor) -> Iterator[dict[str, list[ndarray]]]:
    """While the body runs one forward: weighted means over tokens, `average` being (rows, positions, tokens), of the
    embeddings (as the first layer reads them) and every layer's output (`stream`) and of what every layer's projections
    read (`site 0`, `site 1`).

    Raises GuardError unless every hook was attached and called exactly once.
    """
    found: dict[str, list[ndarray]] = {"stream": [], **{f"site {number}": [] for number in range(len(SITES))}}

    def keep(name: str, state: torch.Tensor) -> None:
        found[name].append((average @ state.float()).cpu().numpy())

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        keep("stream", output[0] if isinstance(output, tuple) else output)

    def before(name: str) -> Any:
        return lambda _module, inputs: keep(name, inputs[0])

    base, handles = model.base_model, []
    try:
        # not the embedding's own output, which some families scale before the first layer
        handles.append(base.layers[0].register_forward_pre_hook(lambda _module, inputs: keep("stream", inputs[0])))
        for layer in base.layers:
            handles.append(layer.register_forward_hook(after))
            for number, (first, *_) in enumerate(SITES):
                parent = layer.self_attn if hasattr(layer.self_attn, first) else layer.mlp
                handles.append(getattr(parent, first).register_forward_pre_hook(before(f"site {number}")))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    depth = model.config.num_hidden_layers
    counts = [len(found["stream"]) - 1, *(len(found[f"site {number}"]) for number in range(len(SITES)))]
    if len(handles) != 1 + depth * (1 + len(SITES)) or set(counts) != {depth}:
        raise GuardError(f"{len(handles)} hooks on {depth} layers gave {counts} states")


def layer_numbers(fractions: Sequence[float], depth: int) -> tuple[int, ...]:
    """Layers, counted from 1, at fractions of the depth, each once. Raises GuardError outside of (0, 1]."""
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise GuardError(f"fractions of the depth lie above 0 and up to 1, unlike {list(fractions)}")
    return tuple(dict.fromkeys(max(1, round(fraction * depth)) for fraction in fractions))


@contextmanager
def steering(model: PreTrainedModel, layer: int, vectors: ndarray) -> Iterator[Callable[[torch.Tensor], None]]:
    """Add `vectors[0]` to the residual stream after a layer (from 1) at the first token that the model reads in the body,
    `vectors[1]` at every later one; shape (2, width). Of shape (rows, 2, width), each row of the batch gets its own pair.

    Gives `keep(index)`, to be called when only the rows at `index` stay in the batch (`generate.sample` does as `kept`):
    they stay with their pairs. Raises GuardError unless the hook was attached once and called, and for a batch of another
    number of rows than there are pairs.
    """
    import torch

    target = model.base_model.layers[layer - 1]
    pairs = torch.as_tensor(vectors, dtype=torch.float32, device=model.device)
    apart = pairs.ndim == 3
    if not apart:
        pairs = pairs[None]
    calls = 0

    def keep(index: torch.Tensor) -> None:
        nonlocal pairs
        if apart:
            pairs = pairs[index]

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal calls
        hidden = output[0] if isinstance(output, tuple) else output
        if apart and len(pairs) != len(hidden):
            raise GuardError(f"{len(pairs)} pairs of vectors for a batch of {len(hidden)} rows")
        moved = hidden.float() + pairs[:, 1:]
        if calls == 0:
            moved[:, 0] = hidden[:, 0].float() + pairs[:, 0]
        calls += 1
        moved = moved.to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    attached = len(target._forward_hooks)
    handle = target.register_forward_hook(add)
    try:
        if len(target._forward_hooks) != attached + 1:
            raise GuardError(f"{len(target._forward_hooks) - attached} hooks were attached to layer {layer}, not one")
        yield keep
    finally:
        handle.remove()
    if calls == 0:
        raise GuardError(f"the hook on layer {layer} was never called: nothing was added")


def advanced(model: PreTrainedModel, read: Prefill, tokens: list[int]) -> Prefill:
    """The prefill with one more token read in each row; consumes it."""
    import torch

    ids = torch.tensor(tokens, device=model.device)[:, None]
    read.cache.batch_select_indices(read.rows)  # rows with one prompt share its cache until they differ
    mask = torch.cat([read.mask, torch.ones_like(ids)], 1)
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=read.mask.sum(1, keepdim=True),
            past_key_values=read.cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return Prefill(read.cache, mask, out.logits[:, -1].float(), torch.arange(len(tokens), device=model.device))
