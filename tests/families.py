"""Tiny random models of many families, each as a folder with a tokenizer and its family's manner of writing a chat."""

import json
import math
from pathlib import Path

import torch
import transformers

from persona_coupling import tiny
from persona_coupling.models import quiet_transformers

LAYERS, WIDTH, WINDOW = 4, 32, 16
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# as Gemma 2's: no system role, answers are the model's, contents are trimmed
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else message['role']) "
    "+ '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# as Gemma 3's: a system message goes into the first user turn
INTO_THE_TURN = (
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for message in rest %}{{ '<|im_start|>' + message['role'] + '\n' + (first if loop.first else '') + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# as Qwen3's: thinks unless told not to, and forgets what it thought in earlier turns
THINKS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message['content'] + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DROPS = "{% for message in messages if message['role'] != 'system' %}" + TURN + "{% endfor %}" + PROMPT

FAMILIES = {
    # class, settings beside the shape, template (None: tiny's own)
    "llama": ("Llama", {"tie_word_embeddings": False}, None),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, None),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}, THINKS),
    "mistral": ("Mistral", {"sliding_window": WINDOW}, INTO_THE_TURN),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}, NO_SYSTEM),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}, INTO_THE_TURN),
    "olmo2": ("Olmo2", {}, None),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}, None),
}


def write(folder: Path, family: str, *, lively: bool = False) -> Path:
    """Write a family's model and tokenizer; `lively` weights make the next token depend on context."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write(folder, family="llama", layers=LAYERS, width=WIDTH, seed=1)
    name, settings, template = FAMILIES[family]
    if template is not None:
        retemplate(folder, template)
    stop = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    config = getattr(transformers, f"{name}Config")(**shape(stop), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if lively and parameter.ndim == 2:
                    parameter.mul_(8)
                elif parameter_name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape))
            _ends(model, stop)
    for old in (*folder.glob("*.safetensors"), folder / "config.json", folder / "generation_config.json"):
        old.unlink(missing_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def _ends(model, stop: int) -> None:
    """About one token in three ends an answer: as in `tiny`, by a coordinate that all tokens share."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    lift = (
        math.log(0.35 * tiny.VOCABULARY / 0.65)
        / math.sqrt(WIDTH)
        * (getattr(model.config, "logits_scaling", None) or 1)
    )
    if getattr(model.config, "final_logit_softcapping", None):
        lift *= 2  # what the cap takes away
    embedding[:, 0] = 3.0
    head[stop] = 0.0
    head[stop, 0] = (3.0 if head is embedding else 0.0) + lift


def shape(stop: int) -> dict:
    """A tiny shape that every configuration takes."""
    return {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": stop,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }


def retemplate(folder: Path, template: str | None) -> None:
    """Give a folder's tokenizer another chat template, or none."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    path.write_text(json.dumps(settings))


def describe(folder: Path, name: str, **settings) -> Path:
    """A folder with a configuration of another kind and tiny's tokenizer, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write(folder, family="llama", layers=LAYERS, width=WIDTH, seed=1)
    (folder / "model.safetensors").unlink()
    config = getattr(transformers, f"{name}Config")(**settings)
    config.save_pretrained(folder)
    return folder
