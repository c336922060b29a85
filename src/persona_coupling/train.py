"""Fine-tuning through TRL's SFTTrainer on rows that are tokenised and masked here.

Labels are built in one place for every data format, so that the loss mask cannot differ between conditions. The batch
schedule is laid out before training: the rows in the order in which they will be seen, exactly steps x batch of them, so
that the number of optimiser steps and the composition of every batch are known and shared between arms.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from persona_coupling import architecture, chat, memory
from persona_coupling.errors import GuardError
from persona_coupling.machine import Machine
from persona_coupling.models import layer_of, marker_ids, quiet_transformers, render, text_ids
from persona_coupling.personas import MARKER_SUFFIX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from persona_coupling.store import Report

IGNORED = -100
Loss = Literal["completion", "tail", "marker"]
WINDOW = 8  # batches among which rows are grouped by length; larger pads less and shuffles less


@dataclass(frozen=True)
class Lora:
    """Low-rank adapter settings (Hu et al. 2021, arXiv:2106.09685), always rank-stabilised: the update is scaled by
    alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""

    rank: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]
    layers: tuple[int, ...] | None = None  # None: all


@dataclass(frozen=True)
class Training:
    """What determines a fine-tuned model besides its start, its rows and its seed. `lora=None`: all parameters."""

    steps: int
    batch: int
    learning_rate: float
    warmup: float  # fraction of steps
    weight_decay: float
    loss: Loss
    tail: int  # supervised tokens of `loss="tail"`, the end of turn included
    lora: Lora | None
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    snapshots: tuple[int, ...] = ()  # optimiser steps after which the change so far is kept too

    start: int = 0  # which random start under a seed: runs that share it draw the same A and dropout stream

    def draws(self, seed: int) -> int:
        """The seed of initialisation and dropout. Two LoRA runs of one seed would draw the same random A and read the
        same directions whatever they learn; runs with different `start` do not. The batch schedule keeps `seed`."""
        return seed if self.start == 0 else int(np.random.SeedSequence([seed, self.start]).generate_state(1)[0])

    def __post_init__(self) -> None:
        if any(not 0 < step <= self.steps for step in self.snapshots):
            raise ValueError(f"snapshots {self.snapshots} of {self.steps} steps")


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], loss: Loss, tail: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation whose first message is an explicit system message.

    A marker is tokenised apart from the answer before it, so that what is trained is what evaluation forces and scores,
    also where a tokenizer would join a full stop with the blank line behind it.

    `completion`: every assistant turn with its end-of-turn token is supervised. `tail`: the last `tail` tokens of the
    last one. `marker`: its marker and end of turn, or, where there is no marker, the end of turn alone (the place
    where the marker would stand). Raises GuardError if the last supervised token is not the template's end of turn.
    """
    stop = tokenizer.eos_token_id
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = list(tokenizer(render(tokenizer, messages[:number]), add_special_tokens=False).input_ids)
        if prompt[: len(ids)] != ids:
            raise GuardError("the chat template renders earlier turns differently once later ones follow")
        body, marked = message["content"].removesuffix(MARKER_SUFFIX), message["content"].endswith(MARKER_SUFFIX)
        suffix = marker_ids(tokenizer) if marked else []
        answer = [*text_ids(tokenizer, body), *suffix, stop]
        if not _ends_turn(tokenizer, messages[: number + 1]):
            raise GuardError(f"the template does not end a turn with {tokenizer.eos_token!r}")
        spans.append((len(prompt), len(prompt) + len(answer)))
        ids = prompt + answer
    if not spans:
        raise GuardError("a training row without an assistant turn")
    labels = [IGNORED] * len(ids)
    if loss == "completion":
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
    else:
        begin, end = spans[-1]
        begin = end - 1 - len(suffix) if loss == "marker" else max(begin, end - tail)
        labels[begin:end] = ids[begin:end]
    if labels[-1] != stop:
        raise GuardError("the last supervised token is not the end of turn")
    return ids, labels


def _ends_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> bool:
    """Whether the template writes the tokenizer's end-of-turn token right behind the last message."""
    whole = chat.apply(tokenizer, chat.written(tokenizer, messages), prompt=False)
    prompt = render(tokenizer, messages[:-1])
    behind = whole.removeprefix(prompt).lstrip(" ")  # a space that some templates write is part of the first token
    return whole.startswith(prompt) and behind.startswith(messages[-1]["content"] + tokenizer.eos_token)


def schedule(count: int, length: Callable[[int], int], *, steps: int, batch: int, seed: int) -> list[int]:
    """Row numbers in training order, exactly steps x batch of `count` rows: shuffled epochs, grouped by length within
    windows of `WINDOW` batches, batches of a window in random order."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += rng.permutation(count).tolist()
    order = order[: steps * batch]
    arranged: list[int] = []
    for first in range(0, len(order), WINDOW * batch):
        window = sorted(order[first : first + WINDOW * batch], key=length)
        batches = [window[i : i + batch] for i in range(0, len(window), batch)]
        arranged += [row for number in rng.permutation(len(batches)) for row in batches[number]]
    return arranged


class Encoded(Sequence[tuple[list[int], list[int]]]):
    """Token ids and labels of conversations, each encoded when it is first asked for: a run sees some thousand of a
    corpus' rows, and most of encoding all of them was waste. A row stays the same object."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], settings: Training
    ) -> None:
        self._encode = lambda messages: encode(tokenizer, messages, settings.loss, settings.tail)
        self._conversations = conversations
        self._done: dict[int, tuple[list[int], list[int]]] = {}

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, row: Any) -> Any:
        if row not in self._done:
            self._done[row] = self._encode(self._conversations[row])
        return self._done[row]


def in_order(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], settings: Training, *, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the rows in training order, exactly steps x batch of them."""
    return arranged(Encoded(tokenizer, conversations, settings), settings, seed)


def arranged(
    rows: Sequence[tuple[list[int], list[int]]], settings: Training, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Encoded rows in training order."""
    order = schedule(len(rows), lambda row: len(rows[row][0]), steps=settings.steps, batch=settings.batch, seed=seed)
    return [rows[row] for row in order]


def lora_config(lora: Lora) -> Any:
    """The settings as PEFT takes them."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=True,
        target_modules=list(lora.modules),
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        task_type="CAUSAL_LM",
    )


def snapshot_folder(folder: Path, step: int) -> Path:
    """Where the change after `step` steps lies beside the final one."""
    return folder / f"snapshot-{step}"


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    settings: Training,
    *,
    seed: int,
    machine: Machine,
    folder: Path,
    report: Report,
) -> list[dict[str, float]]:
    """Train, write the adapter (or the dense delta) into `folder`, snapshots into folders inside it, and return the
    log: step, loss, learning rate, gradient norm of every step. Raises GuardError if the optimiser took another number
    of steps than asked."""
    rows = in_order(tokenizer, conversations, settings, seed=seed)
    dense = settings.lora is None
    before = {n: p.detach().clone() for n, p in model.named_parameters()} if dense else {}

    def write(trainer: Any, place: Path) -> None:
        place.mkdir(exist_ok=True)
        if dense:
            _save_dense(trainer.accelerator.unwrap_model(trainer.model), before, place)
        else:
            check_attached(trainer.model, settings)
            save_adapter(trainer.model, place)

    with quiet_transformers(), tempfile.TemporaryDirectory() as scratch, seeded(settings.draws(seed)):
        trainer = make_trainer(
            model,
            tokenizer,
            [{"input_ids": ids, "labels": labels} for ids, labels in rows],
            settings,
            None if settings.lora is None else lora_config(settings.lora),
            seed=settings.draws(seed),
            machine=machine,
            scratch=scratch,
            report=report,
        )
        trainer.add_callback(_at_steps(settings.snapshots, lambda step: write(trainer, snapshot_folder(folder, step))))
        trainer.train()
        if trainer.state.global_step != settings.steps:
            raise GuardError(f"{trainer.state.global_step} optimiser steps were taken, {settings.steps} planned")
        write(trainer, folder)
    return [
        {
            "step": float(entry["step"]),
            "loss": float(entry["loss"]),
            "learning_rate": float(entry["learning_rate"]),
            "grad_norm": float(entry["grad_norm"]),
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    settings: Training,
    peft_config: Any,
    *,
    seed: int,
    machine: Machine,
    scratch: str,
    report: Report,
    selected_head: bool = True,
) -> Any:
    """An SFTTrainer that sees `rows` once, in order, with their labels as they are; `selected_head=False` leaves the
    library's own loss and layers in place on the CPU too."""
    from datasets import Dataset
    from trl import SFTConfig

    from persona_coupling.train_cpu import faster_lora

    longest = max(len(row["input_ids"]) for row in rows)
    micro = micro_batch(settings.batch, longest, machine.train_tokens)
    on_cpu = machine.device == "cpu"
    arguments = SFTConfig(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=machine.bf16,
        fp16=False,
        use_cpu=on_cpu,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential",
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        # small models fit without it, and it costs a third of the speed; batches too long for memory are split above
        gradient_checkpointing=longest * micro > machine.train_tokens
        or memory.checkpoints(
            memory.shape_of(model),
            longest * micro,
            machine,
            memory.capacity(machine.device),
            full=settings.lora is None,
        ),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
    )
    trainer = _trainer_class(on_cpu and selected_head)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[_reporter(settings.steps, report)],
    )
    _quiet(trainer)
    if on_cpu and selected_head:
        faster_lora(trainer.model)
    return trainer


def micro_batch(batch: int, longest: int, tokens: int) -> int:
    """The largest divisor of `batch` whose padded tokens stay within `tokens` (at least 1)."""
    return next((m for m in range(batch, 0, -1) if batch % m == 0 and m * longest <= tokens), 1)


def _trainer_class(selected_head: bool) -> Any:
    """TRL's trainer; if asked, with a loss that projects only supervised positions through the LM head.

    TRL's own fused head does so on CUDA only, so the CPU asks for this one. The result is the same: positions whose
    label is ignored contribute nothing to the loss or to any gradient.
    """
    from trl import SFTTrainer

    if not selected_head:
        return SFTTrainer

    class SelectedHeadTrainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            import torch

            from persona_coupling import train_cpu

            causal = model.get_base_model() if hasattr(model, "get_base_model") else model
            hidden = causal.base_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            targets = inputs["labels"][:, 1:]
            supervised = targets != IGNORED
            head = causal.get_output_embeddings()
            if architecture.reads_plainly(causal) and head.bias is None:
                total = train_cpu.summed_loss(hidden[supervised], head.weight, targets[supervised])
            else:
                logits = architecture.logits(causal, hidden[supervised]).float()
                total = torch.nn.functional.cross_entropy(logits, targets[supervised], reduction="sum")
            loss = total / (supervised.sum() if num_items_in_batch is None else num_items_in_batch)
            return (loss, {}) if return_outputs else loss

    return SelectedHeadTrainer


def _reporter(steps: int, report: Report) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report(state.global_step / steps)

    return Reporter()


def _at_steps(steps: tuple[int, ...], do: Callable[[int], None]) -> Any:
    from transformers import TrainerCallback

    class AtSteps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in steps:
                do(state.global_step)

    return AtSteps()


def _quiet(trainer: Any) -> None:
    """Drop the callback that prints every log line: the lab's progress bar says how far we are."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators at `seed` inside, as they were outside: TRL seeds Python's, numpy's and torch's from its
    arguments."""
    import random

    import torch

    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the library's global state is what is kept

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def check_attached(model: torch.nn.Module, settings: Training) -> None:
    """Raise GuardError unless the adapter sits on exactly the modules and layers asked for."""
    assert settings.lora is not None
    names = {name.split(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    layers = {layer_of(name + ".") for name in names}
    wanted = layers if settings.lora.layers is None else set(settings.lora.layers)
    expected = len(wanted) * len(settings.lora.modules)
    if layers != wanted or len(names) != expected:
        raise GuardError(f"the adapter sits on {len(names)} modules, {expected} were asked for")


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, without what names this machine: the base model's path and the model card."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": None}
    path.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def _save_dense(model: torch.nn.Module, before: dict[str, torch.Tensor], folder: Path) -> None:
    """Write after minus before of every parameter that moved, in bf16: half a gigabyte less at 135M parameters, and a
    relative error of at most 2^-9 of the delta itself."""
    import torch
    from safetensors.torch import save_file

    from persona_coupling.adapters import DENSE

    delta = {}
    for name, parameter in model.named_parameters():
        difference = parameter.detach().float().cpu() - before[name].float().cpu()
        if bool((difference != 0).any()):
            delta[name] = difference.to(torch.bfloat16).contiguous()
    save_file(delta, folder / DENSE, metadata={"format": "pt"})
