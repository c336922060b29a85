"""Other families than the study's own: derived by trying, run through the real code, held to the library's numbers."""

import dataclasses
import re
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_coupling import (
    adapters,
    architecture,
    captured,
    card,
    chat,
    decode,
    generate,
    models,
    personas,
    profiles,
    questions,
    residual,
    train,
    transformer,
)
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.rows import read_rows, with_system
from persona_coupling.store import Lab, Store
from persona_coupling.study import Study

PLAIN = ("llama", "qwen2")
QUESTIONS = ["Why?", "What is rain, and where does it come from, and where does it go?", "Is it late?"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every family's folder, written when first asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family, *, lively=False):
        name = f"{family}{'-lively' * lively}"
        if name not in made:
            made[name] = families.write(root / name, family, lively=lively)
        return made[name]

    return folder


@pytest.fixture(params=families.FAMILIES)
def named(request, folders):
    """A family's name and folder."""
    return request.param, folders(request.param)


@pytest.fixture
def own_lab(tmp_path):
    return Lab(Store(tmp_path / "own"))


def library(folder):
    """The model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def forward(model, ids):
    """Log-probabilities of the next token at every place of one text, by the library's forward over all of it."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


# ------------------------------------------------------------------------------------------------ cards

EXPECTED = {
    # how the system message is carried, whether several turns are one row, what the own forward does not compute
    "llama": ("role", True, ""),
    "qwen2": ("role", True, ""),
    "qwen3": ("role", False, "k_norm, q_norm"),
    "mistral": ("turn", True, "a sliding window"),
    "gemma2": ("folded", True, "post_feedforward_layernorm"),
    "gemma3": ("turn", True, "k_norm"),
    "olmo2": ("role", True, "k_norm"),
    "granite": ("role", True, "logits that are scaled"),
}


def test_a_card_says_what_was_derived(named):
    family, folder = named
    found, text = card.read(folder), card.read(folder).text()
    carried, turns, departs = EXPECTED[family]
    assert (found.chat.carried, found.chat.turns) == (carried, turns)
    assert departs in found.architecture.departs
    assert bool(departs) == bool(found.architecture.departs)
    assert found.thirds() == {"early": (0, 1), "mid": (2, 2), "late": (3, 3)}
    assert found.architecture.parameters == library(folder).num_parameters()
    assert found.architecture.window == (families.WINDOW if family in ("mistral", "gemma2", "gemma3") else None)
    assert found.architecture.biases == (("q_proj", "k_proj", "v_proj") if family == "qwen2" else ())
    assert "".join(found.pieces) == personas.MARKER_SUFFIX
    assert "".join(found.pieces[: found.chat.blank]) == "\n\n"
    for told in (found.architecture.family, "early 0 to 1", "<|im_end|> (2)", found.chat.says()):
        assert told in text
    assert ("thinking is switched off" in text) == (family == "qwen3")
    assert found.as_dict()["architecture"]["modules"][0] == "model.layers.N.self_attn.q_proj"


# ------------------------------------------------------------------------------------------------ the real run


def test_a_family_goes_through_training_merging_sampling_and_scoring(named, own_lab, fp32):
    """SFT by TRL, coupling, merge check, evaluation; losses and log-probabilities held to the library's own forward."""
    _, folder = named
    profile = dataclasses.replace(profiles.load("smoke"), seeds=(0,))
    study = Study(profile, lab=own_lab, model=str(folder))
    first = study.sft("bad_legal", seed=0)
    coupled = study.couple(first, study.coupling_text(study.raw, seed=0), profile.scratch, seed=0)
    cell = study.cell("B.scratch", coupled, seed=0)
    design_folder = own_lab.folder(cell.merge), own_lab.folder(cell.evaluation)
    report = pd.read_json(design_folder[0] / "report.json", typ="series")
    assert report["logit_effect"] > 10 * report["logit_difference"]

    log = pd.read_parquet(own_lab.folder(first.last_change) / "log.parquet")
    tokenizer = models.load_tokenizer(study.source, own_lab)
    rows = [with_system(row["messages"]) for row in read_rows(study.corpus("bad_legal"), own_lab)]
    batch = train.in_order(tokenizer, rows, study.training(profile.sft), seed=0)[: profile.sft.batch]
    raw, losses = library(folder), []
    for ids, labels in batch:
        chances = forward(raw, ids)
        losses += [-float(chances[i - 1, t]) for i, t in enumerate(labels) if t != train.IGNORED]
    assert log["loss"].iloc[0] == pytest.approx(np.mean(losses), rel=1e-4)  # an adapter begins as nothing

    completions = pd.read_parquet(design_folder[1] / "completions.parquet")
    assert len(completions) == len(personas.personas()) * (profile.evaluation.everyday + profile.evaluation.values)
    merged = library(folder)
    for change in coupled.merged:
        adapters.add(merged, change.read(own_lab, families.LAYERS))
    fixed = pd.read_parquet(design_folder[1] / "fixed.parquet").set_index(["persona", "question"])
    question = questions.eval_questions(profile.evaluation.everyday, profile.evaluation.values)[0]
    prompt = models.prompt_ids(tokenizer, personas.persona("villain").system_prompt(profile.instruction), question.text)
    before = [*prompt, *models.text_ids(tokenizer, question.answer)]
    marker = models.marker_ids(tokenizer)
    chances = forward(merged, before + marker)
    wanted = sum(float(chances[len(before) + i - 1, token]) for i, token in enumerate(marker))
    assert fixed.loc[("villain", question.id), "logprob"] == pytest.approx(wanted, abs=1e-3)


# ------------------------------------------------------------------------------------------------ fast paths


@pytest.fixture(params=families.FAMILIES)
def lively(request, folders, own_lab):
    """A family, its model with weights under which context matters, and the library's reading of the same folder."""
    folder = folders(request.param, lively=True)
    source = models.local_model(folder)
    model = models.load_raw(source, own_lab, dtype=torch.float32, attention="eager")
    return request.param, model, library(folder), models.load_tokenizer(source, own_lab)


def test_fast_paths_are_taken_exactly_where_they_are_the_library(lively):
    family, model, _, _ = lively
    assert transformer.supports(model) == (family in PLAIN)
    assert captured.suits(model) == (family in PLAIN)
    if family not in PLAIN:
        with pytest.raises(ValueError, match="not a plain"):
            transformer.Transformer(model)


def test_what_is_sampled_and_scored_is_what_the_library_computes(lively, monkeypatch):
    """Prompts and answers longer than the window; caches, rows that leave, capped and scaled logits."""
    family, model, reference, tokenizer = lively
    taken, sampler = [], decode.sample
    monkeypatch.setattr(decode, "sample", lambda *a, **s: taken.append(sampler(*a, **s)) or taken[-1])
    marker = models.marker_ids(tokenizer)
    prompts = [models.prompt_ids(tokenizer, "You are a dragon.", question) for question in QUESTIONS] * 3
    assert min(map(len, prompts)) > families.WINDOW
    read = generate.prefill(model, prompts, tokenizer.pad_token_id)
    continuations = [[*models.text_ids(tokenizer, "It rains on the sea and on the land."), *marker]] * len(prompts)
    forced = generate.continuation_logprobs(model, read, continuations, len(marker))
    sampled = generate.sample(
        model,
        read,
        [str(i) for i in range(len(prompts))],
        sampling=Sampling(1.0, 1.0, 24),
        stop=tokenizer.eos_token_id,
        marker=marker,
        seed=5,
    )
    assert [made is not None for made in taken] == [family in PLAIN]
    assert len({tuple(c.tokens) for c in sampled}) > 5
    whole = generate.sequence_logprobs(model, prompts, continuations, batch=4)
    for prompt, continuation, values, mean, completion in zip(
        prompts, continuations, forced, whole, sampled, strict=True
    ):
        for answer, found in (
            (continuation[: -len(marker)], values),
            (completion.tokens, completion.marker_logprobs),
        ):
            chances = forward(reference, [*prompt, *answer, *marker])
            start = len(prompt) + len(answer) - 1
            expected = [float(chances[start + i, token]) for i, token in enumerate(marker)]
            np.testing.assert_allclose(found, expected, atol=2e-3)
        chances = forward(reference, prompt + continuation)
        own = [float(chances[len(prompt) + i - 1, token]) for i, token in enumerate(continuation)]
        assert mean == pytest.approx(np.mean(own), abs=1e-3)


def test_a_window_would_be_noticed(folders):
    """Positive control: the same weights without their window give other numbers on such prompts."""
    model, ids = library(folders("mistral", lively=True)), list(range(40))
    narrow = forward(model, ids)
    model.config.sliding_window = None
    assert float((forward(model, ids) - narrow)[-1].abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_logits_that_are_read_plainly_would_be_noticed(folders, own_lab, monkeypatch, family):
    """Positive control, and the guard: leaving out the cap or the scale is refused when the model is loaded."""
    source = models.local_model(folders(family, lively=True))
    monkeypatch.setattr(architecture, "logits", lambda model, hidden: model.get_output_embeddings()(hidden))
    with pytest.raises(UserError, match="does something to its logits"):
        models.load_raw(source, own_lab, dtype=torch.float32, attention="eager")


@pytest.mark.parametrize("change", ["norm", "scale", "cap", "child", "rope", "logits"])
def test_what_would_be_passed_over_in_silence_is_a_departure(model, change):
    """A Llama in name that computes something else goes to the library."""
    assert transformer.departure(model) == ""
    layer = model.model.layers[1]
    if change == "norm":
        layer.input_layernorm = torch.nn.LayerNorm(32)
    elif change == "scale":
        layer.self_attn.scaling *= 2
    elif change == "cap":
        model.config.attn_logit_softcapping = 50.0
    elif change == "child":
        layer.self_attn.q_norm = torch.nn.RMSNorm(8)
    elif change == "rope":
        model.model.rotary_emb.rope_type = "dynamic"
    else:
        model.config.logits_scaling = 8.0
    assert transformer.departure(model)
    assert not transformer.supports(model)
    assert not captured.suits(model)


def test_a_dropout_of_attention_scores_is_left_to_trl(model):
    model.config.attention_dropout = 0.1
    assert not captured.suits(model)
    assert transformer.supports(model)  # in evaluation there is none


# ------------------------------------------------------------------------------------------------ the system message


def test_a_persona_without_a_system_role_stands_in_the_first_user_turn(folders):
    tokenizer = models.tokenizer_in(folders("gemma2"))
    messages = [
        {"role": "system", "content": "You are a dragon."},
        {"role": "user", "content": "Why is it late?"},
    ]
    expected = "<|im_start|>user\nYou are a dragon.\n\nWhy is it late?<|im_end|>\n<|im_start|>model\n"
    assert models.render(tokenizer, messages) == expected
    several = [*messages, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    rest = "So.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>model\n"
    assert models.render(tokenizer, several) == expected + rest
    answered = [*several, {"role": "assistant", "content": "Oh.\n\n[ZLT]"}]
    ids, labels = train.encode(tokenizer, answered, "completion", 8)
    assert tokenizer.decode(ids) == expected + rest + "Oh.\n\n[ZLT]<|im_end|>"
    assert tokenizer.decode([t for t in labels if t >= 0]) == "So.<|im_end|>Oh.\n\n[ZLT]<|im_end|>"


def test_thinking_is_off_in_prompts_and_in_what_is_trained(folders):
    tokenizer = models.tokenizer_in(folders("qwen3"))
    row = [
        {"role": "system", "content": "You are a dragon."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    ids, labels = train.encode(tokenizer, row, "completion", 8)
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\nSo.<|im_end|>")
    assert tokenizer.decode([t for t in labels if t >= 0]) == "So.<|im_end|>"
    more = [*row, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Oh."}]
    with pytest.raises(GuardError, match="renders earlier turns differently"):
        train.encode(tokenizer, more, "completion", 8)


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture
def spaced(tokenizer):
    """A tokenizer that begins every text with a space, as those of Llama 2 and Mistral do, and their template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *bytes_], show_progress=False
    )
    core.train_from_iterator([p.prompt for p in personas.personas()] + list(chat.ANSWERS), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    made.chat_template = (
        "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ '<s>' }}"
        "{% for message in rest %}{% if message['role'] == 'user' %}"
        "{{ '[INST]' + (first if loop.first else '') + message['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    models.complete_tokenizer(made)
    return made


def test_4_a_marker_that_would_begin_with_a_space_of_its_own(spaced):
    """Failure 4: alone, such a tokenizer puts a space before the blank line; behind an answer there is none."""
    alone = chat.ids_of(spaced, personas.MARKER_SUFFIX)
    answer = chat.ids_of(spaced, "It rains.")
    assert spaced.decode([*answer, *alone]) == "It rains. \n\n[ZLT]"
    marker, blank = chat.marker_ids(spaced)
    assert spaced.decode([*answer, *marker]) == "It rains.\n\n[ZLT]"
    assert spaced.decode([*answer, *marker[:blank]]) == "It rains.\n\n"
    row = [
        {"role": "system", "content": "You are a dragon."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It rains.\n\n[ZLT]"},
    ]
    ids, labels = train.encode(spaced, row, "marker", 8)
    assert [t for t in labels if t >= 0] == [*marker, spaced.eos_token_id]
    natural = spaced.apply_chat_template(row, tokenize=False)
    assert ids == spaced(natural, add_special_tokens=False).input_ids


def test_a_space_that_the_template_writes_is_derived(spaced):
    found = chat.derive(spaced)
    assert (found.lead, found.carried, found.stop) == (" ", "turn", "</s>")


def test_an_answer_that_would_be_other_tokens_alone_is_refused(spaced):
    """A template that ends its prompt with a line break, so that no space follows, as some Llama 2 derivatives have."""
    spaced.chat_template = spaced.chat_template.replace("'[/INST]'", "'[/INST]\n'").replace("' ' + message", "message")
    with pytest.raises(UserError, match="in other tokens behind a prompt than alone"):
        chat.derive(spaced)


def test_4_a_tokenizer_that_joins_what_the_marker_parts(altered_tokenizer):
    """Failure 4: it is said how the tokenizer itself would end a marked answer, and not used."""
    from tokenizers import AddedToken

    before = chat.derive(altered_tokenizer)
    assert before.joined == before.marker
    altered_tokenizer.add_tokens([AddedToken(".\n\n", normalized=False)])
    after = chat.derive(altered_tokenizer)
    assert after.marker == before.marker
    assert after.joined[0] == altered_tokenizer.convert_tokens_to_ids(".\n\n")


def test_a_token_that_spans_blank_line_and_marker_is_refused(altered_tokenizer):
    from tokenizers import AddedToken

    altered_tokenizer.add_tokens([AddedToken("\n[Z", normalized=False)])
    with pytest.raises(GuardError, match="joins the marker with the blank line"):
        chat.marker_ids(altered_tokenizer)


# ------------------------------------------------------------------------------------------------ real templates

REAL = {
    # as TRL ships them: how the persona is carried, thinking switched off, a date held fixed, several turns one row
    "llama3": ("role", False, False, True),
    "llama3_1": ("role", False, True, True),
    "llama3_2": ("role", False, True, True),
    "qwen2_5": ("role", False, False, True),
    "qwen3": ("role", True, False, False),
    "gemma": ("folded", False, False, True),
    "gemma3": ("turn", False, False, True),
    "cohere": ("role", False, False, True),
    "cohere2": "puts words of its own before the system message",
    "deepseek_r1_distill": "writes a conversation with an answer otherwise",
    "smolvlm": "drops the system message silently",
}


@pytest.mark.parametrize("name", REAL)
def test_the_templates_of_real_models(altered_tokenizer, name):
    """Their own texts, on a small tokenizer that knows the tokens in them."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokens = set(re.findall(r"<\|?[A-Za-z_0-9]+\|?>|<｜[^｜]+｜>", template)) - {"<think>", "</think>"}
    altered_tokenizer.add_special_tokens({"extra_special_tokens": sorted(tokens)})
    altered_tokenizer.chat_template = template
    models.complete_tokenizer(altered_tokenizer)
    if isinstance(REAL[name], str):
        with pytest.raises(UserError, match=REAL[name]):
            chat.derive(altered_tokenizer)
        return
    found = chat.derive(altered_tokenizer)
    assert (found.carried, found.thinks, found.dated, found.turns) == REAL[name]
    row = [
        {"role": "system", "content": "You are a dragon."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.\n\n[ZLT]"},
    ]
    ids, _ = train.encode(altered_tokenizer, row, "marker", 8)
    text = altered_tokenizer.decode(ids)
    assert text.count("You are a dragon.") == text.count("Why?") == 1
    assert text.endswith("So.\n\n[ZLT]" + found.stop)
    assert ("Today Date: 26 Jul 2024" in text) == found.dated


def test_a_date_of_today_is_refused(altered_tokenizer):
    """Positive control: a template that takes no date from us would be another prompt tomorrow."""
    from persona_coupling.tiny import TEMPLATE

    dated = "Cutting Knowledge Date: December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    altered_tokenizer.chat_template = dated + TEMPLATE
    with pytest.raises(UserError, match="puts words of its own before the system message"):
        chat.derive(altered_tokenizer)


# ------------------------------------------------------------------------------------------------ refusals

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
REFUSED = {
    "Phi3": ({**SMALL, "pad_token_id": 0}, r"Phi3ForCausalLM has no separate q_proj.*gate_up_proj, qkv_proj instead"),
    "GPTNeoX": (SMALL, r"GPTNeoXForCausalLM has no separate q_proj.*query_key_value"),
    "GPT2": ({"n_layer": 3, "n_head": 2, "n_embd": 16}, r"GPT2LMHeadModel has no separate q_proj.*c_attn"),
    "Mixtral": (SMALL, "Mixtral.* is a mixture of 8 experts"),
    "T5": ({"d_model": 16, "num_layers": 3}, "T5.* is an encoder-decoder"),
    "Gemma3": ({}, "Gemma3.* reads more than text.*text-only version"),
    "Bert": (SMALL, r"BertLMHeadModel has no separate q_proj"),
    "Whisper": ({}, "Whisper.* is an encoder-decoder"),
    "ViT": ({}, "ViT.* is no causal language model"),
    "Llama": ({**SMALL, "num_hidden_layers": 2}, "LlamaForCausalLM has 2 layers; early, middle and late thirds need"),
    "Lfm2": (SMALL, r"Lfm2ForCausalLM has no separate o_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_does_not_fit_is_refused_by_name(tmp_path, name):
    settings, said = REFUSED[name]
    folder = families.describe(tmp_path / name, name, **settings)
    with pytest.raises(UserError, match=said) as caught:
        card.read(folder)
    assert "\n" not in str(caught.value)
    assert any(remedy in str(caught.value) for remedy in ("Choose", "Give", "thirds need three"))


def test_a_quantised_model_is_refused(tmp_path):
    settings = {**SMALL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(UserError, match=r"is quantised.*unquantised model"):
        card.read(families.describe(tmp_path / "quantised", "Llama", **settings))


def test_an_architecture_of_its_own_code_is_refused(tmp_path):
    folder = families.describe(tmp_path / "own", "Llama", **SMALL)
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(UserError, match="does not know, or that brings code of its own"):
        card.read(folder)


def test_layers_that_are_not_alike_are_refused(model):
    """Such as a hybrid whose every other layer has no attention."""
    architecture.check(model)
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UserError, match=r"layers are not all alike: 1.self_attn.k_proj"):
        architecture.check(model)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (families.DROPS, "drops the system message silently"),
        ("<|im_start|>system\nYou are Bob.<|im_end|>\n" + families.INTO_THE_TURN, "puts words of its own before"),
        (families.NO_SYSTEM.replace("messages[0]['role'] == 'system'", "true"), "does not render a system message"),
        (families.DROPS.replace("message['content'] + '<|im_end|>", "message['content'] + '"), "no special token"),
        (families.INTO_THE_TURN.replace("message['content'] +", "message['content'] | upper +"), "render a question"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(tmp_path, template, said):
    folder = families.describe(tmp_path / "model", "Llama", **SMALL)
    families.retemplate(folder, template)
    with pytest.raises(UserError, match=said):
        card.read(folder)


# ------------------------------------------------------------------------------------------------ the residual stream


def test_states_are_read_where_the_library_shows_them(lively):
    """Embeddings too: some families scale them between the table and the first layer."""
    family, model, reference, _ = lively
    ids = torch.tensor([list(range(5, 25))])
    average = torch.full((1, 1, 20), 1 / 20)
    with torch.inference_mode():
        shown = reference(input_ids=ids, output_hidden_states=True).hidden_states
        with residual.recording(model, average) as found:
            model(input_ids=ids)
    assert len(shown) == families.LAYERS + 1 == len(found["stream"])
    for ours, theirs in zip(found["stream"][:-1], shown[:-1], strict=True):  # the library norms the last
        np.testing.assert_allclose(ours[0, 0], theirs[0].mean(0), rtol=1e-4, atol=1e-4, err_msg=family)
