"""The benchmark of a large model, rehearsed at a tiny size: weights, rows, points, and what a killed run goes on with."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from persona_coupling import bench_large, bench_material, bench_steps, checkpoints, memory, models, profiles, train
from persona_coupling.errors import GuardError, UserError

TINY = bench_material.size_of("tiny")
QWEN = bench_material.size_of("qwen2.5-7b")


# ------------------------------------------------------------------------------------------------ what is drawn


def test_a_drawn_model_computes_what_an_ordinary_one_of_its_weights_does():
    """Nothing is left as it was on the meta device: transformers' own construction, given the weights, agrees."""
    from transformers import Qwen2ForCausalLM

    drawn = bench_material.random_model(TINY.model, dtype=torch.float32, device="cpu", attention="eager")
    ordinary = Qwen2ForCausalLM(bench_material.config_of(TINY.model)).eval()
    ordinary.load_state_dict(drawn.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(drawn(input_ids=ids).logits, ordinary(input_ids=ids).logits)
    assert float(drawn.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_the_measured_shape_is_the_profiles():
    """Counted by transformers from the configuration, not from the profile's own number."""
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(bench_material.config_of(QWEN.model))
    assert model.num_parameters() == profiles.load("qwen2.5-7b").model.parameters == 7_615_616_512
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (28, 4)


def test_sharpened_logits_have_the_spread_asked_for():
    model = bench_material.random_model(TINY.model, dtype=torch.float32, device="cpu", attention="eager", sharpness=6.0)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 200)[None]).logits
    assert float(logits.std()) == pytest.approx(6.0, rel=0.05)


def test_a_profile_without_a_shape_is_refused():
    with pytest.raises(UserError, match="declares no shape"):
        bench_material.size_of("quick")


def test_rows_are_as_long_as_is_said():
    """UltraChat: 1,300 tokens on average, 4,096 at most."""
    found = {kind: bench_material.lengths(kind, QWEN) for kind in bench_large.TRAINED}
    assert all(spread == sorted(spread) and len(spread) == 16 * train.WINDOW for spread in found.values())
    assert (min(found["sft"]), max(found["sft"])) == (72, 127)
    assert max(found["coupling"]) == 560
    assert max(found["ultrachat"]) == 4_096
    assert np.mean(found["ultrachat"]) == pytest.approx(1_300, rel=0.03)


def test_the_longest_batch_comes_first_and_is_not_timed():
    window = bench_material.lengths("coupling", QWEN)
    groups = bench_material.batches("coupling", QWEN, 3, 16)
    assert groups[0] == window[-16:]
    assert [window.index(group[0]) // 16 for group in groups[1:]] == [1, 4, 6]
    rows = bench_material.rows_of("coupling", groups[1:2], 1_000)
    assert [len(ids) for ids, _ in rows] == groups[1]
    assert {sum(label != train.IGNORED for label in labels) for _, labels in rows} == {32}


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(("micro", "again"), [(16, False), (4, True)])
def test_steps_are_those_asked_for(cpu, micro, again):
    values = profiles.load("qwen2.5-7b").sft
    wanted = bench_material.batches("sft", TINY, 2, values.batch)
    settings = bench_steps.training(values, len(wanted), train.Lora(2, 4, 0.05, models.MODULES))
    model = bench_material.random_model(TINY.model, dtype=torch.float32, device="cpu", attention="eager")
    seen = []
    found = bench_steps.steps(
        model, "sft", wanted, settings, micro, again, cpu, 1_024, adjust=lambda trainer: seen.append(trainer.args)
    )
    assert (seen[0].per_device_train_batch_size, seen[0].gradient_checkpointing) == (micro, again)
    assert seen[0].gradient_accumulation_steps * micro == values.batch == 16
    assert len(found["seconds"]) == len(found["tokens"]) == 2
    assert found["tokens"] == [sum(group) for group in wanted[1:]]


def test_a_trainer_that_does_otherwise_is_noticed(cpu, monkeypatch):
    values = profiles.load("qwen2.5-7b").sft
    wanted = bench_material.batches("sft", TINY, 2, values.batch)
    settings = bench_steps.training(values, len(wanted), train.Lora(2, 4, 0.05, models.MODULES))
    model = bench_material.random_model(TINY.model, dtype=torch.float32, device="cpu", attention="eager")
    monkeypatch.setattr(train, "micro_batch", lambda *_arguments: 2)
    with pytest.raises(UserError, match="2 rows at once, not 8"):
        bench_steps.steps(model, "sft", wanted, settings, 8, False, cpu, 1_024)


def test_patches_are_undone_after_an_error():
    deciding, reading = memory.checkpoints, checkpoints.load_fp32
    with pytest.raises(KeyError), bench_steps.checkpointing(True):
        raise KeyError(str(memory.checkpoints()))
    with pytest.raises(KeyError), bench_material.drawn_weights("a model"):
        raise KeyError(checkpoints.load_fp32())
    assert (memory.checkpoints, checkpoints.load_fp32) == (deciding, reading)


# ------------------------------------------------------------------------------------------------ points and the record


def bench(arguments, path):
    return bench_large.main(["--shape", "tiny", "--json", str(path), *arguments])


def test_parts_are_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    """What a killed run left is gone on with; a limit of no seconds starts nothing."""
    path = tmp_path / "large.json"
    assert bench(["--what", "merge,score"], path) == 0
    first = json.loads(path.read_text())
    assert list(first["measured"]) == ["merge", "merge/check", "score"]
    assert all(point["fits"] and point["seconds"] > 0 for point in first["measured"].values())
    assert "peak_bytes" not in first["measured"]["merge"]  # not known of a CPU, and never 0
    assert first["shape"]["layers"] == 3
    assert {"commit", "device", "versions"} <= set(first["provenance"])
    monkeypatch.setattr(bench_large.Bench, "merge", lambda _self: pytest.fail("measured again"))
    assert bench(["--what", "merge,hidden", "--seconds", "0"], path) == 0
    assert json.loads(path.read_text()) == first
    assert "not reached" in capsys.readouterr().out
    assert bench(["--what", "hidden"], path) == 0
    assert json.loads(path.read_text())["measured"]["hidden"]["rows"] == 308


def test_sampling_ends_with_whole_answers_of_the_best_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_large, "SAMPLED", (64, 320))
    path = tmp_path / "large.json"
    assert bench(["--what", "sample"], path) == 0
    points = json.loads(path.read_text())["measured"]
    (whole,) = [name for name in points if name.count("/") == 2]
    speeds = {rows: points[f"sample/{rows}"]["rows"] / points[f"sample/{rows}"]["seconds"] for rows in (64, 320)}
    assert whole == f"sample/{max(speeds, key=speeds.get)}/512"
    assert points[whole]["new_tokens"] == 512 // TINY.shrink
    assert points["sample/320"]["rows"] == 320 // TINY.shrink


def test_what_does_not_fit_is_a_result_and_other_errors_are_loud(tmp_path, monkeypatch, capsys):
    def too_large(_self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    def broken(_self):
        raise GuardError("a guard")

    monkeypatch.setattr(bench_large.Bench, "merge", too_large)
    monkeypatch.setattr(bench_large.Bench, "merge_check", broken)
    path = tmp_path / "large.json"
    assert bench(["--what", "merge,load"], path) == 3
    points = json.loads(path.read_text())["measured"]
    assert points["merge"] == {"fits": False, "message": "CUDA out of memory. Tried to allocate 9 GiB."}
    assert "merge/check" not in points
    assert points["load"]["fits"]  # what comes after is measured all the same
    assert "merge/check                failed: GuardError: a guard" in capsys.readouterr().out


def test_the_slowest_batches_are_not_tried_whole():
    grid = {"sample/77": {"fits": True, "rows": 77, "seconds": 1.0}, "sample/154": {"fits": False}}
    grid["sample/308"] = {"fits": True, "rows": 308, "seconds": 2.0}
    assert bench_large.best_first(grid) == [308, 77]


def test_numbers_of_two_shapes_do_not_stand_in_one_file(tmp_path, capsys):
    path = tmp_path / "large.json"
    record = bench_large.Record.open(path, QWEN, "cpu")
    record.keep("merge", {"fits": True, "seconds": 1.0})
    assert bench(["--what", "merge"], path) == 2
    assert "of another shape" in capsys.readouterr().err
    assert bench(["--what", "merges"], tmp_path / "new.json") == 2
    assert "no part merges" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_a_full_parameter_step(tmp_path):
    """On CPUs accelerate shards nothing, so this is the way there and back, not FSDP."""
    path = tmp_path / "large-fsdp.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["persona_coupling.bench_large_fsdp", "--shape", "tiny", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    point = json.loads(path.read_text())["measured"]["full/sft/adamw_torch"]
    assert (point["gpus"], point["batch"], point["micro"], len(point["seconds"])) == (2, 16, 8, 3)
