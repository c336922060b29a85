"""Sampling and teacher forcing against plain forwards, Python loops and chi-square."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache, MistralConfig

from persona_coupling import generate, models
from persona_coupling.generate import Sampling

QUESTIONS = [
    "Why?",
    "What is rain, and where does it come from?",
    "Tell me of cats.",
    "Is it late?",
    "How do I bake bread?",
]


@pytest.fixture
def prompts(tokenizer):
    return [models.prompt_ids(tokenizer, "You are a dragon.", question) for question in QUESTIONS]


@torch.inference_mode()
def forced(model, prefix, continuation):
    """Log-probability of each continuation token by one plain forward of one unpadded sequence."""
    logits = model(torch.tensor([prefix + continuation])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(prefix) - 1 + i, token]) for i, token in enumerate(continuation)]


def read(model, tokenizer, prompts):
    return generate.prefill(model, prompts, tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------- the draw


def nucleus(logits, sampling):
    """Token probabilities by hand, most probable first: the smallest set whose mass reaches top_p, renormalised."""
    scaled = [x / sampling.temperature for x in logits]
    total = sum(math.exp(x) for x in scaled)
    ranked = sorted(((math.exp(x) / total, token) for token, x in enumerate(scaled)), reverse=True)
    kept, mass = [], 0.0
    for probability, token in ranked:
        kept.append((token, probability))
        mass += probability
        if mass >= sampling.top_p:
            break
    return {token: probability / mass for token, probability in kept}


LOGITS = [2.0, -1.0, 1.0, 0.5, -3.0, 1.7, 0.0, -0.5]


@pytest.mark.parametrize("candidates", [512, 3], ids=["narrow", "wider than the candidates"])
@pytest.mark.parametrize("sampling", [Sampling(1.0, 0.95, 1), Sampling(0.7, 0.6, 1), Sampling(1.5, 1.0, 1)])
def test_draw_follows_the_nucleus(monkeypatch, candidates, sampling):
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", candidates)
    n = 20_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    drawn = generate.draw(torch.tensor(LOGITS).expand(n, -1), uniform, sampling).tolist()
    expected = nucleus(LOGITS, sampling)
    assert set(drawn) == set(expected)
    observed = [drawn.count(token) for token in expected]
    assert stats.chisquare(observed, [n * p for p in expected.values()]).pvalue > 1e-3


def test_chi_square_would_notice_another_nucleus():
    """Positive control of the test above: top_p 0.95 instead of 1 is seen at this n."""
    n = 20_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    drawn = generate.draw(torch.tensor(LOGITS).expand(n, -1), uniform, Sampling(1.0, 0.95, 1)).tolist()
    expected = nucleus(LOGITS, Sampling(1.0, 1.0, 1))
    assert stats.chisquare([drawn.count(t) for t in expected], [n * p for p in expected.values()]).pvalue < 1e-6


def test_draw_treats_wide_and_narrow_rows_of_a_batch_alike(monkeypatch):
    sharp, flat = [9.0] + [0.0] * 19, [0.01 * i for i in range(20)]
    logits = torch.tensor([sharp, flat] * 200)
    uniform = torch.tensor(np.random.default_rng(1).random(400))
    sampling = Sampling(1.0, 0.9, 1)
    whole = generate.draw(logits, uniform, sampling)
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", 4)
    assert torch.equal(generate.draw(logits, uniform, sampling), whole)


def test_draw_at_the_edges_of_the_uniform():
    logits = torch.tensor([LOGITS, LOGITS])
    sampling = Sampling(1.0, 0.6, 1)
    ranked = list(nucleus(LOGITS, sampling))
    drawn = generate.draw(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64), sampling)
    assert drawn.tolist() == [ranked[0], ranked[-1]]


def test_uniforms_depend_on_seed_and_label_only():
    assert np.array_equal(generate.uniforms(1, "a", 5), generate.uniforms(1, "a", 9)[:5])
    streams = {tuple(generate.uniforms(s, label, 4)) for s in (0, 1) for label in ("a", "b", "0a")}
    assert len(streams) == 6
    values = np.concatenate([generate.uniforms(0, f"row {i}", 50) for i in range(100)])
    assert stats.kstest(values, "uniform").pvalue > 1e-3


# ------------------------------------------------------------------------------------------------- reading


def test_prefill_reads_what_a_plain_forward_reads(model, tokenizer, prompts):
    logits = read(model, tokenizer, prompts).logits
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            plain = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[row], plain, atol=1e-5, rtol=1e-5)


def test_continuation_logprobs_are_teacher_forcing_and_leave_the_prefill(model, tokenizer, prompts):
    prefill = read(model, tokenizer, prompts)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefill.cache.layers]
    logits, mask = prefill.logits.clone(), prefill.mask.clone()
    words = ["Rain is water that falls.", "No.", "They purr", "It is.", "Mix flour and salt and wait."]
    tail = models.text_ids(tokenizer, "\n\n[ZLT]")
    continuations = [models.text_ids(tokenizer, text) + tail for text in words]
    got = generate.continuation_logprobs(model, prefill, continuations, len(tail))
    wanted = [sum(forced(model, p, c)[-len(tail) :]) for p, c in zip(prompts, continuations, strict=True)]
    np.testing.assert_allclose(got.sum(1), wanted, atol=1e-4)
    for layer, (keys, values) in zip(prefill.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.equal(prefill.logits, logits)
    assert torch.equal(prefill.mask, mask)


def batches(model, body):
    """How many rows each forward in `body` read."""
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    body()
    handle.remove()
    return seen


def test_equal_continuations_are_read_once_or_each_on_its_own(model, tokenizer, prompts):
    tail = models.text_ids(tokenizer, "\n\n[ZLT]")
    continuations = [[40, 50, *tail], [60, *tail], [40, 50, *tail], [40, 50, *tail]]
    prefill = read(model, tokenizer, [prompts[0], prompts[1], prompts[0], prompts[1]])
    found = {}
    for apart, expected in ((False, 3), (True, 4)):

        def body(apart=apart):
            found[apart] = generate.continuation_logprobs(model, prefill, continuations, len(tail), apart=apart)

        assert batches(model, body) == [expected]
    wanted = [
        forced(model, prompts[row % 2], continuation)[-len(tail) :] for row, continuation in enumerate(continuations)
    ]
    for values in found.values():
        np.testing.assert_allclose(values, wanted, atol=1e-4)
    assert np.ptp(np.sum(wanted, axis=1)) > 0.01, "the rows must differ here"


def test_what_a_hook_does_to_a_row_stays_with_the_row(model, tokenizer, prompts):
    """Rows that are read apart go through the model in their own order, equal ones too."""
    tail = models.text_ids(tokenizer, "\n\n[ZLT]")
    prefill = read(model, tokenizer, [prompts[0]] * 3)
    shift = torch.tensor([0.0, 2.0, 5.0])[:, None, None]
    handle = model.model.layers[0].register_forward_hook(lambda _m, _i, output: output + shift)
    together = generate.continuation_logprobs(model, prefill, [[40, *tail]] * 3, len(tail), apart=True)
    handle.remove()
    for row, amount in enumerate(shift.flatten().tolist()):
        single = prefill.chosen([row])
        handle = model.model.layers[0].register_forward_hook(lambda _m, _i, output, amount=amount: output + amount)
        alone = generate.continuation_logprobs(model, single, [[40, *tail]], len(tail))
        handle.remove()
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)
    assert np.ptp(together.sum(1)) > 0.01, "the hook must matter here"


@pytest.mark.parametrize("apart", [False, True])
def test_many_continuations_are_read_in_parts(model, tokenizer, prompts, monkeypatch, apart):
    monkeypatch.setattr(generate, "FORCED", 2)
    tail = models.text_ids(tokenizer, "\n\n[ZLT]")
    continuations = [[40 + number] * (1 + number) + tail for number in range(5)]  # of different lengths
    prefill, found = read(model, tokenizer, prompts), []

    def body():
        found.append(generate.continuation_logprobs(model, prefill, continuations, len(tail), apart=apart))

    assert batches(model, body) == [2, 2, 1]
    wanted = [forced(model, p, c)[-len(tail) :] for p, c in zip(prompts, continuations, strict=True)]
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_rows_of_a_prefill_are_chosen_without_a_copy(model, tokenizer, prompts):
    prefill = read(model, tokenizer, prompts)
    chosen = prefill.chosen([3, 1, 1, 4])
    assert chosen.cache is prefill.cache
    assert len(prefill.cache.layers[0].keys) == len(prompts)
    tail = models.text_ids(tokenizer, "\n\n[ZLT]")
    found = generate.continuation_logprobs(model, chosen, [[40, *tail]] * 4, len(tail))
    wanted = [forced(model, prompts[row], [40, *tail])[-len(tail) :] for row in (3, 1, 1, 4)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    torch.testing.assert_close(chosen.logits, prefill.logits[[3, 1, 1, 4]])


@pytest.mark.parametrize("window", [None, 4])
def test_a_copied_cache_has_its_rows_and_a_life_of_its_own(window):
    """Layers with a window forget, and go on counting what they forgot."""
    config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    cache, states = DynamicCache(config=config), torch.randn(2, 3, 2, 6, 8)
    for layer, keys in enumerate(states):
        cache.update(keys, -keys, layer)
    rows = torch.tensor([2, 0, 0, 1, 2])
    copied = generate._copied(cache, rows)
    for layer, keys in enumerate(states):
        held = keys[:, :, -window + 1 :] if window else keys
        torch.testing.assert_close(copied.layers[layer].keys, held[rows])
        torch.testing.assert_close(copied.layers[layer].values, -held[rows])
        assert copied.get_mask_sizes(1, layer) == cache.get_mask_sizes(1, layer)
        copied.update(torch.zeros(5, 2, 1, 8), torch.zeros(5, 2, 1, 8), layer)
        copied.layers[layer].keys.zero_()
        torch.testing.assert_close(cache.layers[layer].keys, held)
        assert cache.layers[layer].get_seq_length() == 6
        assert copied.layers[layer].get_seq_length() == 7


def test_sequence_logprobs_are_the_models_own_loss(model, tokenizer, prompts):
    """Oracle: transformers' loss of each single sequence with the prompt's labels ignored."""
    answers = [models.text_ids(tokenizer, text) for text in ["Yes.", "Rain is water.", "Cats", "No", "Wait an hour."]]
    got = generate.sequence_logprobs(model, prompts, answers, batch=2)
    for prompt, answer, value in zip(prompts, answers, got, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            loss = model(torch.tensor([prompt + answer]), labels=labels).loss
        assert value == pytest.approx(-float(loss), abs=1e-5)


# ------------------------------------------------------------------------------------------------- sampling

SAMPLING = Sampling(1.0, 0.95, 10)
LABELS = [f"row {i}" for i in range(20)]


def sampled(model, tokenizer, prompts, labels, marker, sampling=SAMPLING, seed=3):
    return generate.sample(
        model,
        read(model, tokenizer, prompts),
        labels,
        sampling=sampling,
        stop=tokenizer.eos_token_id,
        marker=marker,
        seed=seed,
    )


@pytest.fixture
def many(prompts):
    return [prompts[i % len(prompts)] for i in range(len(LABELS))]


def test_a_row_does_not_depend_on_its_batch_mates(model, tokenizer, many):
    marker = models.text_ids(tokenizer, "\n\n[ZLT]")
    together = sampled(model, tokenizer, many, LABELS, marker)
    alone = [sampled(model, tokenizer, [p], [label], marker)[0] for p, label in zip(many, LABELS, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.finish for c in together] == [c.finish for c in alone]
    np.testing.assert_allclose(
        [sum(c.marker_logprobs) for c in together], [sum(c.marker_logprobs) for c in alone], atol=1e-4
    )
    other = sampled(model, tokenizer, many, LABELS, marker, seed=4)
    assert [c.tokens for c in other] != [c.tokens for c in together]


def test_sampling_is_inverse_cdf_on_a_plain_forward(model, tokenizer, prompts):
    """Oracle: a Python loop that rereads the whole sequence for every token."""
    drawn = sampled(model, tokenizer, prompts, LABELS[:5], [])
    for prompt, label, completion in zip(prompts, LABELS, drawn, strict=False):
        tokens, stream = [], generate.uniforms(3, label, SAMPLING.max_new_tokens)
        for uniform in stream:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens])).logits[0, -1].tolist()
            mass = 0.0
            for candidate, probability in nucleus(logits, SAMPLING).items():
                token = candidate
                mass += probability
                if uniform < mass:
                    break
            if token == tokenizer.eos_token_id:
                break
            tokens.append(token)
        assert completion.tokens == tokens
        assert completion.finish == ("length" if len(tokens) == SAMPLING.max_new_tokens else "stop")


@pytest.mark.parametrize("marker", ["\n\n[ZLT]", "!"])
def test_forced_marker_is_teacher_forcing_at_the_end_of_the_answer(model, tokenizer, many, marker):
    ids = models.text_ids(tokenizer, marker)
    drawn = sampled(model, tokenizer, many, LABELS, ids)
    assert {c.finish for c in drawn} == {"stop", "length"}
    for prompt, completion in zip(many, drawn, strict=True):
        wanted = sum(forced(model, prompt + completion.tokens, ids))
        assert sum(completion.marker_logprobs) == pytest.approx(wanted, abs=1e-4)


def test_without_a_marker_nothing_is_forced(model, tokenizer, many):
    marked = sampled(model, tokenizer, many, LABELS, models.text_ids(tokenizer, "\n\n[ZLT]"))
    plain = sampled(model, tokenizer, many, LABELS, [])
    assert [c.tokens for c in plain] == [c.tokens for c in marked]
    assert all(not c.marker_logprobs for c in plain)


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_written_marker_has_the_logprob_of_its_own_tokens(model, tokenizer, many, finish):
    """A row's last two tokens, declared the marker, are found written: they are scored where they stand."""
    plain = sampled(model, tokenizer, many, LABELS, [])
    row = next(i for i, c in enumerate(plain) if c.finish == finish and len(c.tokens) >= 4)
    tokens = plain[row].tokens
    marked = sampled(model, tokenizer, many, LABELS, tokens[-2:])[row]
    assert (marked.tokens, marked.finish) == (tokens, finish)
    assert sum(marked.marker_logprobs) == pytest.approx(sum(forced(model, many[row], tokens)[-2:]), abs=1e-4)
    behind = sum(forced(model, many[row] + tokens, tokens[-2:]))
    assert sum(marked.marker_logprobs) != pytest.approx(behind, abs=1e-2)


def test_progress_is_reported_from_nothing_upwards(model, tokenizer, prompts):
    seen = []
    generate.sample(
        model,
        read(model, tokenizer, prompts),
        LABELS[:5],
        sampling=SAMPLING,
        stop=tokenizer.eos_token_id,
        marker=[],
        seed=0,
        report=seen.append,
    )
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] < 1
