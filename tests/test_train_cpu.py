"""The CPU's LoRA layer and head against PEFT's layer, torch's loss and the definition of dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from persona_coupling import train_cpu
from persona_coupling.train_cpu import POSITIONS, Masks, faster_lora, masked_, summed_loss

FORMATS = (torch.float32, torch.bfloat16)


# ------------------------------------------------------------------------------------------------- masks


def kept(p: float, count: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.ones(count, dtype=dtype)
    mask = Masks(p).draw(values)
    assert set(mask.unique().tolist()) <= {-1, 0}
    return masked_(values, mask).float()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_dropped_share_is_binomial_around_p_in_every_lane(p, dtype):
    """A draw serves four elements; what is kept keeps its value, and the scale restores the mean."""
    torch.manual_seed(0)
    out = kept(p, 400_001, dtype)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    for lane in range(4):
        share = 1 - out[lane::4].mean().item()
        assert share == pytest.approx(p, abs=5 * (p * (1 - p) / 100_000) ** 0.5)
    assert Masks(p).scale == pytest.approx(1 / (1 - p), rel=1e-3)


def test_neighbours_are_independent():
    """Phi coefficient of neighbouring elements of one 64-bit draw; its positive control is an element with itself."""
    torch.manual_seed(1)
    dropped = (kept(0.3, 400_000, torch.bfloat16) == 0).float().view(-1, 4)
    correlation = torch.corrcoef(dropped.T)
    assert correlation[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert (correlation - torch.diag(torch.diag(correlation))).abs().max() < 5 / 100_000**0.5


def test_a_seed_fixes_the_masks_and_layers_differ():
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append([Masks(0.5).draw(torch.ones(1000)) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_an_impossible_probability_is_refused(p):
    with pytest.raises(ValueError, match="probability"):
        Masks(p)


# ------------------------------------------------------------------------------------------------- layer


def adapted(p: float, *, bias: bool = False, **changes):
    """A PEFT model of one block, its B no longer zero, as the trainer has it: base in bf16 if asked, adapter in fp32."""
    torch.manual_seed(5)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_bias=bias, mlp_bias=bias, **shape))
    config = LoraConfig(r=4, lora_alpha=24, lora_dropout=p, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    for name, value in changes.items():
        setattr(config, name, value)
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name or "bias" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return found.train()


def layer_of(model):
    return model.base_model.model.model.layers[0].mlp.up_proj


def run(layer, x, dtype):
    """Output and gradients of x, A and B, under autocast where the format is bf16."""
    x = x.detach().clone().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(x)
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * slope).sum(), (x, *weights))]


@pytest.mark.parametrize("bias", [False, True])
def test_without_dropout_a_layer_is_pefts_own(bias):
    model = adapted(0.0, bias=bias)
    x = torch.randn(3, 5, 16)
    theirs = run(layer_of(model), x, torch.float32)
    assert faster_lora(model) == 4
    ours = run(layer_of(model), x, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.dtype == other.dtype


def test_in_bf16_it_errs_no_more_than_pefts_own():
    """Both against the same layer in double precision; the base is rounded first, as the trainer's is."""
    model = adapted(0.0)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(64, 5, 16).bfloat16()
    exact = run(layer_of(copy.deepcopy(model).double()), x, torch.float64)
    theirs = run(layer_of(model), x, torch.bfloat16)
    faster_lora(model)
    ours = run(layer_of(model), x, torch.bfloat16)
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        wrong, allowed = ((t.double() - truth).norm() / truth.norm() for t in (one, other))
        assert wrong < 1.2 * allowed + 1e-6
        assert wrong < 0.01


@pytest.mark.parametrize("dtype", FORMATS)
def test_with_dropout_a_layer_is_its_definition(monkeypatch, dtype):
    """The mask is read off while it is drawn; output and gradients are then the plain formula's in double precision."""
    model = adapted(0.25)
    faster_lora(model)
    layer, x, seen = layer_of(model), torch.randn(3, 5, 16), []
    draw = Masks.draw
    monkeypatch.setattr(Masks, "draw", lambda self, like: seen.append(draw(self, like)) or seen[-1])
    ours = run(layer, x, dtype)
    (mask,) = seen
    assert 0 < int((mask == 0).sum()) < mask.numel()
    keep = (mask != 0).double().view(x.shape)
    exact = copy.deepcopy(layer).double()
    x = x.to(dtype).double().requires_grad_()
    a, b = exact.lora_A["default"].weight, exact.lora_B["default"].weight
    scale = train_cpu.LEVELS / (train_cpu.LEVELS - round(0.25 * train_cpu.LEVELS))
    out = exact.base_layer(x) + 6 * torch.nn.functional.linear(torch.nn.functional.linear(x * keep * scale, a), b)
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
    wanted = [out, *torch.autograd.grad((out * slope).sum(), (x, a, b))]
    for one, truth in zip(ours, wanted, strict=True):
        assert (one.double() - truth).norm() / truth.norm() < (1e-6 if dtype == torch.float32 else 0.01)


def test_nothing_is_dropped_in_evaluation_and_pefts_own_serves_a_switched_off_adapter():
    model = adapted(0.5)
    faster_lora(model)
    layer, x = layer_of(model), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        model.eval()
        torch.testing.assert_close(layer(x), layer_of(adapted(0.0))(x))
        with model.disable_adapter():
            assert torch.equal(layer(x), layer.base_layer(x))


def test_what_it_cannot_express_is_left_to_peft():
    assert faster_lora(adapted(0.1)) == 4
    assert faster_lora(adapted(0.1, use_dora=True)) == 0
    assert faster_lora(adapted(0.1, bias=True, lora_bias=True)) == 0
    trained = adapted(0.1)
    layer_of(trained).base_layer.weight.requires_grad_()
    assert faster_lora(trained) == 3
    several = adapted(0.1)
    several.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert faster_lora(several) == 2


# ------------------------------------------------------------------------------------------------- head


def heads(dtype, positions=POSITIONS + 37):
    torch.manual_seed(7)
    hidden, weight = torch.randn(positions, 24), torch.randn(501, 24)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(501, (positions,))


def plain(hidden, weight, targets):
    logits = torch.nn.functional.linear(hidden, weight)
    if hidden.dtype != torch.float64:
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def with_gradients(loss, hidden, weight, targets):
    total = loss(hidden, weight, targets)
    return [total, *torch.autograd.grad(total / 7, (hidden, weight))]


def test_the_loss_is_torchs_own():
    hidden, weight, targets = heads(torch.float32)
    with torch.no_grad():
        hidden[3] *= 80  # logits that overflow an exponential
    ours, theirs = (with_gradients(loss, hidden, weight, targets) for loss in (summed_loss, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ours[0])


def test_in_bf16_the_loss_errs_no_more_than_torchs_own():
    hidden, weight, targets = heads(torch.bfloat16)
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = with_gradients(plain, *doubles, targets)
    ours, theirs = (with_gradients(loss, hidden, weight, targets) for loss in (summed_loss, plain))
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        wrong, allowed = ((t.double() - truth).norm() / truth.norm() for t in (one, other))
        assert wrong < 1.2 * allowed + 1e-6


def test_under_autocast_fp32_weights_are_rounded_and_get_fp32_gradients():
    """A full fine-tuning: parameters in fp32, products in bf16."""
    hidden, weight, targets = heads(torch.float32)
    exact = with_gradients(summed_loss, hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = with_gradients(summed_loss, hidden, weight, targets)
    for one, truth in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - truth).norm() / truth.norm() < 0.01
