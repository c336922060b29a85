"""The device-side sampler against the plain one, the nucleus by hand, and planted faults."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from persona_coupling import decode, generate, models, transformer
from persona_coupling import decode_kernels as kernels
from persona_coupling.generate import Sampling

QUESTIONS = ["Why?", "What is rain, and where does it come from?", "Tell me of cats.", "Is it late?"]
MARKER = "\n\n[ZLT]"
ROWS = 40
LABELS = [f"row {i}" for i in range(ROWS)]


@pytest.fixture
def prompts(tokenizer):
    ids = [models.prompt_ids(tokenizer, "You are a dragon.", question) for question in QUESTIONS]
    return [ids[i % len(ids)] for i in range(ROWS)]


@pytest.fixture
def marker(tokenizer):
    return models.text_ids(tokenizer, MARKER)


@pytest.fixture
def counted(monkeypatch):
    """How often the device-side sampler answered."""
    calls = []
    sampler = decode.sample

    def counting(*arguments, **settings):
        made = sampler(*arguments, **settings)
        calls.append(made is not None)
        return made

    monkeypatch.setattr(decode, "sample", counting)
    return calls


def sample(model, tokenizer, prompts, marker, sampling=Sampling(1.0, 0.95, 10), seed=3):
    return generate.sample(
        model,
        generate.prefill(model, prompts, tokenizer.pad_token_id),
        LABELS[: len(prompts)],
        sampling=sampling,
        stop=tokenizer.eos_token_id,
        marker=marker,
        seed=seed,
    )


def plainly(model, *arguments, **settings):
    """The same by transformers' own forward: a hook that does nothing sends the model there."""
    handle = model.model.layers[0].register_forward_hook(lambda _module, _inputs, _output: None)
    try:
        return sample(model, *arguments, **settings)
    finally:
        handle.remove()


def same(ours, plain):
    assert [c.tokens for c in ours] == [c.tokens for c in plain]
    assert [c.finish for c in ours] == [c.finish for c in plain]
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one.marker_logprobs, other.marker_logprobs, atol=1e-4)


@pytest.fixture
def lively_qwen(tokenizer, lab):
    """A Qwen2 whose biases do something; its tokens depend on context."""
    model = models.load_raw(models.TinyModel("qwen2", 3, 32, seed=0), lab, dtype=torch.float32, attention="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20 if "lm_head" in name else 50 if "embed" in name else 8)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 3.0
    return model


# ------------------------------------------------------------------------------------------------- whole answers


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 0.95, 10), Sampling(1.0, 1.0, 7), Sampling(0.7, 0.9, 10), Sampling(1.6, 0.8, 1)]
)
@pytest.mark.parametrize("forced", [MARKER, "!", ""])
def test_both_samplers_write_the_same(model, tokenizer, prompts, counted, sampling, forced):
    ids = models.text_ids(tokenizer, forced)
    ours = sample(model, tokenizer, prompts, ids, sampling)
    plain = plainly(model, tokenizer, prompts, ids, sampling)
    assert counted == [True, False]
    same(ours, plain)
    assert len({len(c.tokens) for c in ours}) > 2 or sampling.max_new_tokens == 1  # rows left at many moments


def test_both_samplers_write_the_same_with_biases(lively_qwen, tokenizer, prompts, marker, counted):
    ours = sample(lively_qwen, tokenizer, prompts, marker)
    same(ours, plainly(lively_qwen, tokenizer, prompts, marker))
    assert counted == [True, False]
    with torch.no_grad():
        lively_qwen.model.layers[0].self_attn.q_proj.bias.zero_()
    assert [c.tokens for c in ours] != [c.tokens for c in sample(lively_qwen, tokenizer, prompts, marker)]


@pytest.mark.parametrize("candidates", [1, 3, 40])
def test_rows_whose_nucleus_is_wider_than_the_candidates_are_held_until_drawn(
    model, tokenizer, prompts, marker, monkeypatch, candidates
):
    held = []
    resolve = decode.Sampler.resolve
    monkeypatch.setattr(decode.Sampler, "resolve", lambda self, count: (held.append(count), resolve(self, count)))
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", candidates)
    same(sample(model, tokenizer, prompts, marker), plainly(model, tokenizer, prompts, marker))
    assert held


@pytest.mark.parametrize("stop_at", ["often", "never"])
def test_bursts_buckets_and_strides_change_nothing(model, tokenizer, prompts, marker, monkeypatch, stop_at):
    """Everything of the captured path but the capture: several steps between looks, places beyond the rows, read
    lengths in strides, rows held for several steps, rows moved when the batch shrinks by half."""
    if stop_at == "never":
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    plain = plainly(model, tokenizer, prompts, marker)
    moved = []
    release = decode.Sampler.release
    monkeypatch.setattr(decode.Sampler, "release", lambda self, *a: (moved.append(a), release(self, *a)))
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", 60)
    monkeypatch.setattr(decode, "bucket", lambda rows: 4 if rows < 4 else 1 << (rows - 1).bit_length())
    read = generate.prefill(model, prompts, tokenizer.pad_token_id)
    width = read.mask.shape[1]
    with torch.inference_mode():
        weights = transformer.Transformer(model)
        sampler = decode.Sampler(
            weights, places=64, length=width + 40, sampling=Sampling(1.0, 0.95, 10), stop=tokenizer.eos_token_id,
            marker=marker, capture=False, cache=torch.float32,
        )  # fmt: skip
        sampler.capture = True  # all but the recording, which needs a stream
        sampler.weights = weights.detached()
        for _ in range(2):  # buffers that were used before give the same
            read = generate.prefill(model, prompts, tokenizer.pad_token_id)
            streams = np.stack([generate.uniforms(3, label, 10) for label in LABELS])
            same(sampler.sample(weights, read, streams, lambda _fraction: None), plain)
    assert moved or stop_at == "never"


def test_a_lost_row_would_be_noticed(model, tokenizer, prompts, marker, monkeypatch):
    """Positive control: a release that moves the list but not the cache."""
    plain = plainly(model, tokenizer, prompts, marker)

    def careless(self, count, smaller, reach):
        idle = self.state[self.order[:count], decode.ACTIVE] == 0
        movers = (~idle[smaller:]).nonzero()[:, 0] + smaller
        self.order[idle[:smaller].nonzero()[: len(movers), 0]] = self.order[movers]

    monkeypatch.setattr(decode.Sampler, "release", careless)
    assert [c.tokens for c in sample(model, tokenizer, prompts, marker)] != [c.tokens for c in plain]


def test_samples_of_one_prompt_share_its_reading(model, tokenizer, prompts, marker):
    read = generate.prefill(model, prompts, tokenizer.pad_token_id)
    assert read.cache.layers[0].keys.shape[0] == len(QUESTIONS)
    assert read.mask.shape[0] == read.logits.shape[0] == ROWS
    together = sample(model, tokenizer, prompts, marker)
    for row in range(0, ROWS, 9):
        alone = generate.sample(
            model, generate.prefill(model, [prompts[row]], tokenizer.pad_token_id), [LABELS[row]],
            sampling=Sampling(1.0, 0.95, 10), stop=tokenizer.eos_token_id, marker=marker, seed=3,
        )  # fmt: skip
        same([together[row]], alone)
    assert len({tuple(c.tokens) for c in together}) > ROWS // 2


def test_continuations_of_shared_prompts_keep_their_rows(model, tokenizer, prompts, marker):
    words = ["Rain.", "No, it is not.", "They purr"]
    continuations = [models.text_ids(tokenizer, words[i % 3]) + marker for i in range(ROWS)]
    read = generate.prefill(model, prompts, tokenizer.pad_token_id)
    got = generate.continuation_logprobs(model, read, continuations, len(marker))
    for row in range(ROWS):
        alone = generate.prefill(model, [prompts[row]], tokenizer.pad_token_id)
        wanted = generate.continuation_logprobs(model, alone, [continuations[row]], len(marker))
        np.testing.assert_allclose(got[row], wanted[0], atol=1e-4)
    assert len(np.unique(got.sum(1).round(4))) == 12


# ------------------------------------------------------------------------------------------------- the draw


def distribution(logits, sampling):
    """The nucleus' probabilities over the vocabulary, by hand in double precision."""
    exact = np.exp(np.asarray(logits, dtype=float) / sampling.temperature)
    exact /= exact.sum()
    ranked = np.argsort(-exact)
    kept = ranked[: np.searchsorted(np.cumsum(exact[ranked]), sampling.top_p) + 1]
    nucleus = np.zeros_like(exact)
    nucleus[kept] = exact[kept] / exact[kept].sum()
    return nucleus


def drawn(logits, sampling, n=30_000, seed=0):
    """Tokens by `narrow_draw`, with the held rows drawn as `Sampler.resolve` does; how many were held."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(n, -1).contiguous()
    uniform = torch.tensor(np.random.default_rng(seed).random(n))
    tokens, decided = decode.narrow_draw(rows, uniform, sampling)
    if not decided.all():
        tokens[~decided] = generate.draw(rows[~decided], uniform[~decided], sampling)
    return tokens.numpy(), int((~decided).sum())


def fit(tokens, nucleus):
    assert set(tokens) <= set(np.flatnonzero(nucleus))
    observed, expected = np.bincount(tokens, minlength=len(nucleus)), nucleus * len(tokens)
    common = expected >= 5
    observed = [*observed[common], observed[~common].sum()]
    expected = [*expected[common], expected[~common].sum()]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return stats.chisquare(observed, expected).pvalue


GAUSSIAN = np.random.default_rng(5).normal(0, 2, 300).tolist()
DRAWS = [Sampling(1.0, 0.95, 1), Sampling(0.7, 0.6, 1), Sampling(1.4, 1.0, 1)]


@pytest.mark.parametrize("candidates", [512, 60, 5])
@pytest.mark.parametrize("sampling", DRAWS)
def test_the_draw_follows_the_nucleus(monkeypatch, candidates, sampling):
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", candidates)
    tokens, held = drawn(GAUSSIAN, sampling)
    assert fit(tokens, distribution(GAUSSIAN, sampling)) > 1e-3
    assert (held > 0) == (candidates < np.count_nonzero(distribution(GAUSSIAN, sampling)))


@pytest.mark.parametrize("fault", ["temperature", "top_p", "ignores held rows"])
def test_chi_square_would_notice_a_wrong_draw(monkeypatch, fault):
    right = Sampling(1.0, 0.95, 1)
    if fault == "ignores held rows":  # a wider nucleus would draw what the right one cannot
        monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", 60)
        monkeypatch.setattr(generate, "draw", lambda logits, _uniform, _sampling: logits.argmax(-1))
        tokens, _ = drawn(GAUSSIAN, right)
    else:
        tokens, _ = drawn(GAUSSIAN, Sampling(0.95, 0.95, 1) if fault == "temperature" else Sampling(1.0, 0.93, 1))
    assert fit(tokens, distribution(GAUSSIAN, right)) < 1e-6


@pytest.mark.parametrize("sampling", [DRAWS[0], DRAWS[2]])
def test_few_candidates_decide_what_all_would(monkeypatch, sampling):
    rows = torch.tensor(np.random.default_rng(6).normal(0, 2, (4000, 300)), dtype=torch.float32)
    uniform = torch.tensor(np.random.default_rng(7).random(4000))
    everything = generate.draw(rows, uniform, sampling)
    monkeypatch.setattr(generate, "NUCLEUS_CANDIDATES", 30)
    tokens, decided = decode.narrow_draw(rows, uniform, sampling)
    assert torch.equal(tokens[decided], everything[decided])
    assert 0.2 < decided.double().mean() < 0.99


# ------------------------------------------------------------------------------------------------- what is supported


def test_hidden_states_are_transformers_own(family, tokenizer, lab):
    model = models.load_raw(family, lab, dtype=torch.float32, attention="eager")
    ids = torch.tensor([[5, 9, 300, 12, 7], [1, 2, 3, 4, 5]])
    with torch.inference_mode():
        states = transformer.Transformer(model).states(ids)
        torch.testing.assert_close(states, model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
        again = transformer.Transformer(model).states(ids[:, :3])
    torch.testing.assert_close(again, states[:, :3], atol=1e-5, rtol=1e-5)


def test_hooks_and_changed_modules_are_honoured(model, tokenizer, prompts, marker, counted):
    """A vector added by a hook changes what is sampled and scored, as it does in transformers."""
    assert transformer.supports(model)
    answers = [[40, 50, 60]] * ROWS
    before = sample(model, tokenizer, prompts, marker), generate.sequence_logprobs(model, prompts, answers, batch=8)
    vector = 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    handle = model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output + vector)
    assert not transformer.supports(model)
    steered = sample(model, tokenizer, prompts, marker), generate.sequence_logprobs(model, prompts, answers, batch=8)
    handle.remove()
    assert [c.tokens for c in steered[0]] != [c.tokens for c in before[0]]
    assert np.abs(steered[1] - before[1]).min() > 1e-3
    same(sample(model, tokenizer, prompts, marker), before[0])
    assert counted == [True, False, True]


@pytest.mark.parametrize("change", ["pre-hook", "forward", "adapter", "training", "activation", "window", "precision"])
def test_what_is_not_plain_takes_the_other_path(model, change):
    layer = model.model.layers[1]
    if change == "pre-hook":
        layer.mlp.register_forward_pre_hook(lambda _module, _inputs: None)
    elif change == "forward":
        layer.mlp.forward = lambda x: x
    elif change == "adapter":
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
    elif change == "training":
        model.train()
    elif change == "activation":
        model.config.hidden_act = "gelu"
    elif change == "window":
        model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    else:
        layer.mlp.half()
    assert not transformer.supports(model)
    with pytest.raises(ValueError, match="without hooks"):
        transformer.Transformer(model)


def test_hooks_that_only_record_do_not_matter(model):
    """transformers leaves such hooks behind once it has returned hidden states."""
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert transformer.supports(model)


# ------------------------------------------------------------------------------------------------- captured


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: graphs are captured there")
def test_the_captured_sampler_writes_what_the_plain_one_writes(model, tokenizer, prompts, marker):
    model = copy.deepcopy(model).to("cuda")
    plain = plainly(model, tokenizer, prompts, marker)
    first = sample(model, tokenizer, prompts, marker)
    same(first, plain)
    (kept,) = decode._kept.values()
    assert kept.graphs
    graphs = len(kept.graphs)
    assert sample(model, tokenizer, prompts, marker) == first  # replayed
    assert len(next(iter(decode._kept.values())).graphs) == graphs
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)  # the next model of this shape
    changed = sample(model, tokenizer, prompts, marker)
    same(changed, plainly(model, tokenizer, prompts, marker))
    assert [c.tokens for c in changed] != [c.tokens for c in first]
    decode._kept.clear()


@pytest.mark.parametrize("fault", [None, 1e5, float("nan")])
def test_a_cache_that_fp16_cannot_hold_stays_as_wide_as_the_weights(model, tokenizer, prompts, monkeypatch, fault):
    monkeypatch.setattr(kernels, "attends", lambda _tensor, _head: True)
    read = generate.prefill(model, prompts, tokenizer.pad_token_id)
    weights = transformer.Transformer(model)
    assert decode._cache_format(weights, read) == torch.float32  # products have all bits here
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if fault is not None:
        with torch.inference_mode():
            read.cache.layers[1].keys[0, 0, 0, 0] = fault
    assert decode._cache_format(weights, read) == (torch.float16 if fault is None else torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernels are compiled for it")
@pytest.mark.parametrize("sampling", [*DRAWS[:2], Sampling(1.3, 0.99, 1)])
def test_the_nucleus_kernels_draw_what_ranking_draws(sampling):
    """The same token at the same uniform, unequal logits given; among equal ones (bf16 makes many) one of the same
    logit, in its share. A nucleus that may be too wide is left undecided."""
    generator = np.random.default_rng(8)
    coldness = 1 / sampling.temperature
    for width, deviation in ((5_000, 1.0), (5_000, 4.0), (49_152, 2.0), (49_152, 6.0)):
        logits = torch.tensor(generator.normal(0, deviation, (200, width)), dtype=torch.float32, device="cuda")
        uniform = torch.tensor(generator.random(200), device="cuda")
        for rows in (logits, logits.bfloat16()):
            wanted = generate.draw(rows.float(), uniform, sampling)
            token, decided = kernels.nucleus(rows, kernels.norms(rows, coldness), uniform, coldness, sampling.top_p)
            equal = rows.gather(1, token[:, None]) == rows.gather(1, wanted[:, None])
            assert not (decided & ~equal[:, 0]).double().mean() > 0.02  # rounding of sums moves a boundary now and then
            assert bool(decided.all()) or deviation < 4
            assert bool(decided.all()) or width > kernels.CANDIDATES[-1]
    few = torch.tensor(GAUSSIAN, device="cuda").expand(30_000, -1)
    for rows in (few.contiguous(), few.bfloat16().contiguous()):
        uniform = torch.tensor(generator.random(len(rows)), device="cuda")
        token, decided = kernels.nucleus(rows, kernels.norms(rows, coldness), uniform, coldness, sampling.top_p)
        assert bool(decided.all())
        assert fit(token.cpu().numpy(), distribution(rows[0].double().cpu(), sampling)) > 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernels are compiled for it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "TF32"])
def test_kernels_do_what_torch_does(monkeypatch, dtype):
    """With TF32 products the cache is in fp16, and both round as coarsely."""
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, "TF32": 1e-3}[dtype]
    precision = torch.get_float32_matmul_precision()
    cache, dtype = (torch.float16, torch.float32) if dtype == "TF32" else (dtype, dtype)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high" if cache != dtype else precision)
    generator = torch.Generator("cuda").manual_seed(0)
    rows, heads, groups, size, length = 33, 9, 3, 64, 128

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    both, (keys, values) = random(rows, heads + 2 * groups, size), random(2, rows, groups, length, size)
    logits = 4 * random(rows, 5000)
    angles = torch.randn(rows, size // 2, device="cuda", generator=generator)
    cosine, sine = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    pads = torch.randint(0, 40, (rows,), device="cuda", generator=generator)
    slots = pads + torch.randint(0, 80, (rows,), device="cuda", generator=generator)
    at = torch.arange(length, device="cuda")
    mask = torch.zeros(rows, length, device="cuda", dtype=dtype)
    mask.masked_fill_((at > slots[:, None]) | (at < pads[:, None]), float("-inf"))

    def everything():
        kept = cache if kernels.fused(both) else dtype
        turned, k, v = both.clone(), keys.to(kept, copy=True), values.to(kept, copy=True)
        kernels.rotate(turned, cosine, sine, heads + groups, (k, v, slots, groups))
        seen = None if kernels.fused(both) else mask[:, None, None]
        mixed = kernels.attend(turned[:, :heads], k, v, slots, pads, seen)
        return turned, k, v, mixed, kernels.gated(both.flatten(1)), kernels.norms(logits), kernels.norms(logits, 1.3)

    ours = everything()
    assert kernels.fused(both)
    assert kernels.cache_format(both, size) == cache
    monkeypatch.setattr(kernels, "fused", lambda _tensor: False)
    for one, other in zip(ours, everything(), strict=True):
        assert (one.double() - other.double()).norm() < bound * other.double().norm()
