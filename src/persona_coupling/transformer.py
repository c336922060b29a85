"""The forward pass that Llama, Qwen2 and Mistral share, read off a model's own weights and free of a library's overhead.

A small model's step is bound by kernel launches and by passes over memory, not by arithmetic. So the projections that
read the same input are one matrix product (queries, keys and values; gate and up), the residual stream is added by the
product's own epilogue, a norm is one kernel, and the heads that share a key are read as so many queries of it, so that
keys are never repeated. Sums are as in transformers up to rounding; the order of summation and, in bf16, the number of
roundings differ (fewer here).

`supports` says which models are such: exactly the plain modules and settings (a norm on queries, a window, a capped or
scaled score would be passed over in silence), and nobody's hook on any of them, since a hook on a module that is never
called would be too. Everything else takes transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
ROTATIONS = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the text's length
LAYER = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}  # all that a layer consists of
CAPTURING = "transformers.utils.output_capturing"  # its hooks only read, and stay on a model once it showed its states


def supports(model: PreTrainedModel) -> bool:
    """Whether `Transformer` computes what this model computes."""
    import torch

    if departure(model):
        return False
    plain = not model.training and len({(p.device, p.dtype) for p in model.parameters()}) == 1
    registry = torch.nn.modules.module
    if not plain or registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return False
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks) or "forward" in vars(module):
            return False
        if name.endswith("_proj") and type(module) is not torch.nn.Linear:  # an adapter or a quantised weight
            return False
    return True


def departure(model: PreTrainedModel) -> str:
    """In what a model's architecture is another than the one computed here, whoever hooks into it; empty: in nothing."""
    from persona_coupling import architecture

    kind, config = type(model), model.config
    windows = set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
    layers = list(getattr(model.base_model, "layers", []))
    inside = {n for layer in layers for place in LAYER for n, _ in layer.get_submodule(place).named_children()}
    rope = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", None)
    more = sorted(inside - {name for names in LAYER.values() for name in names} - {"rotary_fn"})
    checks = (
        (bool(more), f"{', '.join(more)} in its layers"),
        (windows or getattr(config, "sliding_window", None) is not None, "a sliding window"),
        (not architecture.reads_plainly(model), "logits that are scaled or capped"),
        (getattr(config, "attn_logit_softcapping", None) is not None, "capped attention scores"),
        (getattr(config, "hidden_act", None) != "silu", f"the activation {getattr(config, 'hidden_act', None)}"),
        (kind.__name__ not in ARCHITECTURES, f"the class {kind.__name__}"),
        (not kind.__module__.startswith("transformers.models."), "code of its own"),
        (rope not in ROTATIONS, "rotations that depend on length"),
        (not all(_is_plain(layer) for layer in layers), "other norms or another scale of scores"),
    )
    return next((why for departs, why in checks if departs), "")


def _is_plain(layer: torch.nn.Module) -> bool:
    norms = getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None)
    return (
        all({n for n, _ in layer.get_submodule(place).named_children()} >= LAYER[place] - {"act_fn"} for place in LAYER)
        and all(type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") for norm in norms)
        and abs(getattr(layer.self_attn, "scaling", 0.0) * getattr(layer.self_attn, "head_dim", 0) ** 0.5 - 1) < 1e-6
    )


@dataclass
class Layer:
    """Weights of one layer; products of one input are stacked along the output."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class Transformer:
    """A model's weights (its own tensors where nothing is stacked) and the two passes that use them.

    Raises ValueError for a model that `supports` refuses.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        import torch

        if not supports(model):
            raise ValueError(f"{type(model).__name__} is not a plain Llama, Qwen2 or Mistral without hooks")
        first = model.model.layers[0].self_attn
        config, self.head = model.config, first.head_dim
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.epsilon = float(config.rms_norm_eps)
        with torch.no_grad():
            self.embedding = model.get_input_embeddings().weight.detach()
            self.readout = model.get_output_embeddings().weight.detach()
            self.norm = model.model.norm.weight.detach()
            rotary = model.model.rotary_emb
            self.frequencies, self.stretch = rotary.inv_freq.detach().float(), float(rotary.attention_scaling)
            self.layers = [
                Layer(
                    layer.input_layernorm.weight.detach(),
                    *_stacked(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                    *_stacked(layer.self_attn.o_proj),
                    layer.post_attention_layernorm.weight.detach(),
                    *_stacked(layer.mlp.gate_proj, layer.mlp.up_proj),
                    *_stacked(layer.mlp.down_proj),
                )
                for layer in model.model.layers
            ]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device

    def tensors(self) -> list[torch.Tensor]:
        """All weights, in one order for all models of a shape; a head tied to the embedding stands once."""
        tied = self.readout.data_ptr() == self.embedding.data_ptr()
        found = [self.embedding, self.norm, self.frequencies] + ([] if tied else [self.readout])
        return found + [part for layer in self.layers for part in vars(layer).values() if part is not None]

    def signature(self) -> tuple:
        """What two models share if one can run in the other's buffers."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in self.tensors())
        return (str(self.device), self.heads, self.groups, self.head, self.epsilon, self.stretch, shapes)

    def detached(self) -> Transformer:
        """The same with weights of its own."""
        twin = object.__new__(Transformer)
        vars(twin).update(vars(self))
        twin.layers = [
            Layer(*[None if part is None else part.clone() for part in vars(layer).values()]) for layer in self.layers
        ]
        twin.embedding, twin.norm = self.embedding.clone(), self.norm.clone()
        twin.frequencies = self.frequencies.clone()
        tied = self.readout.data_ptr() == self.embedding.data_ptr()
        twin.readout = twin.embedding if tied else self.readout.clone()
        return twin

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines, shape (positions, head); see `kernels.rotate`."""
        import torch

        angles = positions[:, None].float() * self.frequencies
        cosine, sine = angles.cos() * self.stretch, angles.sin() * self.stretch
        return torch.cat([cosine, cosine], -1).to(self.dtype), torch.cat([-sine, sine], -1).to(self.dtype)

    def states(
        self, ids: torch.Tensor, keep: Callable[[int, torch.Tensor, torch.Tensor], object] | None = None
    ) -> torch.Tensor:
        """Normalised last hidden states of right-padded sequences, shape (rows, length, width). No mask is needed: a
        token sees only what stands before it, and padding stands behind. `keep` is called with each layer's number,
        keys and values, of shape (rows, length, groups, head)."""
        import torch
        from torch.nn import functional

        from persona_coupling import decode_kernels as kernels

        rows, length = ids.shape
        rotation = self.rotation(torch.arange(length, device=ids.device))
        hidden = functional.embedding(ids.reshape(-1), self.embedding)
        for number, layer in enumerate(self.layers):
            heads = self._project(layer, hidden)
            kernels.rotate(heads, *rotation, self.heads + self.groups)
            queries, keys, values = heads.view(rows, length, -1, self.head).split(
                [self.heads, self.groups, self.groups], 2
            )
            if keep is not None:
                keep(number, keys, values)
            if ids.device.type == "cpu":  # its fused kernel wants a key per head
                keys, values = (x.repeat_interleave(self.heads // self.groups, 2) for x in (keys, values))
            mixed = functional.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                is_causal=True,
                enable_gqa=keys.shape[2] != self.heads,
            )
            hidden = self._finish(layer, hidden, mixed.transpose(1, 2).reshape(rows * length, -1))
        return functional.rms_norm(hidden, self.norm.shape, self.norm, self.epsilon).view(rows, length, -1)

    def step(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        pads: torch.Tensor,
        mask: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Logits behind one more token per row, shape (rows, vocabulary), in the weights' format.

        `tokens`, `slots` (where in the cache the token goes) and `pads` (where the row begins there) have shape (rows,);
        `keys` and `values` are caches of shape (layers, places, groups, length, head) with at least as many places as
        rows; `mask` is as in `kernels.attend`. Writes one key and value per row and group.
        """
        from torch.nn import functional

        from persona_coupling import decode_kernels as kernels

        rotation = self.rotation(slots - pads)
        hidden = functional.embedding(tokens, self.embedding)
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            heads = self._project(layer, hidden)
            kernels.rotate(heads, *rotation, self.heads + self.groups, (key, value, slots, self.groups))
            hidden = self._finish(layer, hidden, kernels.attend(heads[:, : self.heads], key, value, slots, pads, mask))
        hidden = functional.rms_norm(hidden, self.norm.shape, self.norm, self.epsilon)
        return functional.linear(hidden, self.readout)

    def _project(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of each token, not yet rotated, shape (tokens, heads of all three, head)."""
        from torch.nn import functional

        normed = functional.rms_norm(hidden, layer.attention_norm.shape, layer.attention_norm, self.epsilon)
        return functional.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, self.head)

    def _finish(self, layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer behind its attention; `hidden` (tokens, width) is written over."""
        from torch.nn import functional

        from persona_coupling import decode_kernels as kernels

        hidden = hidden.addmm_(mixed, layer.out.T)
        if layer.out_bias is not None:
            hidden += layer.out_bias
        normed = functional.rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, self.epsilon)
        both = functional.linear(normed, layer.gate_up, layer.gate_up_bias)
        hidden = hidden.addmm_(kernels.gated(both), layer.down.T)
        if layer.down_bias is not None:
            hidden += layer.down_bias
        return hidden


def _stacked(*parts: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of products of one input as one product."""
    import torch

    if len(parts) == 1:
        bias = parts[0].bias
        return parts[0].weight.detach(), None if bias is None else bias.detach()
    weight = torch.cat([part.weight for part in parts])
    if all(part.bias is None for part in parts):
        return weight, None
    return weight, torch.cat(
        [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    )
