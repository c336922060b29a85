"""Changes of weights and merges, against PEFT's own unmerged forward and dense products."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_coupling import adapters, checkpoints, merging, models
from persona_coupling.adapters import LowRank
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.machine import Machine
from persona_coupling.store import Stage

pytestmark = pytest.mark.usefixtures("fp32")
IDS = torch.tensor([[1, 50, 300, 12, 999, 400, 7], [5, 6, 7, 8, 9, 10, 11]])


@dataclass(frozen=True)
class Dense(Stage):
    """A dense change of two matrices and a norm."""

    size: float
    kind: ClassVar[str] = "change"

    def build(self, folder, lab):
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "model.layers.1.mlp.up_proj.weight": (64, 32),
            "model.norm.weight": (32,),
            "lm_head.weight": (1024, 32),
        }
        delta = {name: self.size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in delta.items()}, folder / adapters.DENSE)


@pytest.fixture
def change(planted, family):
    return planted(family)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def raw(source, lab):
    return models.load_raw(source, lab, dtype=torch.float32, attention="eager")


def beside(source, stage, lab, keep=lambda _name: True, scale=1.0):
    """Oracle: PEFT's forward with the adapter beside the weights; modules not kept have their B zeroed."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(raw(source, lab), lab.folder(stage)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale if keep(name) else 0.0)
    return logits(model)


def apart(one, other):
    return float((one - other).abs().max())


# ------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("rslora", [True, False])
def test_10_merged_weights_act_as_pefts_unmerged_adapter(family, planted, lab, rslora):
    """Failure 10: both families, rank-stabilised scaling or not."""
    stage = planted(family, rank=3, alpha=5, rslora=rslora)
    merged = logits(Checkpoint(family).merge(stage).load(lab)[0])
    expected = beside(family, stage, lab)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert apart(merged, logits(raw(family, lab))) > 0.02  # positive control: the adapter does something
    assert apart(expected, beside(family, planted(family, rank=3, alpha=5, rslora=not rslora), lab)) > 0.01


@pytest.mark.parametrize(
    ("layers", "modules", "scale"),
    [
        ((0,), None, 1.0),
        ((1, 2), None, 1.0),
        (None, models.ATTENTION, 1.0),
        ((0, 2), ("up_proj",), 1.0),
        (None, None, -0.5),
    ],
)
def test_a_restricted_merge_is_peft_with_the_rest_switched_off(tiny, planted, lab, layers, modules, scale):
    def keep(name):
        layer = int(name.split(".layers.")[1].split(".")[0])
        return (layers is None or layer in layers) and (modules is None or any(f".{m}." in name for m in modules))

    stage = planted(tiny)
    merged = Checkpoint(tiny).merge(stage, layers=layers, modules=modules, scale=scale).load(lab)[0]
    expected = beside(tiny, stage, lab, keep, scale)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert apart(expected, beside(tiny, stage, lab)) > 1e-3


def test_two_merges_add(tiny, planted, lab):
    one, two = planted(tiny, seed=0), planted(tiny, seed=1)
    both = Checkpoint(tiny).merge(one).merge(two).load(lab)[0].state_dict()
    separate = [Checkpoint(tiny).merge(stage).load(lab)[0].state_dict() for stage in (one, two)]
    base = raw(tiny, lab).state_dict()
    for name, weight in both.items():
        torch.testing.assert_close(weight, separate[0][name] + separate[1][name] - base[name], atol=1e-5, rtol=1e-5)


def test_a_dense_change_is_added(tiny, lab):
    stage = Dense(0.1)
    merged = Checkpoint(tiny).merge(stage).load(lab)[0].state_dict()
    delta = load_file(lab.folder(stage) / adapters.DENSE)
    for name, weight in raw(tiny, lab).state_dict().items():
        assert torch.equal(merged[name], weight + delta[name].float() if name in delta else weight)


def test_a_merge_is_rounded_once_and_last(tiny, planted, lab, monkeypatch):
    """bf16: the fp32 sum is rounded, not the summands."""
    exact = Checkpoint(tiny).merge(planted(tiny)).load(lab)[0].state_dict()
    monkeypatch.setattr("persona_coupling.machine.cpu_has_fast_bf16", lambda: True)
    rounded = Checkpoint(tiny).merge(planted(tiny)).load(lab)[0].state_dict()
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.to(torch.bfloat16))


def test_a_source_is_read_once_and_never_changed(tiny, planted, lab, monkeypatch):
    """Loaded models are copies: what a caller does to one is not in the next."""
    checkpoints._kept.clear()
    reads = []
    load_raw = models.load_raw
    monkeypatch.setattr(models, "load_raw", lambda *a, **k: (reads.append(a), load_raw(*a, **k))[1])
    merged = Checkpoint(tiny).merge(planted(tiny)).load(lab)[0].state_dict()
    model = Checkpoint(tiny).load(lab)[0]
    assert len(reads) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, weight in Checkpoint(tiny).merge(planted(tiny)).load(lab)[0].state_dict().items():
        assert torch.equal(weight, merged[name])
    fresh = load_raw(tiny, lab, dtype=torch.float32, attention="eager").state_dict()
    for name, weight in Checkpoint(tiny).load(lab)[0].state_dict().items():
        assert torch.equal(weight, fresh[name])
    assert len(reads) == 1
    monkeypatch.setattr("persona_coupling.machine.SMALL", 10)
    checkpoints._kept.clear()
    for _ in range(2):
        Checkpoint(tiny).load(lab)
    assert len(reads) == 3


def test_a_small_model_is_measured_in_fp32_where_that_is_asked_for(tiny, planted, lab, monkeypatch):
    """Its merged weights are then those of the fp32 merge to the bit; a large one is rounded."""
    rounding = Machine("cpu", True, "eager", 128, 32, 4_096)
    loaded = {}
    for name, settings in (
        ("bf16", rounding),
        ("exact", replace(rounding, exact=True)),
        ("fp32", replace(rounding, bf16=False)),
    ):
        monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None, settings=settings: settings)
        loaded[name] = Checkpoint(tiny).merge(planted(tiny)).load(lab)[0].state_dict()
    for name, weight in loaded["exact"].items():
        assert torch.equal(weight, loaded["fp32"][name])
        assert loaded["bf16"][name].dtype == torch.bfloat16
    assert any(not torch.equal(weight, loaded["bf16"][name].float()) for name, weight in loaded["exact"].items())
    exact = replace(rounding, exact=True)
    assert (exact.of(10**9 - 1).bf16, exact.of(10**9).bf16, rounding.of(10).bf16) == (False, True, True)


def test_the_raw_model_has_no_change_to_take(tiny, planted):
    with pytest.raises(ValueError, match="raw model"):
        _ = Checkpoint(tiny).last_change
    assert Checkpoint(tiny).merge(planted(tiny)).last_change == planted(tiny)


# ------------------------------------------------------------------------------------------------- changes


def test_low_rank_norm_and_product():
    generator = torch.Generator().manual_seed(0)
    part = LowRank(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator))
    by_hand = sum(float(sum(part.b[i, r] * part.a[r, j] for r in range(3))) ** 2 for i in range(5) for j in range(7))
    assert part.dense().shape == (5, 7)
    assert part.squared_norm() == pytest.approx(by_hand, rel=1e-5)
    dense = part.dense()
    norms = adapters.squared_norms({"low": part, "dense": dense})
    assert norms == {"low": pytest.approx(by_hand, rel=1e-5), "dense": pytest.approx(by_hand, rel=1e-5)}


def test_a_saved_change_is_read_back_by_us_and_by_peft(tiny, planted, lab, tmp_path):
    from peft import PeftModel

    change = adapters.read_change(lab.folder(planted(tiny)))
    adapters.save_low_rank(tmp_path, change)
    again = adapters.read_change(tmp_path)
    assert set(again) == set(change)
    for name, part in change.items():
        torch.testing.assert_close(again[name].dense(), part.dense())
    model = PeftModel.from_pretrained(raw(tiny, lab), tmp_path).eval()
    torch.testing.assert_close(logits(model), beside(tiny, planted(tiny), lab), atol=1e-4, rtol=1e-4)


def test_one_adapter_has_one_rank(tmp_path):
    parts = {f"model.layers.{r}.x": LowRank(torch.ones(r, 4), torch.ones(4, r)) for r in (1, 2)}
    with pytest.raises(ValueError, match="one rank"):
        adapters.save_low_rank(tmp_path, parts)


def test_an_empty_change_is_refused(tmp_path):
    save_file({}, tmp_path / adapters.ADAPTER)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_rslora": True}))
    with pytest.raises(GuardError, match="no change of any module"):
        adapters.read_change(tmp_path)


@pytest.mark.parametrize(("layers", "modules"), [(None, ("router",)), ((), None)])
def test_10_a_restriction_that_leaves_nothing(tiny, planted, lab, layers, modules):
    """Failure 10: a merge of layers or modules that are not in the change."""
    with pytest.raises(GuardError, match="does not touch"):
        adapters.restrict(adapters.read_change(lab.folder(planted(tiny))), layers, modules, 1.0, depth=3)


def test_10_a_change_of_zero(tiny, planted, lab, model):
    """Failure 10: an adapter that was never trained (B is zero), or merged at scale 0."""
    change = adapters.read_change(lab.folder(planted(tiny)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(GuardError, match="changed nothing"):
        adapters.add(model, adapters.restrict(change, None, None, 0.0, depth=3))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(GuardError, match="changed nothing"):
        Checkpoint(tiny).merge(planted(tiny), scale=0.0).load(lab)


def test_10_a_change_of_another_architecture(model):
    """Failure 10: modules that are missing or have another shape."""
    ones = LowRank(torch.ones(1, 32), torch.ones(32, 1))
    with pytest.raises(GuardError, match=r"no module model.layers.9"):
        adapters.add(model, {"model.layers.9.self_attn.q_proj": ones})
    with pytest.raises(GuardError, match=r"up_proj: change of shape \(32, 32\), weight \(64, 32\)"):
        adapters.add(model, {"model.layers.0.mlp.up_proj": ones})


# ------------------------------------------------------------------------------------------------- the check


def test_the_check_reports_norms_and_small_differences(family, change, lab):
    made = merging.check(Checkpoint(family).merge(change).merge(change, layers=(1,), scale=2.0), lab)
    tensors = load_file(lab.folder(change) / adapters.ADAPTER)
    squares = {}
    for name in tensors:
        if "lora_A" in name:
            dense = 6 / math.sqrt(2) * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            squares[name] = float((dense.double() ** 2).sum())
    second = 4 * sum(square for name, square in squares.items() if ".layers.1." in name)
    assert made["norms"] == pytest.approx([math.sqrt(sum(squares.values())), math.sqrt(second)], rel=1e-5)
    assert made["logit_difference"] < 1e-3 < made["logit_effect"]
    assert made["rounding_loss_shift"] == 0.0


def test_the_check_of_the_raw_model_passes(tiny, lab):
    made = merging.check(Checkpoint(tiny), lab)
    assert (made["norms"], made["logit_effect"], made["logit_difference"]) == ([], 0.0, 0.0)


def test_the_check_of_a_dense_change_passes(tiny, lab):
    assert merging.check(Checkpoint(tiny).merge(Dense(0.1)), lab)["logit_effect"] > 0.01


def test_10_a_merge_lost_in_rounding(tiny, planted, lab):
    """Failure 10: the update is not zero, yet the weights stay what they were."""
    with pytest.raises(GuardError, match="changed nothing"):
        merging.check(Checkpoint(tiny).merge(planted(tiny), scale=1e-14), lab)


@pytest.mark.parametrize("factor", [1.1, -1.0])
def test_10_a_merge_that_differs_from_base_and_adapter(tiny, planted, lab, monkeypatch, factor):
    """Failure 10: a wrong scale or sign in the merge."""
    add = adapters.add
    monkeypatch.setattr(
        adapters, "add", lambda model, change: add(model, adapters.restrict(change, None, None, factor, depth=3))
    )
    with pytest.raises(GuardError, match="merged logits differ from base \\+ adapters"):
        merging.check(Checkpoint(tiny).merge(planted(tiny)), lab)


def test_21_rounding_that_moves_the_loss(tiny, planted, lab, monkeypatch):
    """Failure 21: bf16 rounding passes at the bound and fires when the bound is below what it does."""
    bf16 = Machine("cpu", True, "eager", 128, 32, 4_096)
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: bf16)
    checkpoint = Checkpoint(tiny).merge(planted(tiny))
    shift = abs(merging.check(checkpoint, lab)["rounding_loss_shift"])
    assert 0 < shift < merging.ROUNDING_TOLERANCE
    monkeypatch.setattr(merging, "ROUNDING_TOLERANCE", shift / 2)
    with pytest.raises(GuardError, match="rounding to bfloat16 moves the held-out loss"):
        merging.check(checkpoint, lab)


def test_21_the_bound_is_on_fp32_against_the_machines_format(tiny, planted, lab, monkeypatch):
    """Failure 21: in fp32 there is nothing to round, so no bound fires."""
    monkeypatch.setattr(merging, "ROUNDING_TOLERANCE", 0.0)
    assert merging.check(Checkpoint(tiny).merge(replace(planted(tiny), seed=2)), lab)["rounding_loss_shift"] == 0.0
