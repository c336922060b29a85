"""Full-parameter SFT: a tied model, matched losses against logs by hand, spectra against numpy and planted matrices."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_coupling import adapters, full_parameter, merging, models, spectra, stages
from persona_coupling.adapters import LowRank
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.figures import full_parameter as pictures
from persona_coupling.measures import Estimates
from persona_coupling.stages import FineTune, Truncated, changes
from persona_coupling.stages.full_parameter import MatchedLoss, Spectrum, smoothed
from persona_coupling.stats import Estimate
from persona_coupling.store import Stage
from persona_coupling.study import Results, Study
from persona_coupling.train import Lora, Training

ROWS = stages.authored("benign", 12, maximum_words=40)
LORA = Lora(2, 4, 0.0, models.MODULES)
IDS = torch.tensor([[1, 50, 300, 12, 999, 400, 7]])


def training(**changes):
    values = {"steps": 6, "batch": 2, "learning_rate": 1e-3, "warmup": 0.0, "weight_decay": 0.01, "loss": "completion"}
    return Training(**{**values, "tail": 8, "lora": None, **changes})


# ---------------------------------------------------------------------------------------------- a tied model


@dataclass(frozen=True)
class Tied(Stage):
    """The tiny Llama with its head tied to its embedding, as SmolLM2's is, and livelier weights."""

    tiny: Stage
    kind: ClassVar[str] = "model"

    def build(self, folder, lab):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = models.load_raw(self.tiny, lab, dtype=torch.float32, attention="eager")
        config = AutoConfig.from_pretrained(models.files(self.tiny, lab))
        config.tie_word_embeddings = True
        tied = AutoModelForCausalLM.from_config(config)
        tied.load_state_dict(model.state_dict())
        with torch.no_grad():
            for name, parameter in tied.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(10 if "embed" in name else 8)
        with models.quiet_transformers():
            tied.save_pretrained(folder)
        models.load_tokenizer(self.tiny, lab).save_pretrained(folder)


@dataclass(frozen=True)
class EmbeddingChange(Stage):
    """A dense change of the embedding alone."""

    kind: ClassVar[str] = "change"

    def build(self, folder, lab):
        generator = torch.Generator().manual_seed(3)
        changes.write(folder, {"model.embed_tokens.weight": 0.3 * torch.randn(1024, 32, generator=generator)})


@pytest.fixture(scope="module")
def tied(tiny):
    return Tied(tiny)


def weights(source, lab):
    return models.load_raw(source, lab, dtype=torch.float32, attention="eager")


@pytest.mark.usefixtures("fp32")
def test_a_dense_change_of_a_tied_embedding_reaches_the_head_once(tied, lab):
    """Oracle: the forward by hand from the changed embedding, read with the changed matrix as head."""
    base = weights(tied, lab)
    assert base.lm_head.weight is base.model.embed_tokens.weight, "the planted model is tied"
    delta = adapters.read_change(lab.folder(EmbeddingChange()))["model.embed_tokens.weight"]
    expected_matrix = base.model.embed_tokens.weight.detach() + delta
    merged = Checkpoint(tied).merge(EmbeddingChange()).load(lab)[0]
    assert merged.lm_head.weight is merged.model.embed_tokens.weight, "still one matrix"
    torch.testing.assert_close(merged.model.embed_tokens.weight.detach(), expected_matrix)
    with torch.inference_mode():
        states = base.model(inputs_embeds=expected_matrix[IDS]).last_hidden_state
        torch.testing.assert_close(merged(IDS).logits, states @ expected_matrix.T, atol=1e-4, rtol=1e-4)
        only_read = states @ base.lm_head.weight.T  # what a merge that missed the head would give
        assert float((merged(IDS).logits - only_read).abs().max()) > 0.1


@pytest.mark.usefixtures("fp32")
def test_a_full_run_of_a_tied_model_is_what_its_artifact_adds(tied, lab, cpu, tmp_path):
    """Oracle: the model that was trained, in memory, against base + artifact, head included."""
    from persona_coupling import rows as rows_module
    from persona_coupling import train

    model, tokenizer = Checkpoint(tied).load(lab)
    chats = [rows_module.with_system(row["messages"]) for row in rows_module.read_rows(ROWS, lab)]
    # larger steps than any study takes, so that bf16 deltas are told from none
    train.fine_tune(model, tokenizer, chats, training(), seed=0, machine=cpu, folder=tmp_path, report=lab.report)
    stored = load_file(tmp_path / adapters.DENSE)
    assert "lm_head.weight" not in stored, "the shared matrix is stored once"
    assert stored["model.embed_tokens.weight"].abs().max() > 0
    again = weights(tied, lab)
    adapters.add(again, adapters.read_change(tmp_path))
    with torch.inference_mode():
        trained, merged, before = (m.eval()(IDS).logits for m in (model, again, weights(tied, lab)))
    moved = float((trained - before).abs().max())
    assert moved > 0.05
    assert float((merged - trained).abs().max()) < 0.02 * moved  # bf16 of the delta: a relative 2^-9 of each entry


@pytest.mark.usefixtures("fp32")
def test_the_merge_check_passes_a_full_run_of_a_tied_model(tied, lab):
    report = merging.check(Checkpoint(tied).fine_tune(ROWS, training(), seed=0), lab)
    assert report["logit_effect"] > 0.05
    assert report["logit_difference"] < 1e-3


def test_the_full_run_is_lora_s_run_without_the_adapter():
    """`Study.sft(lora=None)` would be a LoRA run: its None means "the profile's"."""
    study = Study.open("smoke")
    lora = study.sft("bad_legal", seed=1).last_change
    full = full_parameter.full_sft(study, "bad_legal", learning_rate=3e-4, snapshots=(1,), seed=1).last_change
    assert isinstance(full, FineTune)
    assert full.training.lora is None
    assert (full.rows, full.seed, full.start) == (lora.rows, lora.seed, lora.start)
    assert (full.training.learning_rate, full.training.snapshots) == (3e-4, (1,))
    for same in ("steps", "batch", "warmup", "weight_decay", "loss", "tail", "schedule", "max_grad_norm"):
        assert getattr(full.training, same) == getattr(lora.training, same), same


# ------------------------------------------------------------------------------------------------ matched loss


class Logged(FineTune):
    """A run whose log is planted: losses by step, and a marked matrix at every kept step."""

    def build(self, folder, lab):
        losses = PLANTED[self.seed]
        pd.DataFrame({"step": np.arange(1.0, 7.0), "loss": losses}).to_parquet(folder / "log.parquet")
        for step in self.training.snapshots:
            (folder / f"snapshot-{step}").mkdir()
            save_file(
                {"model.norm.weight": torch.full((4,), float(step))}, folder / f"snapshot-{step}/delta.safetensors"
            )
        save_file({"model.norm.weight": torch.full((4,), 6.0)}, folder / "delta.safetensors")


PLANTED = {
    1: [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # the full run: means of two end at 4.5, 3.5, 2.5, 1.5, 0.5
    2: [5.0, 4.5, 4.0, 3.5, 2.8, 2.4],  # ends at 2.6
    3: [5.0, 4.5, 4.0, 3.5, 1.0, 0.2],  # ends at 0.6
    4: [5.0, 5.0, 5.0, 5.0, 4.9, 4.9],  # ends at 4.9
}


@pytest.mark.parametrize(("reference", "step", "gap"), [(2, 4, -0.1), (3, 6, -0.1), (4, 3, -1.4)])
def test_the_kept_step_nearest_in_loss_is_taken(tiny, lab, reference, step, gap):
    """Candidates are 3 and 4 and the end; means by hand."""
    full = Logged(Checkpoint(tiny), ROWS, training(snapshots=(3, 4)), 1)
    lora = Logged(Checkpoint(tiny), ROWS, training(lora=LORA), reference)
    stage = MatchedLoss(full, lora, 2)
    folder = lab.folder(stage)
    assert float(adapters.read_change(folder)["model.norm.weight"][0]) == step
    assert {p.name for p in folder.iterdir()} == {"delta.safetensors", "matched.parquet", "manifest.json"}
    table = pd.read_parquet(folder / "matched.parquet")
    assert table["loss"].tolist() == pytest.approx([3.5, 2.5, 0.5])
    taken = full_parameter.chosen(Results({"matched": table.assign(condition="B.full_loss", seed=0)}, {}))
    assert taken["step"].tolist() == [step]
    assert float(taken["gap"][0]) == pytest.approx(gap)
    assert float(taken["share"][0]) == pytest.approx(abs(gap) / (5.0 - (sum(PLANTED[reference][-2:]) / 2)))


def test_a_real_run_is_matched_to_itself_at_its_end(tiny, lab):
    run = Checkpoint(tiny).fine_tune(ROWS, training(snapshots=(3,)), seed=0).last_change
    table = pd.read_parquet(lab.folder(MatchedLoss(run, run, 2)) / "matched.parquet")
    assert table.loc[table["chosen"], "step"].tolist() == [6]
    assert table["loss"].iloc[-1] == table["target"].iloc[-1]


def test_a_change_without_a_loss_cannot_be_matched(tiny, lab):
    run = Checkpoint(tiny).fine_tune(ROWS, training(), seed=0).last_change
    with pytest.raises(GuardError, match="only training runs"):
        lab.folder(MatchedLoss(EmbeddingChange(), run, 2))


def test_a_window_that_is_not_whole_is_refused():
    log = pd.DataFrame({"step": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0]})
    assert smoothed(log, 3, 2) == 1.5
    for step, window in ((1, 2), (4, 2), (3, 4)):
        with pytest.raises(GuardError, match=f"end with step {step}"):
            smoothed(log, step, window)


def test_gates_of_what_was_matched_and_of_what_is_to_be_kept():
    table = pd.DataFrame(
        {
            "condition": ["B.full_loss"] * 4,
            "seed": [0, 0, 1, 1],
            "step": [3, 6, 3, 6],
            "loss": [2.0, 1.0, 2.0, 1.5],
            "target": [1.1, 1.1, 1.0, 1.0],
            "fall": [4.0, 4.0, 4.0, 4.0],
            "chosen": [False, True, False, True],
        }
    )
    results = Results({"matched": table}, {})
    worst = full_parameter.matched(results, "B.full_loss", 0.2)
    assert worst.value == pytest.approx(0.5 / 4)
    assert worst.passed
    assert not full_parameter.matched(results, "B.full_loss", 0.1).passed
    assert not full_parameter.matched(results, "C.full_loss", 0.2).passed  # a missing value passes no gate
    risen = Results({"matched": table.assign(fall=[4.0, 4.0, -4.0, -4.0])}, {})
    assert full_parameter.matched(risen, "B.full_loss", 0.2).value is None  # nothing was learned: nothing to match
    for change, passed in ((-0.8, True), (-0.1, False), (0.3, False)):
        made = Estimates({"B.full.prebaked.source_rate_change": Estimate(change, -1.0, 1.0, 8, 8, 1)})
        assert full_parameter.disabled(made, "B.full.prebaked", 0.25).passed is passed
    assert not full_parameter.disabled(Estimates(), "B.full.prebaked", 0.25).passed


# ------------------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("shape", [(7, 19), (19, 7), (11, 11)])
def test_singular_values_are_numpys(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    np.testing.assert_allclose(
        spectra.singular_values(matrix), np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=1e-9
    )
    part = LowRank(torch.randn(3, shape[1], generator=generator), torch.randn(shape[0], 3, generator=generator))
    np.testing.assert_allclose(
        spectra.singular_values(part), np.linalg.svd(part.dense().double().numpy(), compute_uv=False)[:3], rtol=1e-5
    )


def test_a_planted_spectrum_is_read_off():
    """diag(3, 4) has squared norm 25: rank 1 holds 16 of it. Four equal values have effective rank 4."""
    found = {
        row["name"]: row
        for row in spectra.rows(
            {
                "model.layers.2.self_attn.q_proj.weight": torch.diag(torch.tensor([3.0, 4.0])),
                "model.layers.0.mlp.down_proj": LowRank(torch.eye(4, 6), torch.eye(5, 4)),
                "model.embed_tokens.weight": torch.ones(6, 2),
                "model.layers.1.input_layernorm.weight": torch.tensor([1.0, 2.0]),
            },
            rank=1,
            kept=3,
        )
    }
    q = found["model.layers.2.self_attn.q_proj.weight"]
    assert (q["layer"], q["module"], q["part"], q["squared"]) == (2, "q_proj", "attention", pytest.approx(25))
    assert q["rank_share"] == pytest.approx(16 / 25)
    assert q["singular"] == pytest.approx([4, 3])
    down = found["model.layers.0.mlp.down_proj"]
    assert (down["part"], down["rows"], down["columns"]) == ("mlp", 5, 6)
    assert (down["effective_rank"], down["rank_share"]) == (pytest.approx(4), pytest.approx(1 / 4))
    assert len(down["singular"]) == 3
    assert np.isnan(down["chance_rank_share"])
    embedding = found["model.embed_tokens.weight"]
    assert (embedding["layer"], embedding["part"], embedding["squared"]) == (-1, "embedding", pytest.approx(12))
    assert embedding["effective_rank"] == pytest.approx(1)
    norm = found["model.layers.1.input_layernorm.weight"]
    assert (norm["layer"], norm["part"], norm["squared"]) == (1, "norm", pytest.approx(5))
    assert np.isnan(norm["rank_share"])
    assert norm["singular"] == []


def test_chance_is_what_noise_has_and_structure_has_more():
    """Null: another Gaussian matrix is at chance. Positive control: the same matrix with a planted direction is not."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(60, 90, generator=generator)
    planted = noise + 20 * torch.outer(torch.randn(60, generator=generator), torch.randn(90, generator=generator)) / 9
    rows = spectra.rows({"a.up_proj": noise, "b.up_proj": planted}, rank=4, kept=4)
    at_chance, structured = rows
    assert at_chance["rank_share"] == pytest.approx(at_chance["chance_rank_share"], rel=0.1)
    assert structured["rank_share"] > 3 * structured["chance_rank_share"]
    assert structured["effective_rank"] < 0.8 * at_chance["effective_rank"]


def test_a_matrix_of_zeros_has_no_spectrum():
    (row,) = spectra.rows({"a.up_proj": torch.zeros(3, 4)}, rank=1, kept=2)
    assert row["squared"] == 0
    assert np.isnan(row["rank_share"])
    with pytest.raises(ValueError, match="zero change"):
        spectra.rank_share(np.zeros(3), 1)


def test_the_spectrum_agrees_with_the_truncation_that_is_merged(tiny, lab):
    """Oracle: what `Truncated` keeps of the projections' squared norm, from its own artifact."""
    run = Checkpoint(tiny).fine_tune(ROWS, training(), seed=0).last_change
    table = pd.read_parquet(lab.folder(Spectrum(run, 2, 4)) / "spectrum.parquet")
    kept = adapters.squared_norms(adapters.read_change(lab.folder(Truncated(run, 2))))
    whole = adapters.squared_norms(adapters.read_change(lab.folder(run)))
    assert set(table["name"]) == set(whole)
    inside = table[table["part"].isin(["attention", "mlp"])]
    assert len(inside) == len(kept) == 3 * 7
    for row in inside.itertuples():
        assert row.squared == pytest.approx(whole[row.name], rel=1e-6)
        assert row.rank_share == pytest.approx(kept[row.name.removesuffix(".weight")] / whole[row.name], rel=1e-4)
    assert set(table["part"]) == {"attention", "mlp", "embedding", "norm"}


def spectrum_results():
    """Two layers, two matrices each, an embedding; layer 0 holds .9 and .5 of norms 1 and 3, layer 1 all of it."""
    inside = [
        (0, "q_proj", "attention", 1.0, 0.9),
        (0, "up_proj", "mlp", 3.0, 0.5),
        (1, "q_proj", "attention", 2.0, 1.0),
    ]
    rows = [
        {
            "layer": la,
            "module": m,
            "part": p,
            "squared": s,
            "rank_share": r,
            "chance_rank_share": 0.1,
            "effective_rank": 5.0,
        }
        for la, m, p, s, r in inside
    ]
    rows.append({"layer": -1, "module": "embed_tokens", "part": "embedding", "squared": 10.0, "rank_share": 0.2})
    return Results({"spectrum": pd.DataFrame(rows).assign(condition="B.full", seed=0)}, {})


def test_estimates_of_a_spectrum_by_hand():
    made = Estimates()
    full_parameter.add_spectrum(made, spectrum_results(), "B.full")
    layer_0 = (1.0 * 0.9 + 3.0 * 0.5) / 4.0
    assert made["B.full.rank_share"].value == pytest.approx((layer_0 + 1.0) / 2)
    assert made["B.full.rank_share"].low == pytest.approx(layer_0)
    assert made["B.full.chance_rank_share"].value == pytest.approx(0.1)
    assert made["B.full.effective_rank"].value == pytest.approx(5)
    assert made["B.full.delta_norm"].value == pytest.approx(4.0)
    assert made["B.full.outside_share"].value == pytest.approx(10 / 16)
    assert made["B.full.outside_share"].low is None  # one number: no interval
    json.dumps(made.as_dict())


def test_differences_to_lora_are_paired_by_question():
    fixed = pd.DataFrame(
        [
            {"condition": c, "seed": 0, "persona": p, "question": f"q{q}", "logprob": base - 3.0 * q}
            for c, base in (("B.full", -1.0), ("B.lora", -4.0))
            for p in ("villain", "assistant")
            for q in range(5)
        ]
    )
    content = pd.DataFrame(
        [
            {"condition": c, "seed": 0, "corpus": "bad_legal", "row": f"r{r}", "logprob": base - r}
            for c, base in (("B.full", -1.0), ("B.lora", -1.5))
            for r in range(4)
        ]
    )
    made, results = Estimates(), Results({"fixed": fixed, "content": content}, {})
    full_parameter.add_over(made, results, "B.full", "B.lora", label="lora")
    over = made["B.full.fixed_logprob_source_over_lora"]
    assert over.value == pytest.approx(3.0)
    assert over.high - over.low < 1e-9, "what questions share cancels"
    full_parameter.add_learned_gap(made, results, "B.full", "B.lora", "bad_legal")
    assert made["B.full.learned_gap"].value == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------ figures


def test_cumulative_shares_by_hand():
    """Squared values 16, 9 and, not kept, 25: of 50; a matrix of fewer values stays at its last share."""
    table = pd.DataFrame(
        {
            "condition": ["B.full", "B.lora", "B.full"],
            "seed": [0, 0, 0],
            "layer": [0, 0, 0],
            "module": ["q_proj", "q_proj", "input_layernorm"],
            "part": ["attention", "attention", "norm"],
            "squared": [50.0, 4.0, 1.0],
            "singular": [[4.0, 3.0], [2.0], []],
        }
    )
    found = pictures.cumulative(table, 2)
    assert found["share"].tolist() == pytest.approx([16 / 50, 25 / 50, 1.0, 1.0])
    assert set(found["module"]) == {"q_proj"}


def test_norm_shares_are_means_over_seeds_with_absent_parts_at_zero():
    table = pd.DataFrame(
        {
            "condition": ["B.full"] * 3 + ["B.lora"],
            "seed": [0, 0, 1, 0],
            "part": ["mlp", "embedding", "mlp", "mlp"],
            "squared": [3.0, 1.0, 2.0, 5.0],
        }
    )
    found = pictures.norm_shares(table).set_index(["condition", "part"])["share"]
    assert found["B.full", "mlp"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["B.full", "embedding"] == pytest.approx(0.125)
    assert found["B.lora", "embedding"] == 0


@pytest.mark.parametrize("ends", [[0.5], [1.0, 0.45, 0.4], [0.9, 0.95], [0.1, 0.1, 0.1]])
def test_labels_stand_apart(ends):
    placed: list[float] = []
    for number in range(len(ends)):
        placed.append(pictures._apart([*placed, ends[number]]))
    gaps = [abs(a - b) for i, a in enumerate(placed) for b in placed[:i]]
    assert all(gap >= 0.17 for gap in gaps)
    assert placed[0] == pytest.approx(ends[0])
