"""Shared fixtures: a random tiny model of two families in a temporary store, and a planted adapter that PEFT wrote."""

import copy
import importlib.abc
import importlib.machinery
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

KERNELS = ("persona_coupling.decode_kernels", "persona_coupling.train_kernels")


class Unwrapped(importlib.abc.MetaPathFinder):
    """Finds modules before the import hook of --jaxtyping-packages does: Triton compiles a kernel from its source and its
    module's globals, and the hook's type-checking wrapper has globals of its own."""

    def find_spec(self, fullname, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in KERNELS else None


sys.meta_path.insert(0, Unwrapped())

from persona_coupling import models  # noqa: E402
from persona_coupling.machine import Machine  # noqa: E402
from persona_coupling.progress import Speeds  # noqa: E402
from persona_coupling.store import Lab, Stage, Store  # noqa: E402

CPU = Machine("cpu", False, "eager", 128, 32, 4_096)
LAYERS, WIDTH = 3, 32


@dataclass(frozen=True)
class Planted(Stage):
    """A LoRA adapter with random weights of a known size, written by PEFT itself."""

    source: Stage
    rank: int = 2
    alpha: int = 6
    rslora: bool = True
    seed: int = 0
    kind: ClassVar[str] = "change"

    def build(self, folder, lab):
        import torch
        from peft import LoraConfig, get_peft_model

        base = models.load_raw(self.source, lab, dtype=torch.float32, attention="eager")
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, use_rslora=self.rslora, target_modules=list(models.MODULES)
        )
        adapted = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the repository's artifacts."""
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A laboratory over a store that all tests of a run share; tests only add to it."""
    import torch

    torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives
    return Lab(Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def tiny():
    """The tiny Llama as a stage."""
    return models.TinyModel("llama", LAYERS, WIDTH, seed=0)


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def family(request):
    """Both families as stages."""
    return models.TinyModel(request.param, LAYERS, WIDTH, seed=0)


@pytest.fixture(scope="session")
def tokenizer(tiny, lab):
    """The tiny model's tokenizer; not to be changed."""
    return models.load_tokenizer(tiny, lab)


@pytest.fixture(scope="session")
def _weights(tiny, lab):
    import torch

    return models.load_raw(tiny, lab, dtype=torch.float32, attention="eager")


@pytest.fixture
def model(_weights, tokenizer):
    """A fresh fp32 copy of the tiny Llama with livelier weights: its own are so small that every context gives nearly
    the same next token, and a test of what depends on context would see nothing."""
    import torch

    lively = copy.deepcopy(_weights)
    with torch.no_grad():
        for name, parameter in lively.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20 if "lm_head" in name else 50 if "embed" in name else 8)
        lively.model.embed_tokens.weight[:, 0] = 3.0
        lively.lm_head.weight[tokenizer.eos_token_id] = 0.0
        lively.lm_head.weight[tokenizer.eos_token_id, 0] = 3.0  # an answer in ten tokens or so ends
    return lively


@pytest.fixture
def fp32(monkeypatch):
    """Checkpoints load in fp32 whatever the processor can do."""
    monkeypatch.setattr("persona_coupling.machine.cpu_has_fast_bf16", lambda: False)


@pytest.fixture(scope="session")
def planted():
    """The stage class of planted adapters."""
    return Planted


@pytest.fixture(scope="session")
def cpu():
    """fp32 settings of a CPU."""
    return CPU


@pytest.fixture
def altered_tokenizer(tokenizer):
    """A copy of the tokenizer to change at will."""
    return copy.deepcopy(tokenizer)


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    return Store(tmp_path / "root")


@pytest.fixture
def speeds(tmp_path):
    """First guesses for a CPU, nothing learnt yet."""
    return Speeds(tmp_path, "cpu")
