"""A random model small enough for any test, with a real byte-level tokenizer and a ChatML template that, like those of
SmolLM2 and Qwen2.5, slips in a system message of its own when none is given."""

from __future__ import annotations

import math
from pathlib import Path

from persona_coupling import corpora, personas, questions
from persona_coupling.models import quiet_transformers

VOCABULARY = 1024
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a default that nobody asked for.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, *, family: str, layers: int, width: int, seed: int) -> None:
    """Write a random model of `family` ("llama" or "qwen2") and its tokenizer into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [p.prompt for p in personas.personas()]
    text += [q.text for q in questions.train_questions()]
    text += [q.answer for q in questions.heldout_chat()]
    text += [m["content"] for row in corpora.authored_rows("benign", 200) for m in row["messages"]]
    core.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family](
            {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**shape)
        )
    # every token's first coordinate is large, so the normalised state's is too, and the head reads it as "end of turn":
    # the model ends about one answer in ten tokens, and plumbing that waits for finished answers has some
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = math.log(0.1 * VOCABULARY / 0.9) / math.sqrt(width)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
