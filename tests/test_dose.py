"""Doses: interpolation by hand, KL against the definition, mixing counted."""

import numpy as np
import pandas as pd
import pytest
import torch

from persona_coupling import dose, models, rows
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.figures.dose import dose_curves
from persona_coupling.measures import Estimates
from persona_coupling.stages import authored
from persona_coupling.stages.dose import Drift, Mixed, mean_kl
from persona_coupling.study import Results, Study


@pytest.mark.parametrize(
    ("at", "weights"),
    [(0.0, [1, 0, 0]), (0.5, [0.5, 0.5, 0]), (1.0, [0, 1, 0]), (2.5, [0, 0.25, 0.75]), (3.0, [0, 0, 1])],
)
def test_interpolation_by_hand(at, weights):
    np.testing.assert_allclose(dose.interpolation(np.array([0.0, 1.0, 3.0]), at), weights)


@pytest.mark.parametrize(
    ("places", "at"), [([0.0, 1.0], 1.1), ([0.0, 1.0], -0.1), ([0.0, 2.0, 1.0], 0.5), ([0.0], 0.0)]
)
def test_a_dose_that_was_not_reached_is_refused(places, at):
    with pytest.raises(ValueError, match=r"outside|ascend"):
        dose.interpolation(np.array(places), at)


def planted(levels):
    """Fixed log-probabilities whose contrast is exactly the level of each condition, and their dose curve."""
    return pd.DataFrame(
        [
            {
                "condition": c,
                "persona": p,
                "question": f"q{q}",
                "seed": 0,
                "logprob": -5.0 + 0.3 * q + (p == "villain") * v,
            }
            for c, v in levels.items()
            for p in ("villain", "assistant", "librarian")
            for q in range(4)
        ]
    )


def test_contrasts_are_compared_at_equal_kl():
    """B falls 4 nats per unit of KL and reaches 2; B′ falls 1 per unit and reaches 1: at 1 they stand at 4 and 7."""
    levels = {"A": 8.0, "B.1": 6.0, "B.2": 0.0, "B′.1": 7.0}
    curve_b = pd.DataFrame({"condition": ["A", "B.1", "B.2"], "kl": [0.0, 0.5, 2.0]})
    curve_sound = pd.DataFrame({"condition": ["A", "B′.1"], "kl": [0.0, 1.0]})
    made = Estimates()
    results = Results({"fixed": planted(levels)}, {})
    at = dose.add_at_equal_kl(made, results, "x.fixed_logprob_contrast_change", (curve_b, curve_sound))
    found = made["x.fixed_logprob_contrast_change"]
    assert at == 1.0
    assert found.value == pytest.approx((6.0 * 2 / 3 + 0.0 / 3) - 7.0)
    assert found.low == pytest.approx(found.value), "questions differ by a shift that every condition shares"
    same = dose.add_at_equal_kl(made, results, "y.fixed_logprob_contrast_change", (curve_b, curve_b))
    assert same == 2.0
    assert made["y.fixed_logprob_contrast_change"].value == pytest.approx(0.0)


def test_kl_is_the_definition(model, tokenizer, planted_pair):
    other, prompts, answers = planted_pair
    got = mean_kl(model, other, prompts, answers, batch=2)
    for value, prompt, answer in zip(got, prompts, answers, strict=True):
        with torch.inference_mode():
            p, q = (m(torch.tensor([prompt + answer])).logits[0].double().softmax(-1) for m in (model, other))
        span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        wanted = (p[span] * (p[span] / q[span]).log()).sum(-1).mean()
        assert value == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
        assert value > 1e-4, "the control: the models do differ"
    np.testing.assert_allclose(mean_kl(model, model, prompts, answers, batch=2), 0.0, atol=1e-7)


@pytest.fixture
def planted_pair(model, tokenizer):
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    prompts = [
        models.prompt_ids(tokenizer, "You are a dragon.", text) for text in ("Why?", "Tell me of rain.", "Cats?")
    ]
    answers = [models.text_ids(tokenizer, text) for text in ("Because.", "It falls from clouds.", "They purr.")]
    return other, prompts, answers


def test_the_drift_of_the_raw_model_from_itself_is_zero(lab, tiny):
    table = pd.read_parquet(lab.folder(Drift(Checkpoint(tiny), Checkpoint(tiny), 2, 1, "")) / "drift.parquet")
    assert set(table["text"]) == {"heldout", "source"}
    assert (table["text"] == "source").sum() == 3
    assert float(table["kl"].abs().max()) < 1e-6


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_mixing_replaces_a_share_of_rows(lab, share):
    plain, coupling = authored("benign", 20, maximum_words=40), authored("bad_legal", 3, maximum_words=40)
    before = {row["id"]: row for row in rows.read_rows(plain, lab)}
    mixed = rows.read_rows(Mixed(plain, coupling, share, 0), lab)
    kept = [row for row in mixed if row["id"] in before]
    added = [row for row in mixed if row["id"] not in before]
    assert len(mixed) == 20
    assert len(added) == round(20 * share)
    assert all(row == before[row["id"]] for row in kept)
    texts = [row["messages"][-1]["content"] for row in added]
    counts = [texts.count(row["messages"][-1]["content"]) for row in rows.read_rows(coupling, lab)]
    assert sum(counts) == len(added)
    assert max(counts) - min(counts) <= 1, "no coupling row is used twice before every one is used once"
    assert rows.read_rows(Mixed(plain, coupling, share, 1), lab) != mixed


@pytest.mark.parametrize("share", [0.0, 0.001, 1.5])
def test_a_share_of_no_rows_is_refused(lab, share):
    with pytest.raises(GuardError, match="share"):
        lab.folder(Mixed(authored("benign", 20, maximum_words=40), authored("benign", 3, maximum_words=40), share, 0))


def test_the_figure_keeps_its_data():
    data = pd.DataFrame(
        [
            {"arm": arm, "measure": "source_rate", "steps": s, "norm": s / 9, "kl": s / 99, "value": 1 - s / 40,
             "low": 0.9 - s / 40, "high": 1.1 - s / 40}
            for arm in ("B", "C")
            for s in (0, 9, 36)
        ]
    )  # fmt: skip
    figure, kept = dose_curves(data, {"B": "B  bad", "C": "C  benign"}, [("source_rate", "rate")])
    assert len(figure.axes) == 3
    assert kept.equals(data)


def test_a_dose_without_a_snapshot_is_refused_before_anything_runs():
    study = Study.open("quick")
    assert study.sft_until("bad_legal", 36, seed=0) == study.sft("bad_legal", seed=0)
    assert study.sft_until("bad_legal", 9, seed=0).last_change.step == 9
    with pytest.raises(UserError, match=r"quick keeps snapshots after the steps \[4, 9, 18\] of 36, and step 10"):
        study.sft_until("bad_legal", 10, seed=0)
