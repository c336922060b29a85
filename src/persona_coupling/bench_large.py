"""What a large model costs, measured with random weights in its exact shape: neither speed nor memory depends on values.

    python -m persona_coupling.bench_large --what merge,hidden,score,lora,sample,load --json large.json

Every part runs the study's own code: its trainer, its merge and the check behind it, its sampler, the stage that keeps
hidden states. Only the weights come from nowhere, drawn on the device in place, since a file of 15 GB would say nothing
more. A part is a number of points; each is written to the file as soon as it is measured, and one that is there is not
measured again, so a run that is killed goes on with the same command. A point that does not fit is a result too.

Nothing is multiplied here: the record says how many rows, tokens and steps were measured, and `costs` multiplies.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_coupling import memory, models, provenance, train
from persona_coupling.bench_material import (
    Drawn,
    Size,
    batches,
    drawn_weights,
    lengths,
    random_model,
    shape_of,
    size_of,
    texts,
)
from persona_coupling.bench_steps import TIMED, peaks, steps, training
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine, machine
from persona_coupling.profiles import Profile
from persona_coupling.stages.training import FAILURES
from persona_coupling.store import Lab
from persona_coupling.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROFILE = "qwen2.5-7b"
SHARPNESS = 6.0  # standard deviation of sampled logits: an answer's nucleus is then as narrow as in text
PROMPT, FIXED, MARKER = (28, 48), 22, 6  # tokens, of SmolLM2's tokenizer on this study's prompts and fixed answers
SCORED = 1_024  # sequences
GRID_TOKENS = 64  # new tokens of a sampling point that only chooses the batch
SAMPLED = (77, 154, 308, 512, 616)  # rows sampled together; all but one divide the 3,080 of an evaluation
SURE = 0.95  # of the device's memory: what is estimated to need more is not tried
WRITTEN_LAYERS = 3  # of the model that is written to a disk and read back
# micro-batch (rows) and whether layers are computed again; the first of each kind is what the study does by itself
TRAINED: dict[str, tuple[tuple[int, bool], ...]] = {
    "sft": ((16, False), (16, True), (4, False)),
    "coupling": ((16, True), (4, False), (8, False), (8, True)),
    "ultrachat": ((4, True), (1, True), (1, False), (2, True)),
}
PARTS = ("merge", "hidden", "score", "lora", "sample", "load")


@dataclass
class Bench:
    """What all points share."""

    size: Size
    profile: Profile
    settings: Machine
    checkpoint: Checkpoint  # the profile's model after one SFT
    lab: Lab

    def model(self, *, fp32: bool = False, sharpness: float = 0.0) -> PreTrainedModel:
        """Random weights in the machine's format, or in fp32."""
        import torch

        return random_model(
            self.size.model,
            dtype=torch.float32 if fp32 else getattr(torch, self.settings.dtype_name),
            device=self.settings.device,
            attention=self.settings.attention,
            sharpness=sharpness,
        )

    def settle(self) -> None:
        """Wait for the device."""
        if self.settings.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what `work` returns."""
        self.settle()
        started = time.perf_counter()
        found = work()
        self.settle()
        return time.perf_counter() - started, found

    # -------------------------------------------------------------------------------------------- parts

    def points(self, part: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Name and work of every point of a part."""
        if part == "merge":
            yield "merge", self.merge
            yield "merge/check", self.merge_check
        elif part in ("hidden", "score", "load"):
            yield part, getattr(self, part)
        elif part == "lora":
            for kind, settings in TRAINED.items():
                for micro, again in settings:
                    name = f"lora/{kind}/{micro}/{'again' if again else 'kept'}"
                    yield name, partial(self.lora, kind, micro, again)
        elif part == "sample":
            for rows in SAMPLED:
                yield f"sample/{rows}", partial(self.sample, rows, GRID_TOKENS, again=True)
        else:
            raise UserError(f"There is no part {part}. Known: {', '.join(PARTS)}.")

    def merge(self) -> dict[str, Any]:
        """`Checkpoint.load` but for reading the source: the adapter is read, added in fp32, and the sum rounded."""
        model = self.model(fp32=True)
        with drawn_weights(model):
            seconds, _ = self.timed(lambda: self.checkpoint.load(self.lab))
        return {"seconds": seconds, "rank": self.profile.lora.rank}

    def merge_check(self) -> dict[str, Any]:
        """`merging.check` whole, but for reading the source."""
        from persona_coupling import merging

        model = self.model(fp32=True)
        with drawn_weights(model):
            seconds, report = self.timed(lambda: merging.check(self.checkpoint, self.lab))
        return {
            "seconds": seconds,
            "logit_difference": report["logit_difference"],
            "shift": report["rounding_loss_shift"],
        }

    def hidden(self) -> dict[str, Any]:
        """The stage `Hidden` on the profile's questions, but for reading the source and merging."""
        import torch

        from persona_coupling.stages.representations import STATES, Hidden

        asked, model = self.profile.evaluation, self.model(fp32=True)
        raw = Checkpoint(self.checkpoint.source)
        stage = Hidden(raw, asked.everyday, asked.values, self.profile.instruction)
        model = models.cast(model, getattr(torch, self.settings.dtype_name))
        self.fresh_peak()
        with tempfile.TemporaryDirectory() as folder, drawn_weights(model):
            seconds, _ = self.timed(lambda: stage.build(Path(folder), self.lab))
            written = (Path(folder) / STATES).stat().st_size
        return {"seconds": seconds, "rows": 11 * (asked.everyday + asked.values), "bytes_written": written}

    def score(self) -> dict[str, Any]:
        """`generate.sequence_logprobs`, twice; the first is not timed."""
        from persona_coupling import generate

        model, count = self.model(), self.size.less(SCORED)
        prompts, answers = (texts(count, *span, self.size, seed=i) for i, span in enumerate((PROMPT, (30, 90))))
        for _ in range(2):
            seconds, _ = self.timed(
                lambda: generate.sequence_logprobs(model, prompts, answers, batch=self.settings.score_batch)
            )
        return {"seconds": seconds, "rows": count, "tokens": sum(map(len, prompts)) + sum(map(len, answers))}

    def lora(self, kind: str, micro: int, again: bool) -> dict[str, Any]:
        """Steps of the study's trainer under the profile's settings."""
        values = self.profile.sft if kind != "coupling" else self.profile.scratch
        lora = train.Lora(self.profile.lora.rank, self.profile.lora.alpha, self.profile.lora.dropout, models.MODULES)
        wanted = batches(kind, self.size, TIMED[kind], values.batch)
        settings = training(values, len(wanted), lora)
        found = steps(self.model(), kind, wanted, settings, micro, again, self.settings, self.size.model.vocabulary)
        return {**found, "rank": lora.rank, "mean_tokens": float(np.mean(lengths(kind, self.size)))}

    def sample(self, rows: int, new_tokens: int, *, again: bool) -> dict[str, Any]:
        """One batch of an evaluation: prompts are read, the fixed answers scored, an answer sampled to the limit and the
        marker forced behind it. The model almost never ends an answer by itself, so all rows run on: the dearest case.
        `first_seconds` include what a stage does once, copying the weights and capturing the step; `again`: `seconds`
        are those of a second batch, without it."""
        from persona_coupling import generate

        asked, rows, size = self.profile.evaluation, self.size.less(rows), self.size
        new_tokens = size.less(new_tokens)
        model = self.model(sharpness=SHARPNESS)
        distinct = texts(-(-rows // asked.samples), *PROMPT, size, seed=0)
        prompts = [prompt for prompt in distinct for _ in range(asked.samples)][:rows]
        marker = list(range(3, 3 + MARKER))
        fixed = texts(1, FIXED, FIXED, size, seed=1)[0] + marker

        def batch() -> int:
            read = generate.prefill(model, prompts, 0)
            generate.continuation_logprobs(model, read, [fixed] * rows, MARKER)
            made = generate.sample(
                model,
                read,
                [str(i) for i in range(rows)],
                sampling=generate.Sampling(asked.temperature, asked.top_p, new_tokens),
                stop=size.model.vocabulary - 1,
                marker=marker,
                seed=0,
            )
            return sum(len(completion.tokens) for completion in made)

        first, tokens = self.timed(batch)
        seconds = self.timed(batch)[0] if again else first
        found = {"seconds": seconds, "first_seconds": first, "rows": rows, "tokens": tokens, "new_tokens": new_tokens}
        return {**found, "prompts": len(distinct), "prompt_tokens": max(map(len, prompts))}

    def load(self) -> dict[str, Any]:
        """Reading a source as every stage does, into the device's memory in fp32: of a model with the embeddings and a few
        of the layers, just written, so its file is in the system's cache. Seconds grow with the parameters."""
        import torch

        from persona_coupling import checkpoints, tiny

        shape = replace(self.size.model, layers=WRITTEN_LAYERS)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            tiny.write(folder, family="qwen2", layers=3, width=16, seed=0)  # its tokenizer stays
            model = random_model(shape, dtype=torch.bfloat16, device=self.settings.device, attention="sdpa")
            with models.quiet_transformers():
                model.save_pretrained(folder)
            parameters = model.num_parameters()
            del model
            source = models.local_model(folder)
            self.lab.folder(source)
            seconds, _ = self.timed(
                lambda: checkpoints.load_fp32(
                    source, self.lab, device=self.settings.device, attention=self.settings.attention
                )
            )
        return {"seconds": seconds, "parameters": parameters}

    def roomy(self, rows: int) -> bool:
        """Whether whole answers of so many rows are expected to fit. Memory that runs out while a step is captured ends
        the process, so what is not expected to fit is not tried."""
        from persona_coupling import decode

        asked, shape = self.profile.evaluation, shape_of(self.size.model)
        load = memory.Load(
            rows=decode.bucket(rows),
            prompts=-(-rows // asked.samples),
            prompt_tokens=PROMPT[1],
            answer_tokens=asked.max_new_tokens,
            trained_tokens=0,
            rank=0,
            lora=False,
            full=False,
        )
        room = memory.capacity(self.settings.device)
        need = next(n for n in memory.needs(shape, load, self.settings, room) if n.what.startswith("sampling"))
        return need.bytes < SURE * room

    def fresh_peak(self) -> None:
        """Forget the peak so far."""
        if self.settings.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def point(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One point's numbers with its peak; a device without memory enough is a result. Peaks are the device's alone:
        nothing is said of a CPU's."""
        self.fresh_peak()
        found: dict[str, Any] = {}
        try:
            found = {"fits": True, **work()}
        except RuntimeError as error:
            if not memory.full(error):
                raise
            found = {"fits": False, "message": str(error).splitlines()[0]}
        found |= peaks(self.settings.device)
        memory.release()
        return found


@dataclass
class Record:
    """The file of measurements: what was measured, on which shape and machine."""

    path: Path
    content: dict[str, Any]

    @staticmethod
    def open(path: Path, size: Size, device: str) -> Record:
        """The file as it is, or a new one. Raises UserError for one of another shape or machine: numbers of two
        machines do not stand in one table."""
        made = provenance.record(device)
        shape = {name: getattr(size.model, name) for name in ("layers", "width", "inner", "vocabulary", "key_width")}
        fresh = {
            "shape": {"name": size.name, **shape, "parameters": size.model.parameters},
            "device": made["device"],
            "capacity_bytes": None if device == "cpu" else memory.capacity(device),
            "measured": {},
            "provenance": made,
        }
        if not path.is_file():
            return Record(path, fresh)
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("shape", "device"):
            if content[name] != fresh[name]:
                raise UserError(f"{path} is of another {name}: {content[name]}. Give another file.")
        return Record(path, content)

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Write one point, the file whole or as it was."""
        from persona_coupling import outputs

        self.content["measured"][name] = found
        outputs.write_json(self.path, self.content)
        print(f"  {name:<26} {line(found)}", flush=True)


def line(found: dict[str, Any]) -> str:
    """A point in one line."""
    if not found["fits"]:
        return f"does not fit: {found['message']}"
    seconds = found["seconds"]
    text = f"{1000 * np.mean(seconds):9.0f} ms"
    if "tokens" in found:
        text += f"  {np.sum(found['tokens']) / np.sum(seconds):9.0f} tokens/s"
    return text + (f"  {found['peak_bytes'] / 1e9:6.1f} GB" if "peak_bytes" in found else "")


def run(what: list[str], path: Path, size: Size, *, limit: float) -> list[str]:
    """Measure the parts and keep every point. After `limit` seconds no further point is started; the same command then
    goes on. Returns the names of points that failed: nothing is written for them, and the others are measured."""
    failed: list[str] = []
    started, settings = time.monotonic(), machine()
    study = Study.open(PROFILE)
    profile, checkpoint = study.profile, study.sft("bad_legal", seed=0)
    record = Record.open(path, size, settings.device)
    print(f"{record.content['device']}; {size.name}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        lab = Drawn(Path(scratch), settings.device, checkpoint, size.model, profile.lora.rank)
        bench = Bench(size, profile, settings, checkpoint, lab)

        def measure(name: str, work: Callable[[], dict[str, Any]]) -> bool:
            if name in record.content["measured"]:
                return True
            if time.monotonic() - started > limit:
                print(f"  {name:<26} not reached within {limit:.0f} s", flush=True)
                return False
            try:
                record.keep(name, bench.point(work))
            except (
                *FAILURES,
                AttributeError,
                TypeError,
            ) as error:  # loud, and in the exit code: time on a large GPU is dear
                failed.append(name)
                print(f"  {name:<26} failed: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
            return True

        for part in what:
            reached = all(measure(name, work) for name, work in bench.points(part))
            if not reached or part != "sample":
                continue
            tokens = profile.evaluation.max_new_tokens
            for rows in filter(bench.roomy, best_first(record.content["measured"])):
                name = f"sample/{rows}/{tokens}"
                reached = measure(name, partial(bench.sample, rows, tokens, again=False))
                if not reached or name in failed or record.content["measured"][name]["fits"]:
                    break
    return failed


def best_first(measured: dict[str, Any]) -> list[int]:
    """The batches of the sampling grid that fit, by rows per second, best first."""
    grid = {rows: measured.get(f"sample/{rows}", {"fits": False}) for rows in SAMPLED}
    fitting = [rows for rows, found in grid.items() if found["fits"]]
    return sorted(fitting, key=lambda rows: -grid[rows]["rows"] / grid[rows]["seconds"])


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--json", required=True, help="the file of measurements, made or gone on with")
    parser.add_argument("--shape", default=PROFILE, help="a profile that declares its model's shape, or tiny")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further point after so many")
    chosen = parser.parse_args(arguments)
    try:
        failed = run(chosen.what.split(","), Path(chosen.json), size_of(chosen.shape), limit=chosen.seconds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
