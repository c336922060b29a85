"""The fast dropout against the definition of dropout and against torch's own."""

import pytest
import torch

from persona_coupling.dropout import Dropout, replace_dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_scale_and_mean(p):
    """The dropped share is binomial around p, in every one of the four lanes of a draw; kept values are scaled."""
    torch.manual_seed(0)
    values = torch.ones(400_001)
    out = Dropout(p)(values)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    for lane in range(4):
        share = 1 - kept[lane::4].float().mean().item()
        assert share == pytest.approx(p, abs=5 * (p * (1 - p) / 100_000) ** 0.5)


def test_neighbours_are_independent():
    """Phi coefficient of neighbouring elements of one 64-bit draw; its positive control is an element with itself."""
    torch.manual_seed(1)
    dropped = (Dropout(0.3)(torch.ones(400_000)) == 0).float().view(-1, 4)
    correlation = torch.corrcoef(dropped.T)
    assert correlation[0, 0] == pytest.approx(1.0, abs=1e-5)
    off = correlation - torch.diag(torch.diag(correlation))
    assert off.abs().max() < 5 / 100_000**0.5


def test_the_gradient_goes_where_the_values_went():
    torch.manual_seed(2)
    values = torch.randn(7, 33, requires_grad=True)
    out = Dropout(0.25)(values)
    out.sum().backward()
    torch.testing.assert_close(values.grad * values.detach(), out.detach())


def test_evaluation_and_zero_are_the_identity():
    values = torch.randn(5)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values
    with pytest.raises(ValueError, match="probability"):
        Dropout(1.0)


def test_a_seed_fixes_the_mask():
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(torch.ones(1000)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_every_lora_dropout_is_replaced():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert replace_dropout(adapted) == 4
    assert not any(isinstance(m, torch.nn.Dropout) for m in adapted.modules())
    assert replace_dropout(adapted) == 0
