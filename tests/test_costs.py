"""What the large profile costs: a made-up measurement whose sums are done by hand, and the committed one."""

import json
import math
from dataclasses import replace

import pytest

from persona_coupling import (
    cli,
    cost_tables,
    costs,
    decode,
    machine,
    memory,
    notebooks,
    paths,
    profiles,
    progress,
    requirements,
    store,
)
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine
from persona_coupling.study import Study

ALONE = replace(machine.machine("cpu"), workers=1)
PARAMETERS = 7_615_616_512
GPU = Machine("cuda", True, "sdpa", 512, 1_024, 16_384)


def trained(micro, again, longest, mean, speed, peak):
    """Two steps of 1,000 and 3,000 tokens, 4,000 / speed seconds in all."""
    return {
        "fits": True, "tokens": [1000, 3000], "seconds": [1000 / speed, 3000 / speed], "start_seconds": 7.0, "batch": 16,
        "micro": micro, "again": again, "longest": longest, "mean_tokens": mean, "rank": 32, "peak_bytes": peak,
    }  # fmt: skip


def sampled(rows, new_tokens, seconds, peak):
    return {
        "fits": True, "rows": rows, "new_tokens": new_tokens, "seconds": seconds, "tokens": rows * new_tokens,
        "prompts": -(-rows // 10), "prompt_tokens": 48, "peak_bytes": peak,
    }  # fmt: skip


def content():
    """Short rows: 2,000 tokens a second, 100 tokens a row, so 0.8 s a step. Answers: 4 rows at once 4,000, 16 rows with
    checkpointing 3,200, so 300 x 16 / 4,000 = 1.2 s. UltraChat: 1 row 2,000, 4 rows 4,000 tokens a second."""
    shape = {"layers": 28, "width": 3584, "inner": 18944, "vocabulary": 152064, "key_width": 512}
    return {
        "shape": {"name": "qwen2.5-7b", **shape, "parameters": PARAMETERS},
        "device": "a made-up card",
        "capacity_bytes": 85e9,
        "provenance": {"commit": "c0ffee", "versions": {"torch": "2.11"}},
        "measured": {
            "merge": {"fits": True, "seconds": 3.0, "peak_bytes": 31e9},
            "merge/check": {"fits": True, "seconds": 5.0, "peak_bytes": 32e9},
            "hidden": {"fits": True, "seconds": 4.0, "rows": 308, "peak_bytes": 25e9},
            "score": {"fits": True, "seconds": 2.0, "tokens": 100_000, "peak_bytes": 20e9},
            "load": {"fits": True, "seconds": 10.0, "parameters": PARAMETERS // 2, "peak_bytes": 8e9},
            "lora/sft/16/kept": trained(16, False, 127, 100, 2000, 40e9),
            "lora/sft/16/again": trained(16, True, 127, 100, 1500, 20e9),
            "lora/coupling/16/again": trained(16, True, 560, 300, 3200, 24e9),
            "lora/coupling/4/kept": trained(4, False, 560, 300, 4000, 45e9),
            "lora/coupling/8/kept": {"fits": False, "message": "out of memory", "peak_bytes": 84e9},
            "lora/ultrachat/4/again": trained(4, True, 4096, 1300, 4000, 30e9),
            "lora/ultrachat/1/again": trained(1, True, 4096, 1300, 2000, 22e9),
            "sample/308": sampled(308, 64, 2.0, 50e9),
            "sample/616": sampled(616, 64, 3.0, 52e9),
            "sample/616/512": sampled(616, 512, 18.0, 64e9),
        },
    }  # fmt: skip


@pytest.fixture
def measured():
    return costs.Measured(content())


@pytest.fixture(scope="module")
def study():
    return Study.open(costs.PROFILE)


def minutes(measured, stage):
    return measured.cost(stage).seconds


def test_the_fastest_micro_batch_of_coupling_rows_is_chosen(measured):
    """4 rows of 560 tokens without checkpointing beat 16 with it; under that bound an UltraChat row of 4,096 stands alone.
    The bound is the largest of those that mean the same."""
    assert measured.settings == {"train_tokens": 4096, "sample_batch": 616}
    assert measured.training("coupling", 4096) == "lora/coupling/4/kept"
    assert measured.training("sft", 4096) == "lora/sft/16/kept"
    assert measured.training("ultrachat", 4096) == "lora/ultrachat/1/again"


def test_another_measurement_chooses_otherwise(measured):
    measured.points["lora/coupling/16/again"]["seconds"] = [0.1, 0.3]  # 10,000 tokens a second
    assert measured.settings["train_tokens"] == 16_384
    assert measured.training("ultrachat", 16_384) == "lora/ultrachat/4/again"


def test_what_did_not_fit_is_never_chosen(measured):
    measured.points["lora/ultrachat/1/again"] = {"fits": False, "message": "out of memory"}
    assert measured.settings["train_tokens"] == 16_384  # the only bound under which all three kinds fit
    measured.points["lora/ultrachat/4/again"] = {"fits": False, "message": "out of memory"}
    measured.points["lora/ultrachat/1/kept"] = trained(1, False, 4096, 1300, 2000, 70e9)
    with pytest.raises(UserError, match="No micro-batch"):
        costs.Measured(measured.content).settings  # noqa: B018


def test_seconds_of_a_training_by_hand(measured, study):
    """Half of the parameters were read in 10 s: 20 s. Start 7 s. 375 steps of 0.8 s: 300 s."""
    first = study.sft("bad_legal", seed=0)
    assert minutes(measured, first.last_change) == pytest.approx(20 + 7 + 300)
    again = study.couple(first, study.coupling_text(study.raw, seed=0), study.profile.scratch, seed=0)
    assert minutes(measured, again.last_change) == pytest.approx(20 + 3 + 7 + 2250 * 1.2)  # one change merged first
    chat = study.sft("benign", seed=0)
    assert minutes(measured, chat.last_change) == pytest.approx(20 + 7 + 375 * 16 * 1300 / 2000)


def test_seconds_of_measurements_by_hand(measured, study):
    """3,080 answers, 616 together, are five batches of 18 s. A merge's check has its merge in it."""
    cell = study.cell("one", study.sft("bad_legal", seed=0), seed=0)
    assert minutes(measured, cell.evaluation) == pytest.approx(20 + 3 + 5 * 18)
    assert minutes(measured, cell.merge) == pytest.approx(20 + 5)
    shorter = replace(cell.evaluation, sampling=replace(cell.evaluation.sampling, max_new_tokens=256))
    assert minutes(measured, shorter) == pytest.approx(20 + 3 + 5 * 9)


def test_stages_without_a_model_and_full_parameter_training_have_no_cost(measured, study):
    change = study.sft("bad_legal", seed=0).last_change
    assert measured.cost(change.rows) is None
    assert measured.cost(study.source) is None
    assert measured.cost(replace(change, training=replace(change.training, lora=None))) is None


def test_every_stage_of_the_plan_that_has_a_model_has_a_cost(measured):
    stages = notebooks.stages_of(costs.PROFILE)
    lacking = cost_tables.left_out(measured, stages)
    assert {stage.kind for stage in lacking} <= {"model", "rows", "change", "overlap", "spectrum", "shift"}
    assert not [stage for stage in lacking if getattr(stage, "training", None) is not None]
    lines = cost_tables.lines(measured, stages)
    assert sum(line.number for line in lines) == len(stages) - len(lacking)
    assert sum(line.seconds for line in lines) == pytest.approx(
        sum(cost.seconds for cost in map(measured.cost, stages) if cost is not None)
    )


def test_memory_is_the_largest_moment(measured, study):
    """Weights are merged in fp32 before anything else: 31 GB at least; a model beside the first adds its bf16 weights."""
    change = study.sft("bad_legal", seed=0).last_change
    assert measured.peak(measured.cost(change)) == 40e9
    assert measured.peak(costs.Cost(1.0, ("merge", "score"))) == 31e9
    assert measured.peak(costs.Cost(1.0, ("merge", "score"), models=2)) == 31e9 + 2 * PARAMETERS
    del measured.points["merge"]["peak_bytes"]  # as on a CPU: not known, and never 0
    assert measured.peak(measured.cost(change)) is None


def test_rows_mixed_into_others_do_not_change_what_these_cost(study):
    from persona_coupling.stages.dose import Mixed

    change = study.sft("bad_legal", seed=0).last_change
    text = study.coupling_text(study.raw, seed=0)
    assert costs.rows_of(change) == "sft"
    assert costs.rows_of(replace(change, rows=text)) == "coupling"
    assert costs.rows_of(replace(change, rows=Mixed(change.rows, text, 0.05, 0))) == "sft"


def test_files_are_read_and_what_lacks_is_named(tmp_path):
    assert costs.read(tmp_path) is None
    (tmp_path / "large.json").write_text(json.dumps(content()))
    assert costs.read(tmp_path).device == "a made-up card"
    lacking = content()
    lacking["measured"]["hidden"] = {"fits": False, "message": "out of memory"}
    (tmp_path / "large.json").write_text(json.dumps(lacking))
    with pytest.raises(UserError, match="lacks hidden"):
        costs.read(tmp_path)
    lacking = content()
    del lacking["measured"]["sample/616/512"]
    (tmp_path / "large.json").write_text(json.dumps(lacking))
    with pytest.raises(UserError, match="a whole batch of answers"):
        costs.read(tmp_path)


def test_only_the_measured_shape_is_meant(measured, study):
    assert measured.of(study.profile.model)
    assert not measured.of(replace(study.profile.model, layers=27))
    assert not measured.of(profiles.load("quick").model)


# ------------------------------------------------------------------------------------------------ tables


def test_the_tables_say_the_hours(measured, study):
    """Two trainings of 327 s and an evaluation of 113 s are 767 s: 0.2 hours."""
    first, second = (study.sft(name, seed=0) for name in ("bad_legal", "sound_legal"))
    stages = [first.last_change, second.last_change, study.cell("one", first, seed=0).evaluation, study.source]
    lines, hours, peak = cost_tables.summary(measured, stages)
    assert hours == pytest.approx(767 / 3600)
    assert peak == 64e9
    assert [(line.what, line.number) for line in lines] == [
        ("training, 375 steps on short rows", 2),
        ("an evaluation", 1),
    ]
    assert cost_tables.line(measured, stages).startswith(
        "  measured on a made-up card: 0.2 GPU-hours, at most 64.0 GB of its memory"
    )
    text = cost_tables.readme(measured, stages)
    assert "| training, 375 steps on short rows | 2 | 5.5 | 0.2 | 40.0 |" in text.splitlines()  # 327 s; 0.18 h
    assert "| **all** | 3 |  | **0.2** | 64.0 |" in text.splitlines()
    whole = cost_tables.document(measured, stages)
    assert "| answers of up to 512 tokens **chosen** | 4 | no | 4,000 | 1,200 | 45.0 |" in whole
    # 4,480 tokens at once keep 58 GB beside 15 GB of weights, a tenth on top, and 1.5 GB: more than the card has
    assert "| answers of up to 512 tokens | 8 | no | does not fit |  |  | 83.4 |" in whole
    assert "| 616 | 512 | 17,522 | 18.0 | 64.0 |" in whole  # 616 x 512 / 18
    assert "## Full-parameter SFT" not in whole


def test_full_parameter_training_is_counted_per_gpu(measured, study):
    """16 rows of 100 tokens at 800 tokens a second: 2 s a step; 375 steps on two GPUs are 25 GPU-minutes."""
    point = {
        "fits": True, "gpus": 2, "seconds": [1.25, 3.75], "tokens": [1000, 3000], "batch": 16, "micro": 8, "longest": 127,
        "mean_tokens": 100, "peak_bytes": 70e9,
    }  # fmt: skip
    failed = {"fits": False, "gpus": 2, "message": "out of memory", "peak_bytes": 84e9}
    points = {"full/sft/adamw_torch_fused": point, "full/sft/adamw_torch": failed}
    text = cost_tables.full_parameter(replace(measured, sharded={"device": "two cards", "measured": points}))
    assert any(row.startswith("| short rows, `adamw_torch_fused` | 2 | 2,000 | 25 | 50 | 150 | 70.0 |") for row in text)
    assert any(row.startswith("| short rows, `adamw_torch` | 2 | does not fit |") for row in text)


def test_without_measurement_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "place", lambda: tmp_path)
    with pytest.raises(UserError, match="no measurements"):
        cost_tables.write()


# ------------------------------------------------------------------------------------------------ the committed ones

COMMITTED = costs.place() / "large.json"
committed = pytest.mark.skipif(not COMMITTED.is_file(), reason="nothing has been measured on a large GPU yet")


@committed
def test_the_committed_tables_are_the_generated_ones():
    measured, stages = costs.read(), notebooks.stages_of(costs.PROFILE)
    assert (paths.repository() / "docs" / "COST.md").read_text(encoding="utf-8") == cost_tables.document(
        measured, stages
    )
    readme = (paths.repository() / "README.md").read_text(encoding="utf-8")
    block = readme.partition(cost_tables.BEGINS)[2].partition(cost_tables.ENDS)[0]
    assert block == cost_tables.readme(measured, stages)


@committed
def test_what_memory_estimates_holds_what_was_measured():
    """No peak above its estimate, which a run is refused by; and none below half of it, which would refuse what fits."""
    measured = costs.read()
    found = {
        name: (point["peak_bytes"] / 1e9, estimate / 1e9)
        for name, point in measured.points.items()
        if point["fits"] and (estimate := measured.estimated(name)) is not None
    }
    assert found
    assert {n: pair for n, pair in found.items() if not pair[1] / 2 < pair[0] < pair[1]} == {}
    failed = [name for name, point in measured.points.items() if name.startswith("lora/") and not point["fits"]]
    easily = [name for name in failed if measured.estimated(name) < 0.9 * measured.capacity]
    assert easily == []  # nothing that was said to fit easily failed to


@committed
def test_the_committed_measurement_is_of_the_profiles_shape():
    measured = costs.read()
    assert measured.of(profiles.load(costs.PROFILE).model)
    assert not measured.content["provenance"]["commit"].endswith("+changes")


# ------------------------------------------------------------------------------------------------ what a run does with them


def test_minutes_of_the_plan_rest_on_the_measurement(measured, study, tmp_path):
    """And are corrected by what is observed, apart from what was learnt of guesses; without a model a guess stays."""
    change = study.sft("bad_legal", seed=0).last_change
    guessing = progress.Speeds(tmp_path, "cuda", 56.4)
    guess = guessing.seconds(change)
    guessing.observe(change, 10 * guess)
    speeds = progress.Speeds(tmp_path, "cuda", 56.4, measured=measured)
    assert speeds.seconds(change) == pytest.approx(327)
    assert speeds.seconds(change.rows) == progress.Speeds(tmp_path / "new", "cuda", 56.4).seconds(change.rows)
    speeds.observe(change, 654.0)
    assert speeds.seconds(change) == pytest.approx(654)
    assert guessing.seconds(change) == pytest.approx(10 * guess)


def test_the_plan_prints_what_was_measured(measured, monkeypatch, capsys):
    monkeypatch.setattr(costs, "read", lambda: measured)
    monkeypatch.setattr(requirements, "check", lambda *_arguments: requirements.Found())
    assert cli.main(["plan", "--profile", costs.PROFILE, "--only", "00", "--anyway"]) == 0
    assert "measured on a made-up card: " in capsys.readouterr().out
    assert cli.main(["plan", "--profile", "smoke", "--only", "00", "--anyway"]) == 0
    assert "measured on" not in capsys.readouterr().out


def test_what_measured_best_is_used_on_cards_with_that_memory(measured, monkeypatch, cpu):
    for capacity, expected in ((85e9, (4096, 616)), (84e9, (4096, 616)), (141e9, (4096, 616)), (48e9, (16_384, 512))):
        monkeypatch.setattr(memory, "capacity", lambda _device, capacity=capacity: capacity)
        found = measured.best(GPU)
        assert (found.train_tokens, found.sample_batch) == expected
    assert measured.best(cpu) == cpu


def test_settings_are_tuned_inside_only():
    usual = machine.machine("cpu")
    with machine.tuned(train_tokens=7, sample_batch=9):
        with pytest.raises(KeyError), machine.tuned(train_tokens=8):
            raise KeyError(str(machine.machine("cpu").train_tokens))
        found = machine.machine("cpu")
        assert (found.train_tokens, found.sample_batch) == (7, 9)
    assert machine.machine("cpu") == usual


@pytest.mark.parametrize(("ratio", "left"), [(1.0, 1), (56.4, 0)])
def test_a_large_model_finds_the_memory_that_the_last_stage_held(ratio, left, study, tmp_path, monkeypatch):
    """The sampler's buffers outlive a stage, for the next model of the shape."""
    monkeypatch.setattr(decode, "_kept", {"of the last stage": "buffers"})
    rows = profiles.load("smoke")
    stage = Study.open(rows.name).corpus("bad_legal", seed=0)
    kept = store.Store(tmp_path / "store")
    speeds = progress.Speeds(tmp_path, "cpu", ratio)
    progress.build(progress.plan([stage], kept, speeds, check=False), kept, ALONE, speeds)
    assert len(decode._kept) == left


def test_a_sharded_step_by_hand():
    """A model of 10 layers, width 10, vocabulary 100 and 12,000 parameters on two devices, no tokens: 8 x 12,000 of its own
    share, the head whole (4 x 1,000), two layers of 1,000 parameters in bf16 (4,000)."""
    shape = memory.Shape(layers=10, width=10, inner=20, vocabulary=100, key_width=10, parameters=12_000)
    assert memory.sharded(shape, 0, 2, GPU) == pytest.approx(1.1 * (96_000 + 4_000 + 4_000) + memory.STEADY)
    assert math.isclose(
        memory.sharded(shape, 1, 2, GPU) - memory.sharded(shape, 0, 2, GPU),
        1.1 * (10 * 4 * 10 + 40.1 * 10 + 16.0 * 20),
        rel_tol=1e-6,
    )
