"""Many small fine-tunings at once: cells stacked on one frozen base, their step captured as a CUDA graph and replayed.

An eager step of a 135M model takes 266 ms on an H100, of which the arithmetic is 1.2 ms: the rest is spent launching
some ten thousand small kernels. Two things remove it. A captured graph replays all kernels of a step with one launch.
And cells that start from one base share its matrix products (`stacked`), so that each kernel does the work of N cells.

What is computed is what TRL's path computes, and the tests hold the two together: the same rows in the same batches,
PEFT's own initial adapter for the seed, the loss summed over a batch's supervised tokens and divided by their number,
the norm clipped per cell, AdamW with transformers' defaults, transformers' schedule. Differences: dropout masks come
from another stream of random numbers; in bf16, products are rounded in other places. Cells may differ in everything
but batch size and dropout; one with fewer steps is held (learning rate and gradient 0) until the longest has finished.

A graph has fixed shapes (see `batches`), one graph per length, all in one memory pool. All are captured before the first
step, the longest first, so that shorter ones fit into the memory it has taken. The longest, and shapes that this process
has not run yet, are passed through once uncaptured, where libraries set themselves up; what that took is given back
first, since otherwise activations are kept twice. Inputs of all steps are laid out on the device beforehand; per step
the host only copies them into place, sets the learning rates, and replays. Without CUDA the same code runs uncaptured.

The base is in bf16, with what the cells' starts add to it beside it. A start with a dense change has no such form, and
rounded it would lose part of that change: a cell on one is trained alone, a stack of one, on its merged start in fp32
(`FineTune.on_merged`), where `fused` has no kernels and the library's own modules run.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from persona_coupling import drawn, fused, memory, stacked, train, transformer
from persona_coupling.batches import Batch, Chain, batches
from persona_coupling.errors import GuardError
from persona_coupling.machine import SMALL, Machine
from persona_coupling.stacked import Adapters, Factors
from persona_coupling.store import share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from persona_coupling.store import Report

_passed: set[tuple[object, ...]] = set()  # shapes of batches that this process has run: see `_Steps._capture`
WATCH = 8  # steps between waits for the device: how far the progress bar may run ahead


@dataclass
class Trained:
    """A chain's result: its log as `train.fine_tune` returns it, its adapter, and the adapters at its snapshots."""

    log: list[dict[str, float]]
    adapter: Factors
    snapshots: dict[int, Factors] = field(default_factory=dict)


def train_together(
    model: PreTrainedModel, chains: Sequence[Chain], machine: Machine, report: Report, *, capture: bool | None = None
) -> list[Trained]:
    """Train all chains on one frozen model, which is left as it was. `capture` (default: on CUDA) only changes speed.

    Raises ValueError for chains that cannot share a stack, GuardError for a wrong number of rows, for adapters that do
    not sit where they were asked for, and when padding was trained.
    """
    _check(chains)
    device = next(model.parameters()).device
    capture = device.type == "cuda" if capture is None else capture
    dtype = model.get_output_embeddings().weight.dtype
    loras = [drawn.lora_of(chain.settings) for chain in chains]
    drawer = drawn.Drawer(model)
    starts = [drawer.initial(chain.settings, chain.settings.draws(chain.seed)) for chain in chains]
    frozen = stacked.frozen_factors(
        model, [stacked.joined(list(chain.frozen)) for chain in chains], dtype=dtype, device=device
    )
    adapters = Adapters(
        model,
        starts,
        [lora.alpha / math.sqrt(lora.rank) for lora in loras],
        frozen=frozen,
        dtype=dtype,
        device=device,
        parts=fused.parts(loras[0].dropout, device, dtype),
    )
    random = torch.zeros(2, dtype=torch.int32, device=device)
    with (
        train.seeded(chains[0].settings.draws(chains[0].seed)),
        torch.no_grad(),
        _unneeded(model),
        stacked.attached(model, adapters, p=loras[0].dropout, random=random),
    ):
        kind = (
            model.config.to_json_string(),
            adapters.first.shape,
            adapters.second.shape,
            tuple(frozen),
            dtype,
            loras[0].dropout,
        )
        steps = _Steps(model, chains, adapters, random, kind, capture=capture)
        snapshots: list[dict[int, Factors]] = [{} for _ in chains]
        longest = max(chain.settings.steps for chain in chains)
        for step in range(longest):
            steps.run(step)
            for cell, chain in enumerate(chains):
                if step + 1 == chain.settings.steps or step + 1 in chain.settings.snapshots:
                    snapshots[cell][step + 1] = adapters.factors(cell, set(starts[cell]))
            if capture and step % WATCH == 0:
                torch.cuda.synchronize(device)
            report((step + 1) / longest)
        logs = steps.logs()
    return [
        Trained(log, saved[chain.settings.steps], {s: f for s, f in saved.items() if s in chain.settings.snapshots})
        for chain, log, saved in zip(chains, logs, snapshots, strict=True)
    ]


@contextlib.contextmanager
def _unneeded(model: PreTrainedModel) -> Iterator[None]:
    """No parameter of the model gets a gradient in here: those of norms and of layers without an adapter would be computed
    and kept in vain wherever the library's own modules run."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)


def suits(model: PreTrainedModel) -> bool:
    """Whether this path is exact for a model and worth it: full causal attention without further tricks (see
    `transformer.departure`; a dropout of scores would be TRL's alone), and so small that launches, not arithmetic, bound
    an eager step."""
    config = model.config
    return (
        config.model_type in ("llama", "qwen2")
        and not transformer.departure(model)
        and not getattr(config, "attention_dropout", 0.0)
        and model.num_parameters() < SMALL  # above, an eager step keeps the card busy
    )


def fits(rows: Sequence[tuple[list[int], list[int]]], batch: int, machine: Machine) -> bool:
    """Whether a batch of these rows is run at once; where it is not, TRL accumulates gradients over parts of it."""
    return batch * max(len(ids) for ids, _ in rows) <= machine.train_tokens


def train_each(
    model: PreTrainedModel, chains: Sequence[Chain], machine: Machine, report: Report
) -> list[tuple[Trained, int] | Exception]:
    """Train chains in stacks of `machine.stack`, each with the size of the stack it was trained in. A stack that does not
    fit is halved; where a chain is refused, the others of its stack are trained all the same."""
    made: list[tuple[Trained, int] | Exception] = []
    for first in range(0, len(chains), machine.stack):
        part = chains[first : first + machine.stack]
        ours = share(report, first, len(part), len(chains))
        refused: Exception | None = None
        try:
            made += [(trained, len(part)) for trained in train_together(model, part, machine, ours)]
        except (GuardError, RuntimeError) as error:
            if not isinstance(error, GuardError) and not memory.full(error):
                raise
            refused = error.with_traceback(None)  # its frames hold the stack's tensors
        if torch.cuda.is_available():  # graphs keep gigabytes, and other workers share the card
            gc.collect()
            torch.cuda.empty_cache()
        if refused is not None and len(part) == 1:
            made.append(refused)
        elif refused is not None:
            half = 1 if isinstance(refused, GuardError) else len(part) // 2
            made += train_each(model, part, replace(machine, stack=half), ours)
    return made


def _check(chains: Sequence[Chain]) -> None:
    if not chains:
        raise ValueError("no chains to train")
    for chain in chains:
        if len(chain.rows) != chain.settings.steps * chain.settings.batch:
            raise GuardError(f"{len(chain.rows)} rows for {chain.settings.steps} steps of {chain.settings.batch}")
    if len({(chain.settings.batch, drawn.lora_of(chain.settings).dropout) for chain in chains}) != 1:
        raise ValueError("chains of one stack share batch size and dropout")


def learning_rates(settings: train.Training) -> list[float]:
    """The rate of every step, as transformers schedules it."""
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    warmup = round(settings.warmup * settings.steps)
    scheduler = get_scheduler(settings.schedule, optimiser, num_warmup_steps=warmup, num_training_steps=settings.steps)
    rates = []
    for _ in range(settings.steps):
        rates.append(float(optimiser.param_groups[0]["lr"]))
        optimiser.step()
        scheduler.step()
    return rates


class _Steps:
    """Optimiser steps of a stack; on CUDA one captured graph per padded length."""

    def __init__(
        self,
        model: PreTrainedModel,
        chains: Sequence[Chain],
        adapters: Adapters,
        random: torch.Tensor,
        kind: tuple[object, ...],
        *,
        capture: bool,
    ) -> None:
        """`kind`: what, with the shape of a batch, tells which kernels run."""
        self.model, self.chains, self.adapters, self.random, self.capture = model, chains, adapters, random, capture
        device, cells = adapters.master.device, len(chains)
        self.batches = batches(chains, device)
        self.rates = torch.zeros(len(self.batches), cells)
        for cell, chain in enumerate(chains):
            self.rates[: chain.settings.steps, cell] = torch.tensor(learning_rates(chain.settings))
        self.rates = self.rates.to(device)
        self.rate = torch.zeros(cells, device=device)
        # transformers does not clip at 0
        limits = [chain.settings.max_grad_norm or math.inf for chain in chains]
        self.limit = torch.tensor(limits, device=device)
        self.loss, self.norm = torch.zeros(cells, device=device), torch.zeros(cells, device=device)
        self.record = torch.zeros(2, len(self.batches), cells, device=device)
        self.optimiser = _adamw(chains, adapters, self.rate)
        self.unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # 4-D masks are passed on as they are
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        if capture:
            self._capture(device, kind)

    def run(self, step: int) -> None:
        """One optimiser step of every cell that has steps left."""
        batch = self.batches[step]
        self.rate.copy_(self.rates[step])
        if self.capture:
            graph, inputs = self.graphs[batch.ids.shape[1]]
            inputs.copy_(batch)
            graph.replay()
        else:
            self._gradients(batch)
            self._update()
        self.record[0, step].copy_(self.loss)
        self.record[1, step].copy_(self.norm)

    def _capture(self, device: torch.device, kind: tuple[object, ...]) -> None:
        """A graph for every length."""
        lengths = {batch.ids.shape[1]: batch for batch in self.batches}
        longest_first = [lengths[length] for length in sorted(lengths, reverse=True)]
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(device))
        drawn_so_far = torch.cuda.get_rng_state(device)  # masks must not hang on what this process ran before
        with torch.cuda.stream(stream):
            for number, batch in enumerate(longest_first):  # no gradient is added to another
                if number == 0 or (*kind, batch.ids.shape) not in _passed:
                    self._gradients(batch)
                    _passed.add((*kind, batch.ids.shape))
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        for batch in longest_first:
            inputs, graph = batch.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._gradients(inputs)
                self._update()
            self.graphs[batch.ids.shape[1]] = graph, inputs
        torch.cuda.set_rng_state(drawn_so_far, device)

    def _gradients(self, batch: Batch) -> None:
        """Loss of every cell, and the gradients of its adapter."""
        self.random.random_()
        self.adapters.refresh()
        embedded = self.model.get_input_embeddings()(batch.ids)
        with torch.enable_grad():
            hidden = self.model.base_model(
                inputs_embeds=embedded.requires_grad_(), attention_mask=self.unmasked, use_cache=False
            ).last_hidden_state
            chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.index)
        losses = torch.empty_like(batch.share)
        weight = self.model.get_output_embeddings().weight
        gradient = fused.head_gradient(chosen.detach(), weight, batch.targets, batch.share, losses)
        chosen.backward(gradient)
        torch.sum((losses * batch.share).view(len(self.chains), -1), dim=1, out=self.loss)
        self.adapters.collect()

    def _update(self) -> None:
        """Clip each cell's gradient as torch's `clip_grad_norm_` does, then AdamW."""
        gradient = self.adapters.gradient
        torch.linalg.vector_norm(gradient, dim=1, out=self.norm)
        gradient.mul_((self.limit / (self.norm + 1e-6)).clamp(max=1.0)[:, None])
        self.optimiser.step()

    def logs(self) -> list[list[dict[str, float]]]:
        """Per cell and step: step, loss, learning rate, gradient norm before clipping."""
        losses, norms = self.record.tolist()
        rates = self.rates.tolist()
        return [
            [
                {
                    "step": float(step + 1),
                    "loss": losses[step][cell],
                    "learning_rate": rates[step][cell],
                    "grad_norm": norms[step][cell],
                }
                for step in range(chain.settings.steps)
            ]
            for cell, chain in enumerate(self.chains)
        ]


def _adamw(chains: Sequence[Chain], adapters: Adapters, rate: torch.Tensor) -> torch.optim.Optimizer:
    """torch's AdamW with one parameter and one rate per cell. Its state is made here, since a graph is captured before
    the first step has been taken."""
    from transformers import TrainingArguments

    defaults = {f.name: f.default for f in TrainingArguments.__dataclass_fields__.values()}
    groups = []
    for cell, chain in enumerate(chains):
        parameter = adapters.master[cell]
        parameter.grad = adapters.gradient[cell]
        groups.append({"params": [parameter], "lr": rate[cell], "weight_decay": chain.settings.weight_decay})
    optimiser = torch.optim.AdamW(
        groups,
        lr=rate[0],
        betas=(defaults["adam_beta1"], defaults["adam_beta2"]),
        eps=defaults["adam_epsilon"],
        fused=True,
        capturable=rate.is_cuda,
    )
    for group in optimiser.param_groups:
        (parameter,) = group["params"]
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimiser
