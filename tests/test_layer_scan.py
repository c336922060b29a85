"""The switch and the scan against checkpoints merged from scratch: the same weights, the same log-probabilities."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from persona_coupling import adapters, layerwise, models, questions, stages
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.models import TinyModel
from persona_coupling.stages import Evaluate
from persona_coupling.stages.layers import LayerScan
from persona_coupling.train import Lora, Training


@pytest.fixture(scope="module", params=[("llama", 3), ("qwen2", 4)], ids=["llama, 3 layers", "qwen2, 4 layers"])
def parts(request, planted):
    """A raw model with an SFT change and an adapter, in two families and depths."""
    family, depth = request.param
    source = TinyModel(family, depth, 32, 0)
    return Checkpoint(source), planted(source, seed=1), planted(source, seed=2)


def switch_of(parts, lab):
    raw, change, adapter = parts
    model = raw.merge(adapter).load(lab)[0]
    changed = raw.merge(change).merge(adapter).load(lab)[0]
    touched = set(adapters.read_change(lab.folder(change)))
    return model, layerwise.Switch(model, changed, touched)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_switched_model_is_the_merged_checkpoint_bit_for_bit_and_comes_back(parts, lab, monkeypatch, bf16):
    monkeypatch.setattr("persona_coupling.machine.cpu_has_fast_bf16", lambda: bf16)
    raw, change, adapter = parts
    model, switch = switch_of(parts, lab)
    assert model.dtype is (torch.bfloat16 if bf16 else torch.float32)
    before = layerwise.fingerprint(model)
    for layers in ({0}, {1, 2}, set(range(switch.depth))):
        merged = raw.merge(change, layers=sorted(layers)).merge(adapter).load(lab)[0]
        with switch.on(layers) as switched:
            assert switched == len(models.MODULES) * len(layers)
            assert layerwise.fingerprint(model) == layerwise.fingerprint(merged) != before
        assert layerwise.fingerprint(model) == before


def test_a_switch_comes_back_after_an_error(parts, lab):
    model, switch = switch_of(parts, lab)
    before = layerwise.fingerprint(model)
    with pytest.raises(RuntimeError, match="in the middle"), switch.on({0, 1}):
        raise RuntimeError("in the middle")
    assert layerwise.fingerprint(model) == before


def test_a_fingerprint_sees_one_bit(parts, lab):
    """Positive control of every equality above."""
    model = parts[0].load(lab)[0]
    before = layerwise.fingerprint(model)
    next(model.parameters()).detach().view(torch.uint8)[0, 0] ^= 1
    assert layerwise.fingerprint(model) != before


def test_changes_that_a_scan_over_layers_would_misread_are_refused(parts, lab):
    raw, change, _ = parts
    touched = set(adapters.read_change(lab.folder(change)))

    def fresh():
        return raw.load(lab)[0]

    changed = raw.merge(change).load(lab)[0]
    layerwise.Switch(fresh(), changed, touched)
    with pytest.raises(GuardError, match="changes no weight"):
        layerwise.Switch(fresh(), fresh(), touched)
    with pytest.raises(GuardError, match="a change of layers alone"):  # a module that differs and was not announced
        layerwise.Switch(fresh(), changed, set(list(touched)[1:]))
    with torch.no_grad():
        changed.model.norm.weight += 1.0
    with pytest.raises(GuardError, match=r"model\.norm\.weight"):
        layerwise.Switch(fresh(), changed, {*touched, "model.norm"})
    other = Checkpoint(dataclasses.replace(raw.source, layers=5)).load(lab)[0]
    with pytest.raises(GuardError, match="different parameters"):
        layerwise.Switch(fresh(), other, touched)


def test_a_layer_without_the_change_cannot_be_switched(parts, lab):
    _, switch = switch_of(parts, lab)
    with pytest.raises(GuardError, match="no weight of layer"), switch.on({0, 99}):
        pass


def scan_of(parts, **changes):
    made = LayerScan(*parts, 1, layerwise.MODES, ("villain", "librarian"), 1, 1, "Be brief.")
    return dataclasses.replace(made, **changes)


def test_the_scan_measures_what_evaluation_measures_on_merged_checkpoints(parts, lab, fp32):
    """Oracle: the `fixed` table of an evaluation of the checkpoint with the change merged into those layers."""
    raw, change, adapter = parts
    found = pd.read_parquet(lab.folder(scan_of(parts)) / "scan.parquet")
    depth = found["stop"].max()
    assert list(found.columns) == ["mode", "start", "stop", "persona", "question", "logprob", "after_break"]
    assert set(found["mode"]) == set(layerwise.MODES)
    assert len(found) == (2 * depth + 2 * (depth + 1)) * 2 * 2
    keys = ["persona", "question"]
    everyone = range(depth)
    for mode, start, stop, layers in (
        ("only", 1, 2, [1]),
        ("without", 1, 2, [n for n in everyone if n != 1]),
        ("from_bottom", 0, 2, [0, 1]),
        ("from_top", 2, depth, list(everyone)[2:]),
        ("from_bottom", 0, 0, None),
        ("from_top", 0, depth, list(everyone)),
    ):
        checkpoint = (raw if layers is None else raw.merge(change, layers=layers)).merge(adapter)
        evaluation = Evaluate(checkpoint, 1, 1, 1, "Be brief.", stages_sampling(), 0)
        fixed = pd.read_parquet(lab.folder(evaluation) / "fixed.parquet").set_index(keys)["logprob"]
        here = found[(found["mode"] == mode) & (found["start"] == start) & (found["stop"] == stop)]
        here = here.set_index(keys)["logprob"]
        assert len(here) == 4
        assert here.to_numpy() == pytest.approx(fixed[here.index].to_numpy(), abs=2e-4), mode


def stages_sampling():
    from persona_coupling.generate import Sampling

    return Sampling(1.0, 0.95, 2)


def test_sets_of_layers_that_differ_are_measured_differently(parts, lab, fp32):
    """Positive control: the scan is not one number many times over; equal sets of layers are equal to the last bit."""
    found = pd.read_parquet(lab.folder(scan_of(parts)) / "scan.parquet")
    depth = found["stop"].max()
    villain = found[found["persona"] == "villain"].groupby(["mode", "start", "stop"])["logprob"].mean()
    alone = [villain["only", n, n + 1] for n in range(depth)]
    assert len(set(alone)) == depth
    assert villain["from_bottom", 0, 1] == alone[0]
    assert villain["from_top", depth - 1, depth] == alone[-1]
    assert villain["from_bottom", 0, depth] == villain["from_top", 0, depth] != villain["from_bottom", 0, 0]


def test_the_scan_takes_any_stride_and_a_trained_change(tiny, lab, planted):
    training = Training(2, 2, 1e-2, 0.05, 0.01, "completion", 8, Lora(2, 4, 0.0, models.MODULES))
    tuned = Checkpoint(tiny).fine_tune(stages.authored("benign", 4, maximum_words=40), training, seed=0)
    scan = scan_of((Checkpoint(tiny), tuned.last_change, planted(tiny)), stride=2, modes=("only", "from_top"))
    found = pd.read_parquet(lab.folder(scan) / "scan.parquet")
    steps = found[["mode", "start", "stop"]].drop_duplicates().itertuples(index=False)
    assert sorted(map(tuple, steps)) == [
        ("from_top", 0, 3), ("from_top", 2, 3), ("from_top", 3, 3), ("only", 0, 2), ("only", 2, 3),
    ]  # fmt: skip
    assert set(found["question"]) == {q.id for q in questions.eval_questions(1, 1)}


def test_an_unknown_mode_is_refused_when_the_run_is_planned(parts):
    with pytest.raises(UserError, match="sideways"):
        scan_of(parts, modes=("only", "sideways")).work()
    assert scan_of(parts, stride=3).work().scored < scan_of(parts).work().scored
