"""What a model needs of memory, from its shape alone: for saying before a run starts what will not fit.

All are estimates for the largest moment of a step. What a training step keeps for its backward pass was counted with
`torch.autograd.graph.saved_tensors_hooks` on small models of the same build, and grows with the widths alone: see
`KEPT`. Allocators round up, so a tenth is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_coupling.machine import SMALL, Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# bytes kept per token and layer, of the model's width and of the MLP's inner width: LoRA in bf16, in fp32, all parameters
KEPT = {"bf16": (57.6, 13.5), "fp32": (72.1, 20.0), "full": (40.1, 16.0)}
ROUNDING = 1.1  # allocated per byte counted
COPIES = 4.0  # of a small model's fp32 weights: two kept sources, the copy, and its merged form
CHECKED = 3.0  # of a large model's bf16 weights while its merge is checked, as measured
STEADY = 1.5e9  # bytes of a CUDA context, its libraries' workspaces, and a fused head's tile


@dataclass(frozen=True)
class Shape:
    """What memory depends on: `inner` is the width between the MLP's projections, `key_width` that of all keys of a token
    in one layer."""

    layers: int
    width: int
    inner: int
    vocabulary: int
    key_width: int
    parameters: int


@dataclass(frozen=True)
class Load:
    """What is asked of the model: rows sampled together, distinct prompts among them, tokens of a prompt and of an
    answer, padded tokens of a training batch that is run at once, the adapter's rank, and whether all parameters are
    trained."""

    rows: int
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    trained_tokens: int
    rank: int
    lora: bool
    full: bool


@dataclass(frozen=True)
class Need:
    """Bytes of the device's memory at the largest moment of something."""

    what: str
    bytes: float
    how: str = ""


def needs(shape: Shape, load: Load, machine: Machine, room: float, *, plain: bool = True) -> list[Need]:
    """Each phase's need on a device with `room` bytes; `plain`: a model that our own sampler decodes."""
    machine = machine.of(shape.parameters)
    each, copies, how = (4.0, COPIES, "fp32") if shape.parameters < SMALL else (2.0, CHECKED, "bf16")
    found = [
        Need(
            "merging a change and checking the merge",
            ROUNDING * shape.parameters * each * copies,
            f"{copies:g} copies of the weights in {how}",
        )
    ]
    if load.rows:
        found.append(
            Need(
                f"sampling {load.rows} answers of {load.answer_tokens} tokens together",
                ROUNDING * _sampling(shape, load, machine, plain=plain),
                "weights, keys and values, logits",
            )
        )
    for wanted, full in ((load.lora, False), (load.full, True)):
        if wanted:
            saved = checkpoints(shape, load.trained_tokens, machine, room, full=full)
            found.append(
                Need(
                    f"training {'all parameters' if full else f'an adapter of rank {load.rank}'} on "
                    f"{load.trained_tokens} tokens at once",
                    ROUNDING * _training(shape, load, machine, full=full, checkpointed=saved),
                    "with gradient checkpointing" if saved else "without gradient checkpointing",
                )
            )
    return [Need(n.what, n.bytes + (STEADY if machine.device != "cpu" else 0.0), n.how) for n in found]


def _sampling(shape: Shape, load: Load, machine: Machine, *, plain: bool) -> float:
    size = 2 if machine.bf16 else 4
    on_cuda = machine.device != "cpu"
    weights = float(size * shape.parameters)
    if plain:  # projections of one input stand stacked beside the model's own, and captured steps own their weights
        weights += size * shape.layers * shape.width * (shape.width + 2 * shape.key_width + 2 * shape.inner)
        weights += size * shape.parameters if on_cuda else 0.0
    token = 2 * shape.layers * shape.key_width * size
    cache = load.rows * (load.prompt_tokens + load.answer_tokens) * token + load.prompts * load.prompt_tokens * token
    logits = (load.rows * (size + 8) + load.prompts * (size + 4)) * shape.vocabulary
    return weights + cache + logits


def _training(shape: Shape, load: Load, machine: Machine, *, full: bool, checkpointed: bool) -> float:
    """Weights, gradients and Adam's two moments (fp32), and what is kept for the backward pass."""
    size = 4 if full or not machine.bf16 else 2
    adapter = load.rank * shape.layers * (7 * shape.width + 2 * shape.key_width + 3 * shape.inner + 2 * shape.width)
    # a full fine-tune also keeps what it started from: only the difference is written
    weights = 20.0 * shape.parameters if full else size * shape.parameters + 16.0 * adapter
    on_cpu = machine.device == "cpu"
    head = (
        load.trained_tokens * shape.vocabulary * 12.0 if on_cpu else 0.0
    )  # supervised logits, their fp32 copy, gradient
    return weights + head + kept(shape, load.trained_tokens, machine, full=full, checkpointed=checkpointed)


def training(shape: Shape, tokens: int, rank: int, machine: Machine, *, checkpointed: bool) -> float:
    """Bytes that a step of an adapter of that rank needs on so many padded tokens at once, the CUDA context included."""
    load = Load(0, 0, 0, 0, trained_tokens=tokens, rank=rank, lora=True, full=False)
    steady = STEADY if machine.device != "cpu" else 0.0
    return ROUNDING * _training(shape, load, machine, full=False, checkpointed=checkpointed) + steady


def sharded(shape: Shape, tokens: int, devices: int, machine: Machine) -> float:
    """Bytes on each of several GPUs that share a full-parameter training, with gradient checkpointing and `tokens` on each:
    its part of weights, gradients and moments in fp32, the head whole for the loss, one layer whole in bf16 and the next
    one on its way. What the change is written against is not counted: it can wait on the host."""
    head = 4.0 * shape.vocabulary * shape.width
    layer = 2.0 * (shape.parameters - 2 * shape.vocabulary * shape.width) / shape.layers
    whole = 16.0 * shape.parameters / devices + head + 2 * layer
    return ROUNDING * (whole + kept(shape, tokens, machine, full=True, checkpointed=True)) + STEADY


def kept(shape: Shape, tokens: int, machine: Machine, *, full: bool, checkpointed: bool) -> float:
    """Bytes that a forward pass over `tokens` keeps for its backward pass; checkpointed: each layer's input, and what
    one layer keeps while it is computed again."""
    wide, inner = KEPT["full" if full else "bf16" if machine.bf16 else "fp32"]
    layer = wide * shape.width + inner * shape.inner
    size = 4 if full or not machine.bf16 else 2
    return tokens * (shape.layers * size * shape.width + layer if checkpointed else shape.layers * layer)


def checkpoints(shape: Shape, tokens: int, machine: Machine, room: float, *, full: bool) -> bool:
    """Whether a training step on `tokens` should compute its layers again instead of keeping what they need: on a GPU,
    where a plain step would take more than four fifths of `room`. It costs a third of the speed, so not otherwise."""
    if machine.device == "cpu":
        return False
    weights = (20.0 if full else 2.0 if machine.bf16 else 4.0) * shape.parameters
    whole = kept(shape, tokens, machine, full=full, checkpointed=False)
    return ROUNDING * (weights + whole) + STEADY > 0.8 * room


def release() -> None:
    """Give back what the last stage left in the device's memory. The sampler keeps its buffers for the next model of the
    same shape: at seven billion parameters some 40 GB, which the next stage needs for its weights."""
    import gc

    import torch

    from persona_coupling import decode

    decode._kept.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def watch(device: str) -> None:
    """Give back what this process has of a GPU's memory without using it; from now on `peak` counts anew."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    """The most gigabytes of a GPU's memory that this process has had since `watch`, what it keeps from one stage to the next
    included and its CUDA context not; 0 for a CPU."""
    if not device.startswith("cuda"):
        return 0.0
    import torch

    return float(torch.cuda.max_memory_reserved()) / 2**30


def shortages(device: str) -> int:
    """How often this process has been refused a GPU's memory so far, errors that were caught and mended included."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def full(error: BaseException) -> bool:
    """Whether an error says that the card's memory is used up: while a graph is captured CUDA names what torch then
    tries, to free some, instead of the shortage itself."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or unfit(error)


def unfit(error: BaseException) -> bool:
    """Whether an error says that its process can use the card no more: memory was short while a graph was captured, and
    CUDA takes the capture for one that goes on, so that nothing may be allocated any more."""
    return "not permitted when stream is capturing" in str(error)


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a loaded model."""
    config, layer = model.config.get_text_config(), model.base_model.layers[0]
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=layer.mlp.gate_proj.out_features,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        key_width=layer.self_attn.k_proj.out_features,
        parameters=model.num_parameters(),
    )


def capacity(device: str) -> float:
    """Bytes of memory that a GPU has in all; without bound for a CPU, where nothing is decided by it."""
    if not device.startswith("cuda"):
        return float("inf")
    import torch

    return float(torch.cuda.get_device_properties(device).total_memory)


def installed() -> float:
    """Bytes of memory that the machine has in all (its container's limit, if that is less); without bound where the system
    does not say."""
    return _of_system("MemTotal")


def free(device: str) -> float:
    """Bytes of memory that are free for us now: of the GPU, or of the machine (its container's limit, if that is less).
    Without bound where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    return _of_system("MemAvailable")


def _of_system(field: str) -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            fields = dict(line.split(":", 1) for line in handle)
        found = float(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            most = limit.read().strip()
        return found if most == "max" else min(found, float(most))
    except (OSError, ValueError):
        return found
