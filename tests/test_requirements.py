"""What is looked at before a run: memory against what autograd keeps, the hub in all its moods, disk, and the plan."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import families
import pytest
import torch

from persona_coupling import cli, evidence, hub, memory, models, paths, profiles, progress, prose, requirements, train
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine
from persona_coupling.store import Lab, Store
from persona_coupling.study import Design, Results, Study

GB = 1e9
H100 = Machine("cuda", True, "sdpa", 512, 1_024, 16_384, score_tokens=65_536)
QWEN = memory.Shape(layers=28, width=3584, inner=18944, vocabulary=152064, key_width=512, parameters=7_615_616_512)


# ------------------------------------------------------------------------------------------------ memory


def saved(layers, *, full, bf16, tokens=64, width=128, inner=320):
    """Bytes that autograd keeps for the backward pass of a Qwen2, counted by torch's own hooks."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32).train()
    if not full:
        lora = LoraConfig(r=8, lora_dropout=0.05, target_modules=list(models.MODULES))
        model = get_peft_model(model, lora).get_base_model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.model(input_ids=torch.randint(0, 64, (1, tokens)), use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("full", "bf16"), [(False, True), (False, False), (True, False)])
def test_what_a_step_keeps_is_what_autograd_saves(full, bf16):
    """Another shape than the one at which the coefficients were read off: two layers' worth, within a tenth."""
    counted = saved(4, full=full, bf16=bf16) - saved(2, full=full, bf16=bf16)
    shape = memory.Shape(layers=2, width=128, inner=320, vocabulary=64, key_width=128, parameters=0)
    settings = dataclasses.replace(H100, bf16=bf16)
    assert memory.kept(shape, 64, settings, full=full, checkpointed=False) == pytest.approx(counted, rel=0.1)


def load(**changes):
    plain = {"rows": 512, "prompts": 308, "prompt_tokens": 120, "answer_tokens": 512, "trained_tokens": 8192}
    return memory.Load(**{**plain, "rank": 32, "lora": True, "full": False, **changes})


def of(shape, machine, room, **changes):
    return {need.what.split()[0]: need for need in memory.needs(shape, load(**changes), machine, room)}


def test_seven_billion_on_a_large_card():
    """By hand: three bf16 copies while a merge is checked, 7.6 x 6 x 1.1 = 50.3 GB; sampling 15.2 x 2 + 9.5 of weights,
    512 x 632 x 57,344 bytes = 18.6 GB of keys and values; a training step without checkpointing keeps 8192 x 12.9 MB =
    106 GB, so it is checkpointed."""
    found = of(QWEN, H100, 80 * GB)
    assert found["merging"].bytes == pytest.approx(50.3 * GB + memory.STEADY, rel=0.01)
    assert 55 * GB < found["sampling"].bytes < 75 * GB
    assert found["training"].bytes < 40 * GB
    assert "with gradient" in found["training"].how
    assert memory.kept(QWEN, 8192, H100, full=False, checkpointed=False) == pytest.approx(106 * GB, rel=0.01)
    whole = of(QWEN, H100, 80 * GB, full=True, lora=False)["training"]
    assert whole.bytes > 20 * 7.6 * GB


def test_a_small_model_is_never_slowed_by_checkpointing():
    smol = memory.Shape(layers=30, width=576, inner=1536, vocabulary=49152, key_width=192, parameters=134_515_008)
    assert not memory.checkpoints(smol, 16_384, H100, 80 * GB, full=False)
    assert memory.checkpoints(QWEN, 8192, H100, 80 * GB, full=False)
    assert not memory.checkpoints(QWEN, 1024, H100, 80 * GB, full=False)
    cpu = dataclasses.replace(H100, device="cpu")
    assert not memory.checkpoints(QWEN, 8192, cpu, 80 * GB, full=False)


def test_the_trainer_checkpoints_where_a_step_would_not_fit(model, tokenizer, cpu, tmp_path, monkeypatch):
    """And the loss stays what it was."""
    rows = [{"input_ids": list(range(5, 25)), "labels": list(range(5, 25))}] * 4
    settings = train.Training(2, 2, 1e-3, 0.0, 0.0, "completion", 32, train.Lora(2, 4, 0.0, models.MODULES))
    losses = []
    for fits in (True, False):
        monkeypatch.setattr(memory, "checkpoints", lambda *_a, fits=fits, **_o: not fits)
        with models.quiet_transformers():
            trainer = train.make_trainer(
                copy.deepcopy(model),
                tokenizer,
                rows,
                settings,
                train.lora_config(settings.lora),
                seed=0,
                machine=cpu,
                scratch=str(tmp_path),
                report=lambda _fraction: None,
            )
            assert trainer.args.gradient_checkpointing is not fits
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_declared_shape_is_the_models_own(tmp_path):
    """What the profile says of Qwen2.5-7B against transformers' own count of a model of its public configuration."""
    from transformers import Qwen2Config

    from persona_coupling import architecture

    public = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    declared = profiles.load("qwen2.5-7b").model
    found = architecture.of(public)
    assert found.shape == memory.Shape(**{name: getattr(declared, name) for name in memory.Shape.__dataclass_fields__})
    assert found.shape == QWEN
    assert found.biases == ("q_proj", "k_proj", "v_proj")
    assert not found.departs


def test_an_undeclared_shape_leaves_stored_profiles_as_they_were():
    """Experiments run before and after shapes were declared must still join in one paper."""
    assert set(profiles.load("quick").as_dict()["model"]) == {
        *("kind", "name", "distribution", "version", "sha256", "repository", "revision", "path", "family"),
        *("layers", "width"),
    }
    assert profiles.load("qwen2.5-7b").as_dict()["model"]["key_width"] == 512


def test_free_memory_is_a_number_of_bytes():
    assert 1e8 < memory.free("cpu") <= memory.installed() < 1e14
    assert memory.capacity("cpu") == float("inf")


# ------------------------------------------------------------------------------------------------ the hub


def raising(error):
    def ask(*_arguments, **_options):
        raise error

    return ask


def answered(status, name):
    """One of the hub's own errors, made as it makes them."""
    import httpx2
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://huggingface.co")
    return getattr(errors, name)(name, response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: ConnectionError("no route to host"), r"could not be reached.*no route to host.*check the network"),
        (lambda: answered(401, "GatedRepoError"), r"only to those who accepted its terms.*hf auth login"),
        (lambda: answered(404, "RepositoryNotFoundError"), r"The hub has no model owner/name, or it is private"),
        (lambda: answered(404, "RevisionNotFoundError"), r"not this revision.*give a commit"),
    ],
)
def test_the_hub_says_no_in_one_sentence(monkeypatch, error, said):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error()))
    with pytest.raises(UserError, match=said) as caught:
        hub.look("owner/name", "0" * 40, models.SAFE_FILES)
    assert "\n" not in str(caught.value)


def test_what_is_to_be_fetched_is_counted(monkeypatch):
    import huggingface_hub

    files = [SimpleNamespace(rfilename=name, size=2**20) for name in ("a.safetensors", "b.json", "c.bin", "d.md")]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_a, **_o: SimpleNamespace(siblings=files))
    assert hub.look("owner/name", "0" * 40, models.SAFE_FILES).megabytes == 2


def test_a_snapshot_is_cached_once_all_its_weights_are_there(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    assert hub.cached("owner/name", "0" * 40) is None
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_text("")
    assert hub.cached("owner/name", "0" * 40) is None
    (folder / "model-2.safetensors").write_text("")
    assert hub.cached("owner/name", "0" * 40) == folder


# ------------------------------------------------------------------------------------------------ the plan


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """No network, and a hub cache of the test's own."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(ConnectionError("no route to host")))
    monkeypatch.setattr(memory, "free", lambda _device: 16 * GB)


def test_the_plan_of_seven_billion_says_all_that_stands_in_the_way(unreachable, capsys):
    assert cli.main(["plan", "--profile", "qwen2.5-7b", "--only", "00"]) == 2
    told = capsys.readouterr()
    assert "from the 7.62 billion parameters and the shape that the profile declares" in told.out
    assert "merging a change and checking the merge" in told.out
    assert "The hub could not be reached for Qwen/Qwen2.5-7B-Instruct" in told.err
    assert "Merging a change and checking the merge needs about" in told.err
    assert "16 GB of RAM are free" in told.err
    assert "Traceback" not in told.err
    assert told.err.count("hub could not be reached") == 1
    assert cli.main(["plan", "--profile", "qwen2.5-7b", "--only", "00", "--anyway"]) == 0


def test_too_little_disk_for_the_download_is_said(unreachable, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 10**12, 9 * 10**9))
    assert cli.main(["plan", "--profile", "qwen2.5-7b", "--only", "00"]) == 2
    assert "set HF_HOME to a folder on a larger disk" in capsys.readouterr().err


def test_nothing_stands_in_the_way_of_what_is_there(tmp_path):
    """A run that needs no stage asks for no memory."""
    profile = profiles.load("qwen2.5-7b")
    source = Study(profile).source
    found = requirements.check(profile, source, [], Store(tmp_path), dataclasses.replace(H100, device="cpu"))
    assert found.obstacles == []


def test_the_plan_prints_the_card_of_a_folder(tmp_path, capsys):
    folder = families.write(tmp_path / "tiny-gemma2", "gemma2")
    assert cli.main(["plan", "--profile", "smoke", "--only", "00", "--model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "Gemma2ForCausalLM" in told
    assert "the library's, for post_feedforward_layernorm" in told
    assert "at the start of the first user turn, since the template has no system role" in told
    assert "memory        estimated from the model's configuration" in told


def test_a_folder_that_does_not_fit_is_refused_before_anything_runs(tmp_path, capsys):
    from safetensors.torch import save_file

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    folder = families.describe(tmp_path / "phi", "Phi3", **small, pad_token_id=0)
    save_file({"x": torch.zeros(2, 3)}, folder / "model.safetensors")
    assert cli.main(["reproduce", "--profile", "smoke", "--only", "00", "--model", str(folder)]) == 2
    assert "Phi3ForCausalLM has no separate q_proj" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*/*/manifest.json"))


def test_several_turns_that_a_template_rewrites_are_an_obstacle(tmp_path):
    folder = families.write(tmp_path / "tiny-qwen3", "qwen3")
    profile = dataclasses.replace(profiles.load("smoke"), seeds=(0,))
    study = Study(profile, model=str(folder))
    turns = dataclasses.replace(study.profile, corpora=dataclasses.replace(profile.corpora, benign="ultrachat"))
    for chosen, count in ((study.profile, 0), (turns, 1)):
        on_cpu = dataclasses.replace(H100, device="cpu")
        found = requirements.check(chosen, study.source, [], Store(tmp_path / "store"), on_cpu)
        assert len(found.obstacles) == count


def test_a_revision_that_can_move_is_refused():
    with pytest.raises(UserError, match=r"'main' can mean another model tomorrow. Give the commit"):
        Study(profiles.load("smoke"), model="owner/name@main")
    study = Study(profiles.load("smoke"), model=f"owner/name@{'a' * 40}")
    assert study.source == models.HubModel("owner/name", "a" * 40)


def test_the_size_of_a_local_model_is_read_off_its_headers(tmp_path):
    folder = families.write(tmp_path / "tiny-olmo2", "olmo2")
    study = Study(profiles.load("smoke"), model=str(folder))
    assert study.profile.model.parameters == sum(
        tensor.numel() for path in folder.glob("*.safetensors") for tensor in _tensors(path)
    )
    seven = dataclasses.replace(study.profile.model, parameters=7_000_000_000)
    assert progress.parameters_ratio(seven) == pytest.approx(7e9 / 135e6)
    (folder / "model.safetensors").write_bytes(b"12345678nonsense")
    with pytest.raises(UserError, match="no safetensors file"):
        models.parameters_in(folder)


def _tensors(path):
    from safetensors.torch import load_file

    return load_file(path).values()


def test_adapters_of_a_large_model_take_more_disk():
    """By hand: an adapter of rank 32 on Qwen2.5-7B has 32 x 28 x (9 x 3584 + 2 x 512 + 3 x 18944) fp32 numbers."""
    study = Study(profiles.load("qwen2.5-7b"))
    stage = study.sft("bad_legal", seed=0).last_change
    exact = 4 * 32 * 28 * (9 * 3584 + 2 * 512 + 3 * 18944) / 1e6
    ratio = progress.parameters_ratio(study.profile.model)
    assert progress.megabytes_of(stage, ratio) == pytest.approx(exact, rel=0.15)
    assert progress.megabytes_of(stage, 0.1) == stage.work().megabytes


# ------------------------------------------------------------------------------------------------ record and paper


def test_the_record_carries_the_card_and_parts_must_agree(tmp_path):
    folder = families.write(tmp_path / "tiny-gemma2", "gemma2")
    profile = dataclasses.replace(profiles.load("smoke"), seeds=(0,))
    study = Study(profile, lab=Lab(Store(tmp_path / "store")), model=str(folder))
    record = study.run(Design(), tmp_path / "results").record
    assert record["card"]["chat"]["carried"] == "folded"
    assert record["card"]["thirds"] == {"early": [0, 1], "mid": [2, 2], "late": [3, 3]}
    stored = json.loads((tmp_path / "results" / "record.json").read_text())
    assert stored["card"] == json.loads(json.dumps(record["card"]))
    other = json.loads(json.dumps({**record, "profile": {**record["profile"], "seeds": [1]}}))
    mine = Results({}, json.loads(json.dumps(record)))
    assert evidence.combine([mine, Results({}, other)]).record["card"] == stored["card"]
    other["card"]["chat"]["carried"] = "role"
    with pytest.raises(UserError, match="ways of writing a chat"):
        evidence.combine([mine, Results({}, other)])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "explicit system message, so that no chat template can slip in its own."),
        ({"carried": "role"}, "explicit system message, so that no chat template can slip in its own."),
        ({"carried": "turn"}, "this model's template writes it into the first user turn."),
        ({"carried": "folded"}, "has no system role: the persona's text stands at the start of the first user turn"),
        ({"carried": "role", "dated": True}, "tells the model a date, which is held fixed."),
        ({"carried": "role", "thinks": True}, "think before it answers; that is switched off."),
    ],
)
def test_the_paper_says_how_a_persona_is_carried(tmp_path, told, said):
    """From an experiment's file to the index that the method paragraph prints."""
    content = {"experiment": "00_replication", "estimates": {}, "claims": [], "gates": [], "profile": {}}
    content |= {"provenance": {}, "stages": {}, "values": {}} | ({"card": {"chat": told}} if told else {})
    (tmp_path / "00_replication.json").write_text(json.dumps(content))
    assert said in prose.write_index(tmp_path)["carried"]
    assert "#smart(index.carried)" in (paths.repository() / "paper" / "main.typ").read_text()
