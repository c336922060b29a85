"""What a model is made of, read off its configuration before any weight is there: does the study's design fit it?

The study merges by layer and by projection, so every layer must have the seven projections, each a matrix of its own.
The model is built on torch's meta device, where it has shapes and names but no memory, and looked at; nothing is decided
by a list of names. What does not fit is refused by its own name, with the reason and what to do instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import memory
from persona_coupling.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = (*ATTENTION, *MLP)
PLACES = {module: parent for parent, group in (("self_attn", ATTENTION), ("mlp", MLP)) for module in group}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
INSTEAD = (
    "Choose a dense decoder with separate projections: Llama, Qwen2, Qwen3, Mistral, Gemma, OLMo2, Granite and so on."
)


@dataclass(frozen=True)
class Architecture:
    """A model that fits, in shapes and names."""

    family: str  # the class of transformers
    layers: int
    width: int
    inner: int  # width between the MLP's projections
    vocabulary: int
    key_width: int  # of all keys of one token in one layer
    parameters: int
    projected: int  # parameters of the projections of all layers
    tied: bool
    biases: tuple[str, ...]  # projections with a bias
    window: int | None  # tokens that a layer sees at most, where some layer sees fewer than all
    departs: str  # why the forward pass written here does not compute it; empty: it does

    @property
    def shape(self) -> memory.Shape:
        """What its need of memory depends on."""
        return memory.Shape(self.layers, self.width, self.inner, self.vocabulary, self.key_width, self.parameters)

    @property
    def modules(self) -> tuple[str, ...]:
        """Where the projections stand, `N` being the layer's number."""
        return tuple(f"model.layers.N.{parent}.{module}" for module, parent in PLACES.items())


def read_config(folder: Path | str, **where: Any) -> PretrainedConfig:
    """The configuration in a folder (or of a hub id, with `revision`). Raises UserError for one that transformers does
    not know or that wants code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **where)
    except (KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} is of an architecture that the installed transformers does not know, or that brings code of its "
            f"own, which is not run here ({first}). {INSTEAD}"
        ) from error


def of(config: PretrainedConfig) -> Architecture:
    """Look at the model that a configuration describes. Raises UserError, naming it, when the study does not fit it."""
    name = (getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")])[0]
    _check_kind(config, name)
    from persona_coupling import transformer

    try:
        model = on_meta(config)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"No {name} can be made from its config.json ({error}). {INSTEAD}") from error
    name = type(model).__name__
    check(model)
    first = model.base_model.layers[0]
    text = config.get_text_config()
    linears = {module: getattr(getattr(first, parent), module) for module, parent in PLACES.items()}
    seen = {id(p): p.numel() for p in model.parameters()}  # a tied head is its embedding
    windows = {getattr(text, "sliding_window", None)} - {None}
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if windows else "full_attention"])
    return Architecture(
        family=name,
        layers=len(model.base_model.layers),
        width=text.hidden_size,
        inner=linears["gate_proj"].out_features,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        key_width=linears["k_proj"].out_features,
        parameters=sum(seen.values()),
        projected=sum(p.numel() for n, p in model.named_parameters() if n.split(".")[-2] in MODULES),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        biases=tuple(m for m, linear in linears.items() if linear.bias is not None),
        window=windows.pop() if windows and kinds != {"full_attention"} else None,
        departs=transformer.departure(model),
    )


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def attention(config: PretrainedConfig, asked: str) -> str:
    """The attention asked for, or the eager one where a family's is more than the fused kernels compute (Gemma 2 caps
    its scores)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    fused = asked != "sdpa" or getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    return asked if fused else "eager"


def _check_kind(config: PretrainedConfig, name: str) -> None:
    """What the configuration alone tells."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; the study needs a decoder that continues a chat. {INSTEAD}")
    if text is not config:
        raise UserError(
            f"{name} reads more than text, and its layers lie inside a larger model. Give its text-only version "
            f"(such as Gemma3ForCausalLM for Gemma 3), or: {INSTEAD}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is no causal language model. {INSTEAD}")
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"This {name} is quantised: weight changes are added in fp32, and rounding them would be taken for an "
            "effect. Give the unquantised model."
        )
    experts = [n for n in EXPERTS if (getattr(text, n, None) or 0) > 1]
    if experts:
        raise UserError(
            f"{name} is a mixture of {getattr(text, experts[0])} experts: a layer has no one gate/up/down projection to "
            f"merge or to leave out. {INSTEAD}"
        )


def check(model: PreTrainedModel) -> None:
    """Raise UserError unless every layer has each of the seven projections once, as a plain matrix, where the study
    looks for it, and a head reads the last layer's output."""
    import torch

    name, base = type(model).__name__, model.base_model
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    ends = {n.rsplit(".", 1)[-1] for n in found}
    missing = [module for module in MODULES if module not in ends]
    if any("expert" in n for n, _ in model.named_modules()):
        raise UserError(f"{name} is a mixture of experts: a layer has no one gate/up/down projection. {INSTEAD}")
    if missing:
        inside = {n.rsplit(".", 1)[-1] for n in found if re.search(r"\.\d+\.", n)}
        others = ", ".join(sorted(inside - set(MODULES))) or "nothing"
        raise UserError(
            f"{name} has no separate {', '.join(missing)} (it has {others} instead), and only separate projections can "
            f"be trained, merged and compared one by one. {INSTEAD}"
        )
    layers = getattr(base, "layers", None)
    wanted = {f"{number}.{parent}.{module}" for number in range(len(layers or [])) for module, parent in PLACES.items()}
    have = {m.group(1) for n in found if (m := re.search(r"\.layers\.(\d+\..*)$", n)) and n.endswith(MODULES)}
    if layers is None or have != wanted:
        odd = sorted(have ^ wanted)[:3]
        raise UserError(
            f"{name}'s layers are not all alike: {', '.join(odd) or 'no list of layers'} is missing or in excess of "
            f"self_attn and mlp with one projection each. {INSTEAD}"
        )
    if len(layers) < 3:
        raise UserError(f"{name} has {len(layers)} layers; early, middle and late thirds need three.")
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear) or not hasattr(base, "embed_tokens"):
        raise UserError(f"{name} has no language-model head over token embeddings. {INSTEAD}")


# ------------------------------------------------------------------------------------------------ reading out


def logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of normalised last hidden states (..., width), as the model's own forward computes them: some families
    scale the head's output (Granite, Cohere) or cap it softly (Gemma 2). `check_logits` holds this to the model."""
    config, found = model.config.get_text_config(), model.get_output_embeddings()(hidden)
    scale = _scale(config)
    if scale != 1.0:
        found = found * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return found if cap is None else (found / cap).tanh() * cap


def reads_plainly(model: PreTrainedModel) -> bool:
    """Whether logits are the head's output as it is."""
    config = model.config.get_text_config()
    return _scale(config) == 1.0 and getattr(config, "final_logit_softcapping", None) is None


def _scale(config: PretrainedConfig) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(next((s for n in ("logit_scale", "lm_head_multiplier") if (s := getattr(config, n, None))), 1.0))


def check_logits(model: PreTrainedModel) -> None:
    """Raise UserError unless `logits` of a few hidden states are the logits of the model's own forward."""
    import torch

    ids = torch.arange(5, device=model.device)[None] * 3 % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits.float()
        ours = logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    spread = float((own - own.mean(-1, keepdim=True)).abs().max())
    if not torch.allclose(own, ours, atol=1e-3 * spread + 1e-6, rtol=0):
        raise UserError(
            f"{type(model).__name__} does something to its logits that is not known here: losses and log-probabilities "
            f"would be another model's. {INSTEAD}"
        )
