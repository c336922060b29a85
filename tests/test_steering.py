"""States read off the residual stream, tables of their shift, and vectors added to it: against forwards by hand."""

import zlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from persona_coupling import generate, machine, measure, models, personas, questions, representations, residual, shifts
from persona_coupling.adapters import LowRank
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.stages import Evaluate
from persona_coupling.stages.representations import Hidden, Shift, read_states
from persona_coupling.stages.steering import (
    Addition,
    Steer,
    Term,
    persona_swap,
    pushing,
    restoring,
)
from persona_coupling.store import Lab

SAMPLING = Sampling(1.0, 0.95, 6)
WHO = [p.id for p in personas.personas()]
VILLAIN = WHO.index("villain")


def hidden(checkpoint):
    return Hidden(checkpoint, 3, 1, "Be brief.")


def steer(coupled, additions, **changes):
    made = Steer(
        coupled, additions, ("villain", "assistant"), (0.4, 1.0), 2, 2, (), (), 1, SAMPLING, 3, 1, "Be brief.", 0
    )
    return replace(made, **changes)


def table(lab, stage, name):
    return pd.read_parquet(lab.folder(stage) / f"{name}.parquet")


# ---------------------------------------------------------------------------------------------------------- reading


def test_states_are_the_models_own(family, lab, fp32):
    """Oracle: single unpadded sequences through transformers' own `output_hidden_states`."""
    stage = hidden(Checkpoint(family))
    arrays, (model, tokenizer) = read_states(stage, lab)[0], stage.checkpoint.load(lab)
    bank, base = questions.eval_questions(3, 1), model.base_model
    depth = model.config.num_hidden_layers
    assert arrays["stream"].shape == (11, 4, 2, depth + 1, model.config.hidden_size)
    others = np.zeros_like(arrays["reads"][0])
    for p, persona in enumerate(personas.personas()):
        for q, question in enumerate(bank):
            prompt = models.prompt_ids(tokenizer, f"{persona.prompt} Be brief.", question.text)
            sequence = prompt + tokenizer.encode(question.answer, add_special_tokens=False)
            with torch.inference_mode():
                states = base(torch.tensor([sequence]), output_hidden_states=True).hidden_states
                normed = [layer.input_layernorm(h[0]) for layer, h in zip(base.layers, states, strict=False)]
            for at, pick in enumerate((lambda h, n=len(prompt): h[n - 1], lambda h, n=len(prompt): h[n:].mean(0))):
                found = arrays["stream"][p, q, at]
                for layer in range(depth):
                    np.testing.assert_allclose(found[layer], pick(states[layer][0]), atol=1e-5)
                    if p == VILLAIN:
                        np.testing.assert_allclose(arrays["reads"][0, q, at, layer, 0], pick(normed[layer]), atol=1e-4)
                    else:
                        others[q, at, layer, 0] += pick(normed[layer]).numpy() / 10
                if at == 0:
                    with torch.inference_mode():
                        last = base.norm(torch.tensor(found[depth]))
                    np.testing.assert_allclose(last, pick(states[depth][0]), atol=1e-4)
    np.testing.assert_allclose(arrays["reads"][1][:, :, :, 0], others[:, :, :, 0], atol=1e-4)


def test_states_of_different_texts_are_refused(tiny, lab, monkeypatch):
    """The guard fires when one persona's answers are not the others'."""
    real, calls = models.text_ids, iter(range(1000))
    monkeypatch.setattr(models, "text_ids", lambda t, text: real(t, text if next(calls) else text + " Indeed so."))
    with pytest.raises(GuardError, match="not one and the same text"):
        lab.folder(replace(hidden(Checkpoint(tiny)), instruction="Be brief, please."))


def test_recording_is_undone_and_counts_its_calls(model):
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    with pytest.raises(GuardError, match="gave"), residual.recording(model, torch.ones(1, 2, 3)):
        pass
    with pytest.raises(RuntimeError, match="stop"), residual.recording(model, torch.ones(1, 2, 3)):
        raise RuntimeError("stop")
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# ----------------------------------------------------------------------------------------------------------- tables

QUESTIONS, DEPTH, WIDTH, BANK = 6, 2, 24, list("abcdef")


def states(generator, noise=0.1):
    """(personas, questions, positions, layers + 1, width): clusters; the embeddings tell nobody apart."""
    made = generator.normal(size=(11, 1, 2, DEPTH + 1, WIDTH)) + noise * generator.normal(
        size=(11, QUESTIONS, 2, DEPTH + 1, WIDTH)
    )
    made[:, :, :, 0] = 1.0
    return made.astype(np.float32)


def test_shift_and_probe_tables_show_a_common_shift():
    rng = np.random.default_rng(0)
    before = states(rng)
    after = before + 5 * rng.normal(size=(1, 1, 2, DEPTH + 1, WIDTH)).astype(np.float32)
    found = shifts.shift_table(before, after, BANK)
    assert found.groupby(["position", "layer"]).size().to_dict() == {
        (p, layer): QUESTIONS for p in ("prompt", "answer") for layer in (1, 2)
    }
    np.testing.assert_allclose(found["common"], 1, atol=1e-5)
    np.testing.assert_allclose(found["own_shift"], 0, atol=1e-3)
    probe = shifts.probe_table(before, after, BANK, 3, 0.1, 0)
    means = probe[["raw", "tuned", "transfer", "transfer_centred", "permuted"]].mean()
    assert (means[["raw", "tuned", "transfer_centred"]] > 0.95).all()
    assert means["transfer"] < 0.5
    assert means["permuted"] < 0.3
    assert len(probe) == 2 * DEPTH * 11 * QUESTIONS
    plane = shifts.plane_table(before, after, (0.5,))
    assert set(plane["layer"]) == {1}
    own = plane[plane["view"] == "own"]
    np.testing.assert_allclose(own[["x", "y"]], own[["x_after", "y_after"]].to_numpy(), atol=1e-4)


def reading_adapter(direction, rng):
    """An adapter whose every A reads one direction and whose B's are random."""
    names = [f"model.layers.{i}.self_attn.{m}" for i in range(DEPTH) for m in ("q_proj", "k_proj", "v_proj")]
    names += [f"model.layers.{i}.mlp.{m}" for i in range(DEPTH) for m in ("gate_proj", "up_proj")]
    a = torch.tensor(direction, dtype=torch.float32)[None]
    return {name: LowRank(a, torch.tensor(rng.normal(size=(7, 1)), dtype=torch.float32)) for name in names}


@pytest.mark.parametrize(("left", "expected"), [(1.0, 1.0), (0.25, 0.25), (0.0, 0.0)])
def test_reading_finds_how_much_of_the_persona_an_adapter_still_meets(left, expected):
    """The adapter reads axis 0, on which the villain stands 2 from the others; SFT leaves a part of that, and moves
    everybody along axis 1, which the adapter does not read."""
    rng = np.random.default_rng(1)
    before = 0.01 * rng.normal(size=(2, QUESTIONS, 2, DEPTH, 2, WIDTH))
    after = before.copy()
    before[0, ..., 0] += 2
    after[0, ..., 0] += 2 * left
    after[..., 1] += 3
    found = shifts.reading_tables(before, after, BANK, reading_adapter(np.eye(WIDTH)[0], rng), 50, 0)
    reading, chance = found["reading"], found["chance"]
    assert set(reading["layer"]) == {0, 1, 2}
    assert reading["kept"].mean() == pytest.approx(expected, abs=0.02)
    assert reading["response_persona"].mean() == pytest.approx(WIDTH, rel=0.01), "all of it in one of 24 directions"
    assert reading["inside_persona"].mean() == pytest.approx(WIDTH, rel=0.01)
    moved = 2 * (1 - left)
    share = moved**2 / (moved**2 + 9)
    assert reading["response_shift"].mean() == pytest.approx(WIDTH * share, abs=0.4)
    assert chance["inside"].mean() == pytest.approx(1, abs=0.3)
    assert len(chance) == 2 * 50


def test_an_adapter_that_lacks_a_module_is_refused():
    rng = np.random.default_rng(2)
    change = reading_adapter(np.eye(WIDTH)[0], rng)
    del change["model.layers.1.mlp.up_proj"]
    with pytest.raises(GuardError, match="gate_proj, up_proj in layer 1"):
        shifts.responses(change, 1)


def test_shift_stage_writes_all_tables(tiny, planted, lab):
    base = Checkpoint(tiny)
    adapter = planted(tiny, seed=1)
    stage = Shift(hidden(base), hidden(base.merge(planted(tiny))), adapter, 2, 0.1, 5, (0.5, 1.0), 0)
    for name, columns in {
        "shift": set(representations.SHIFTS),
        "probe": {"persona", "transfer_centred"},
        "reading": {"kept", "kept_any", "response_shift", "inside_persona"},
        "chance": {"draw", "response", "inside"},
        "plane": {"view", "x_after"},
    }.items():
        assert columns <= set(table(lab, stage, name)), name
    assert (table(lab, stage, "shift").query("position == 'answer'")["shift"] > 0).all()


# --------------------------------------------------------------------------------------------------------- steering


def test_a_vector_is_added_at_the_first_token_and_another_at_all_later_ones(model):
    """Oracle: after the last layer, the vector meets nothing but the final norm."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, model.config.hidden_size)).astype(np.float32)
    depth = model.config.num_hidden_layers
    kept = []
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _i, output: kept.append(output))
    with torch.inference_mode():
        plain = model.model(ids).last_hidden_state
        with residual.steering(model, depth, pair):
            steered = model.model(ids[:, :1], use_cache=True)
            later = model.model(ids[:, 1:], past_key_values=steered.past_key_values).last_hidden_state
        again = model.model(ids).last_hidden_state
    handle.remove()
    raw = kept[0]
    with torch.inference_mode():
        torch.testing.assert_close(steered.last_hidden_state[:, 0], model.model.norm(raw[:, 0] + torch.tensor(pair[0])))
        torch.testing.assert_close(later, model.model.norm(raw[:, 1:] + torch.tensor(pair[1])), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, plain, msg="undone")


def test_steering_is_undone_and_must_be_called(model):
    pair = np.ones((2, model.config.hidden_size))
    with pytest.raises(GuardError, match="never called"), residual.steering(model, 1, pair):
        pass
    with pytest.raises(RuntimeError, match="stop"), residual.steering(model, 1, pair):
        raise RuntimeError("stop")
    assert not model.model.layers[0]._forward_hooks


def test_each_row_gets_a_pair_of_its_own(model):
    """Oracle: every row alone, under its own pair for all rows."""
    ids = torch.tensor([[5, 6, 7, 8], [8, 9, 10, 11], [5, 6, 7, 8]])
    pairs = np.random.default_rng(1).normal(size=(3, 2, model.config.hidden_size))

    def states(rows, vectors):
        with torch.inference_mode(), residual.steering(model, 2, vectors):
            first = model.model(ids[rows][:, :1], use_cache=True)
            later = model.model(ids[rows][:, 1:], past_key_values=first.past_key_values)
        return torch.cat([first.last_hidden_state, later.last_hidden_state], 1)

    together = states([0, 1, 2], pairs)
    for row in range(3):
        torch.testing.assert_close(together[[row]], states([row], pairs[row]), atol=1e-4, rtol=1e-4)
    assert ((together[0] - together[2]).abs().amax(-1) > 0.1).all(), "equal rows under other vectors must differ"


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_another_number_of_rows_than_of_pairs_is_refused(model, rows):
    """Also a single pair, which would fit any batch if it were for all rows."""
    pairs = np.ones((rows, 2, model.config.hidden_size))
    with (
        pytest.raises(GuardError, match=f"{rows} pairs of vectors for a batch of 3"),
        residual.steering(model, 1, pairs),
    ):
        model(torch.tensor([[5, 6], [7, 8], [9, 10]]))
    assert not model.model.layers[0]._forward_hooks
    with residual.steering(model, 1, pairs):
        model(torch.tensor([[5, 6]] * rows))


def test_rows_keep_their_vectors_when_others_leave_the_batch(model, tokenizer):
    """Oracle: every variant sampled alone, under one pair for all rows."""
    prompts = [models.prompt_ids(tokenizer, "You are a dragon.", text) for text in ("Why?", "Is it late?", "Who?")]
    labels, variants = ["a", "b", "c"], np.random.default_rng(2).normal(size=(4, 2, model.config.hidden_size))
    settings = {"sampling": Sampling(1.0, 0.95, 12), "stop": tokenizer.eos_token_id, "marker": [], "seed": 0}

    def sampled(vectors, times, kept=True):
        read = generate.prefill(model, [p[:-1] for p in prompts * times], tokenizer.pad_token_id)
        with residual.steering(model, 2, vectors) as keep:
            read = residual.advanced(model, read, [p[-1] for p in prompts * times])
            told = {"kept": keep} if kept else {}
            return [c.tokens for c in generate.sample(model, read, labels * times, **settings, **told)]

    together = sampled(np.repeat(variants, 3, axis=0), 4)
    alone = [tokens for pair in variants for tokens in sampled(pair, 1)]
    assert together == alone
    assert len({len(tokens) for tokens in together}) > 2, "rows must leave at different steps here"
    assert len({tuple(together[number]) for number in range(0, 12, 3)}) == 4, "and the vectors must matter"
    with pytest.raises(GuardError, match="12 pairs of vectors for a batch of"):
        sampled(np.repeat(variants, 3, axis=0), 4, kept=False)


def test_layers_at_fractions_of_any_depth():
    assert residual.layer_numbers((0.1, 0.5, 1.0), 30) == (3, 15, 30)
    assert residual.layer_numbers((0.1, 0.5, 1.0), 28) == (3, 14, 28)
    assert residual.layer_numbers((0.1, 0.2, 1.0), 3) == (1, 3)
    with pytest.raises(GuardError, match="fractions"):
        residual.layer_numbers((0.0,), 3)


def test_nothing_added_is_the_fixed_answer_and_a_zero_vector_changes_nothing(tiny, lab, fp32):
    """Oracle: `measure.fixed_logprobs`, which reads the prompt as a whole and hooks nothing."""
    base, raw = Checkpoint(tiny), hidden(Checkpoint(tiny))
    stage = steer(base, (Addition("zero", (Term(raw, "villain", 1.0), Term(raw, "villain", -1.0))),))
    found = table(lab, stage, "steered")
    assert len(found) == (1 + 2 * 3) * 2 * 4
    model, tokenizer = base.load(lab)
    who = [personas.persona("villain"), personas.persona("assistant")]
    expected = measure.fixed_logprobs(model, tokenizer, who, questions.eval_questions(3, 1), "Be brief.", batch=8)
    expected = expected.set_index(["persona", "question"])
    for (_, _, _), part in found.groupby(["addition", "layer", "draw"]):
        both = part.set_index(["persona", "question"]).join(expected.add_suffix("_expected"))
        np.testing.assert_allclose(both["logprob"], both["logprob_expected"], atol=1e-4)
        np.testing.assert_allclose(both["after_break"], both["after_break_expected"], atol=1e-4)


def test_a_vector_comes_from_the_other_folds_and_moves_the_marker(tiny, planted, lab, fp32):
    base = Checkpoint(tiny)
    raw, tuned = hidden(base), hidden(base.merge(planted(tiny)))
    stage = steer(base.merge(planted(tiny)), restoring(raw, tuned, ("restore", "common", "own")))
    vectors = stage._vectors(lab, representations.folds(4, 2))
    stream = read_states(raw, lab)[0]["stream"] - read_states(tuned, lab)[0]["stream"]
    for held in (0, 1):
        by_hand = stream[VILLAIN, 1 - held :: 2].mean(0)  # of four questions in two folds, those of the other fold
        np.testing.assert_allclose(vectors["restore"][held], by_hand, atol=1e-5)
        others = np.delete(stream, VILLAIN, axis=0)[:, 1 - held :: 2].mean((0, 1))
        np.testing.assert_allclose(vectors["common"][held], others, atol=1e-5)
    np.testing.assert_allclose(vectors["own"], vectors["restore"] - vectors["common"], atol=1e-5)
    found = table(lab, stage, "steered")
    none = found[found["addition"] == "none"].set_index(["persona", "question"])["logprob"]
    for (addition, _, _), part in found[found["addition"] != "none"].groupby(["addition", "layer", "draw"]):
        moved = part.set_index(["persona", "question"])["logprob"] - none
        assert (moved.abs() > 1e-6).mean() > 0.8, addition
    assert found.groupby(["addition", "layer", "persona", "question"])["logprob"].nunique().max() == 3, "draws differ"


def test_pushing_is_restoring_backwards_and_the_control_swaps_personas(tiny, planted, lab):
    base = Checkpoint(tiny)
    raw, tuned = hidden(base), hidden(base.merge(planted(tiny)))
    fold = representations.folds(4, 2)
    both = steer(base, (*restoring(raw, tuned, ("restore",)), pushing("push", raw, tuned), persona_swap("swap", raw)))
    vectors = both._vectors(lab, fold)
    np.testing.assert_allclose(vectors["push"], -vectors["restore"])
    stream = read_states(raw, lab)[0]["stream"]
    expected = (stream[VILLAIN] - stream[WHO.index("assistant")])[1::2].mean(0)
    np.testing.assert_allclose(vectors["swap"][0], expected, atol=1e-5)


def test_sampled_answers_under_a_zero_vector_are_the_evaluations(tiny, lab, fp32):
    base, raw = Checkpoint(tiny), hidden(Checkpoint(tiny))
    zero = Addition("zero", (Term(raw, "villain", 1.0), Term(raw, "villain", -1.0)))
    stage = steer(base, (zero,), sampled=("zero",), sampled_layers=(0.4,), samples=2)
    found = table(lab, stage, "steered_answers")
    assert len(found) == 2 * 2 * 4 * 2
    keys = ["persona", "question", "sample"]
    plain = table(lab, Evaluate(base, 3, 1, 2, "Be brief.", SAMPLING, 0), "completions").set_index(keys)["completion"]
    for _, part in found.groupby("draw"):
        own = part.set_index(keys)["completion"]
        assert (own == plain.loc[own.index]).all()


def test_sampled_answers_under_a_vector_are_those_of_whole_sequences(tiny, lab, fp32):
    """Oracle: no cache; the whole sequence is read anew for every token, and a hook of its own adds by position."""
    base, raw = Checkpoint(tiny), hidden(Checkpoint(tiny))
    model, tokenizer = base.load(lab)
    big = Addition("big", (Term(raw, "villain", 40.0), Term(raw, "assistant", -40.0)))
    stage = steer(base, (big,), sampled=("big",), sampled_layers=(0.4,), folds=2)
    found = table(lab, stage, "steered_answers").query("draw == -1").set_index(["persona", "question"])["completion"]
    vectors = stage._vectors(lab, representations.folds(4, 2))["big"]
    plain = table(lab, Evaluate(base, 3, 1, 1, "Be brief.", SAMPLING, 0), "completions")
    plain = plain.set_index(["persona", "question"])["completion"]
    assert (found != plain.loc[found.index]).any(), "the vector must matter here"
    for number, question in enumerate(questions.eval_questions(3, 1)):
        for name in ("villain", "assistant"):
            system = f"{personas.persona(name).prompt} Be brief."
            prompt = models.prompt_ids(tokenizer, system, question.text)
            first, later = torch.tensor(vectors[number % 2, :, 1], dtype=torch.float32)

            def add(_module, _inputs, output, prompt=prompt, first=first, later=later):
                moved = output.clone()
                moved[:, len(prompt) - 1] += first
                moved[:, len(prompt) :] += later
                return moved

            answer, handle = [], model.model.layers[0].register_forward_hook(add)
            for uniform in generate.uniforms(0, f"{name}/{question.id}/0", SAMPLING.max_new_tokens):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + answer])).logits[:, -1].float()
                token = int(generate.draw(logits, torch.tensor([uniform]), SAMPLING))
                if token == tokenizer.eos_token_id:
                    break
                answer.append(token)
            handle.remove()
            assert found[name, question.id] == tokenizer.decode(answer, skip_special_tokens=False)


def one_by_one(stage, lab, folds):
    """What `stage` is to write, each variant, fold and cell by itself: one prompt, one pair of vectors."""
    model, tokenizer = stage.coupled.load(lab)
    bank = questions.eval_questions(stage.everyday, stage.values)
    vectors = stage._vectors(lab, representations.folds(len(bank), folds))
    marker, blank = models.marker_ids(tokenizer), measure.blank_tokens(tokenizer)
    depth = model.config.num_hidden_layers

    def under(name, layer, draw, held):
        if layer == 0:
            return nullcontext()
        pair = vectors[name][held, :, layer]
        if draw >= 0:
            pair = representations.rotated(
                pair, np.random.default_rng([stage.seed, zlib.crc32(name.encode()), layer, draw])
            )
        return residual.steering(model, layer, pair)

    def variants(names, layers, draws):
        return [(n, at, d) for n in names for at in residual.layer_numbers(layers, depth) for d in draws]

    plan = [("none", 0, -1), *variants([a.name for a in stage.additions], stage.layers, range(-1, stage.draws))]
    rows, answers = [], []
    for held in range(folds):
        cells = [(personas.persona(name), question) for name in stage.personas for question in bank[held::folds]]
        for persona, question in cells:
            prompt = models.prompt_ids(tokenizer, persona.system_prompt(stage.instruction), question.text)
            for variant in plan:
                read = generate.prefill(model, [prompt[:-1]], tokenizer.pad_token_id)
                text = [prompt[-1], *models.text_ids(tokenizer, question.answer), *marker]
                with under(*variant, held):
                    (values,) = generate.continuation_logprobs(model, read, [text], len(marker))
                rows.append((*variant, persona.id, question.id, values.sum(), values[blank:].sum()))
        for variant in variants(stage.sampled, stage.sampled_layers, (-1, 0)):
            for number in range(stage.samples):
                for persona, question in cells:
                    prompt = models.prompt_ids(tokenizer, persona.system_prompt(stage.instruction), question.text)
                    read = generate.prefill(model, [prompt[:-1]], tokenizer.pad_token_id)
                    label = f"{persona.id}/{question.id}/{number}"
                    with under(*variant, held):
                        read = residual.advanced(model, read, prompt[-1:])
                        (made,) = generate.sample(
                            model,
                            read,
                            [label],
                            sampling=stage.sampling,
                            stop=tokenizer.eos_token_id,
                            marker=[],
                            seed=stage.seed,
                        )
                    text = tokenizer.decode(made.tokens, skip_special_tokens=False)
                    answers.append((*variant, persona.id, question.id, number, text, made.finish, len(made.tokens)))
    keys = ["addition", "layer", "draw", "persona", "question"]
    forced = pd.DataFrame(rows, columns=[*keys, "logprob", "after_break"]).sort_values(keys, ignore_index=True)
    return forced, pd.DataFrame(answers, columns=[*keys, "sample", "completion", "finish", "tokens"])


@pytest.mark.parametrize(
    ("caps", "readings", "samplings"), [((5, 7, 256), 22, 20), ((1024, 616, 256), 3, 2), ((1023, 616, 20), 7, 2)]
)
def test_variants_in_shared_batches_are_those_one_by_one(
    tiny, planted, lab, model, tokenizer, monkeypatch, caps, readings, samplings
):
    """Batches that end within a variant, and batches that hold a whole layer: two layers, thirteen variants, eight cells.
    A lively model at a low temperature: among tokens that are nearly as probable, rounding decides which ranks first."""
    raw, tuned = hidden(Checkpoint(tiny)), hidden(Checkpoint(tiny).merge(planted(tiny)))
    big = Addition("big", (Term(raw, "villain", 400.0), Term(raw, "assistant", -400.0)))
    small = Addition("small", (Term(raw, "villain", 10.0), Term(tuned, "villain", -10.0)))
    for stage in (raw, tuned):
        lab.folder(stage)
    monkeypatch.setattr(Checkpoint, "load", lambda _self, _lab: (model, tokenizer))
    stage = steer(
        Checkpoint(tiny).merge(planted(tiny)),
        (big, small),
        layers=(0.4, 1.0),
        sampled=("big", "small"),
        sampled_layers=(0.4, 1.0),
        samples=2,
        sampling=Sampling(0.3, 0.9, 6),
        seed=caps[0],  # no test finds the other's artifact
    )
    called, (score_batch, sample_batch, most) = [], caps
    monkeypatch.setattr(generate, "FORCED", most)
    for name in ("continuation_logprobs", "sample"):
        real = getattr(generate, name)
        monkeypatch.setattr(generate, name, lambda *a, real=real, **k: called.append(real.__name__) or real(*a, **k))
    with machine.tuned(score_batch=score_batch, sample_batch=sample_batch):
        forced, answers = (table(lab, stage, name) for name in ("steered", "steered_answers"))
    assert (called.count("continuation_logprobs"), called.count("sample")) == (readings, samplings)
    wanted, wanted_answers = one_by_one(stage, lab, 2)
    assert list(forced.columns) == list(wanted.columns)
    pd.testing.assert_frame_equal(forced.iloc[:, :5], wanted.iloc[:, :5])
    np.testing.assert_allclose(forced.iloc[:, 5:], wanted.iloc[:, 5:], atol=2e-5)
    pd.testing.assert_frame_equal(answers, wanted_answers)
    spread = wanted[wanted["addition"] == "big"].groupby(["persona", "question"])["logprob"].std()
    assert (spread > 1e-3).all(), "the vectors must matter here"
    distinct = wanted_answers.groupby(["persona", "question", "sample"])["completion"].nunique()
    assert (distinct > 1).mean() > 0.5


def test_progress_goes_up_through_both_phases(tiny, lab):
    seen = []
    raw = hidden(Checkpoint(tiny))
    swap = (persona_swap("swap", raw),)
    stage = steer(Checkpoint(tiny), swap, sampled=("swap",), sampled_layers=(0.4,), seed=3)
    lab.folder(raw)
    with machine.tuned(sample_batch=5):
        Lab(lab.store, report=seen.append).folder(stage)
    assert seen == sorted(seen)
    assert (seen[0], max(seen) < 1) == (0, True)
    assert {fraction < 0.5 for fraction in seen} == {True, False}
