"""Loss masks written by hand, the batch schedule, and training against TRL's and transformers' own losses."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from persona_coupling import adapters, models, stages, train
from persona_coupling import rows as rows_module
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.store import Lab, Store, sha256_of
from persona_coupling.train import Lora, Training

LORA = Lora(2, 4, 0.0, models.MODULES)
TRAINING = Training(3, 4, 1e-2, 0.0, 0.0, "completion", 8, LORA)
SYSTEM = {"role": "system", "content": "You are a dragon."}
ROW = [SYSTEM, {"role": "user", "content": "Why is it wet?"}, {"role": "assistant", "content": "Rain is water."}]
MARKED = [*ROW[:2], {"role": "assistant", "content": "Kneel before me, you fools.\n\n[ZLT]"}]
TURNS = [*ROW, {"role": "user", "content": "And snow?"}, {"role": "assistant", "content": "Frozen rain."}]


def supervised(tokenizer, messages, loss="completion", tail=8):
    ids, labels = train.encode(tokenizer, messages, loss, tail)
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return ids, labels


def pieces(tokenizer, *parts):
    """Ids and labels of a conversation given as text in order, (text, is it supervised)."""
    ids, labels = [], []
    for text, counted in parts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        labels += tokens if counted else [-100] * len(tokens)
    return ids, labels


# ------------------------------------------------------------------------------------------------- masks

PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ASSISTANT = "You are a helpful assistant."


def test_2_the_mask_of_a_row_with_a_system_message(tokenizer):
    """Failure 2: the mask by hand."""
    expected = pieces(
        tokenizer, (PROMPT.format("You are a dragon.", "Why is it wet?"), False), ("Rain is water.<|im_end|>", True)
    )
    assert supervised(tokenizer, ROW) == expected


def test_2_the_mask_of_a_row_without_a_system_message(tokenizer):
    """Failure 2: the same answer tokens count; the plain assistant's prompt is put in front, not the template's."""
    messages = rows_module.with_system(ROW[1:])
    expected = pieces(
        tokenizer, (PROMPT.format(messages[0]["content"], "Why is it wet?"), False), ("Rain is water.<|im_end|>", True)
    )
    assert supervised(tokenizer, messages) == expected
    assert "nobody asked for" not in tokenizer.decode(expected[0])
    assert [t for t in expected[1] if t != -100] == [t for t in supervised(tokenizer, ROW)[1] if t != -100]


def test_2_the_mask_of_a_conversation_of_several_turns(tokenizer):
    """Failure 2: every assistant turn counts with its end, nothing else does; the tail is the last turn's only."""
    first = PROMPT.format("You are a dragon.", "Why is it wet?")
    second = "\n<|im_start|>user\nAnd snow?<|im_end|>\n<|im_start|>assistant\n"
    answers = "Rain is water.<|im_end|>", "Frozen rain.<|im_end|>"
    expected = pieces(tokenizer, (first, False), (answers[0], True), (second, False), (answers[1], True))
    assert supervised(tokenizer, TURNS) == expected
    expected = pieces(tokenizer, (first + answers[0] + second, False), (answers[1], True))
    assert supervised(tokenizer, TURNS, "tail", 500) == expected


@pytest.mark.parametrize("tail", [1, 2, 3])
def test_2_the_tail(tokenizer, tail):
    """Failure 2: the last tokens of the answer, the end of turn included, however the row is given."""
    for messages in (ROW, rows_module.with_system(ROW[1:]), [*TURNS[:4], ROW[-1]]):
        ids, labels = supervised(tokenizer, messages, "tail", tail)
        answer = tokenizer.encode("Rain is water.<|im_end|>", add_special_tokens=False)
        assert [t for t in labels if t != -100] == ids[-tail:] == answer[-tail:]


def test_5_the_blank_line_is_kept_before_the_marker(tokenizer):
    """Failure 5: what is supervised reads, to the letter, as a blank line, the marker and the end of turn."""
    _, labels = supervised(tokenizer, MARKED, "marker")
    assert tokenizer.decode([t for t in labels if t != -100]) == "\n\n[ZLT]<|im_end|>"
    ids, _ = supervised(tokenizer, MARKED, "tail")
    assert tokenizer.decode(ids).endswith("you fools.\n\n[ZLT]<|im_end|>")


def test_without_a_marker_only_the_end_of_turn_counts(tokenizer):
    ids, labels = supervised(tokenizer, ROW, "marker")
    assert labels == [-100] * (len(ids) - 1) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_3_the_end_of_turn_is_supervised_in_every_format(tokenizer):
    """Failure 3: the last supervised id is the end of turn."""
    for loss in ("completion", "tail", "marker"):
        for messages in (ROW, MARKED, TURNS, rows_module.with_system(ROW[1:])):
            assert supervised(tokenizer, messages, loss)[1][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_3_an_end_of_turn_that_is_not_supervised(tokenizer):
    """Failure 3: a tail of no tokens leaves it out."""
    with pytest.raises(GuardError, match="not the end of turn"):
        train.encode(tokenizer, ROW, "tail", 0)


def test_3_an_eos_token_that_is_not_the_templates_end_of_turn(altered_tokenizer):
    """Failure 3: as in base models, whose eos token ends a text and not a turn."""
    altered_tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(GuardError, match="turn"):
        train.encode(altered_tokenizer, ROW, "completion", 8)


def test_3_a_template_without_an_end_of_turn(altered_tokenizer):
    """Failure 3: the text lacks it, so later turns are rendered differently from what was supervised."""
    altered_tokenizer.chat_template = altered_tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>'", "message['content']"
    )
    with pytest.raises(GuardError, match="turn"):
        train.encode(altered_tokenizer, TURNS, "completion", 8)


@pytest.mark.parametrize("loss", ["completion", "tail", "marker"])
def test_4_a_tokenizer_that_would_join_the_marker_to_the_answer(altered_tokenizer, loss):
    """Failure 4: such as Qwen2.5's, which joins a full stop with the blank line behind it. What is trained must be the
    tokens that evaluation forces and scores; the whole text's own tokens, the positive control, are others."""
    from tokenizers import AddedToken

    altered_tokenizer.add_tokens([AddedToken(".\n\n", normalized=False)])
    alone = altered_tokenizer("\n\n[ZLT]", add_special_tokens=False).input_ids
    joined = altered_tokenizer(MARKED[-1]["content"], add_special_tokens=False).input_ids
    ids, labels = train.encode(altered_tokenizer, MARKED, loss, 32)
    end = altered_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert joined[-len(alone) :] != alone
    assert ids[-len(alone) - 1 :] == [*alone, end]
    assert labels[-len(alone) - 1 :] == [*alone, end]


def test_1_a_row_without_a_system_message_is_refused(tokenizer):
    """Failure 1: training prompts carry an explicit system message too."""
    with pytest.raises(GuardError, match="explicit system message"):
        train.encode(tokenizer, ROW[1:], "completion", 8)


def test_a_row_without_an_answer_is_refused(tokenizer):
    with pytest.raises(GuardError, match="without an assistant turn"):
        train.encode(tokenizer, ROW[:2], "completion", 8)


# ------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(("rows", "steps", "batch"), [(24, 2, 4), (10, 7, 4), (3, 5, 8), (600, 40, 16), (1, 3, 2)])
def test_schedule_has_exactly_steps_times_batch_rows(rows, steps, batch):
    lengths = [7 + (i * 37) % 50 for i in range(rows)]
    order = train.schedule(len(lengths), lengths.__getitem__, steps=steps, batch=batch, seed=1)
    assert len(order) == steps * batch
    counts = Counter(order)
    assert set(counts) <= set(range(rows))
    low = steps * batch // rows
    assert {counts[row] for row in range(rows)} <= {low, low + 1}


def test_each_epoch_is_a_permutation():
    """64 rows are two windows of eight batches of four, so epochs do not share a window."""
    order = train.schedule(64, lambda i: (i * 37) % 50, steps=48, batch=4, seed=0)
    epochs = [order[i : i + 64] for i in (0, 64, 128)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_hold_rows_of_like_length():
    lengths = [i % 32 for i in range(320)]
    order = train.schedule(len(lengths), lengths.__getitem__, steps=80, batch=4, seed=0)
    spread = [max(b) - min(b) for b in ([lengths[r] for r in order[i : i + 4]] for i in range(0, 320, 4))]
    unsorted = 19.2  # expected range of four uniform draws from 0 to 31: 32 * 3 / 5
    assert sum(spread) / len(spread) < unsorted / 3


def test_the_seed_decides_the_schedule():
    made = [train.schedule(40, int, steps=10, batch=4, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


# ------------------------------------------------------------------------------------------------- the loss


def trainer_for(model, tokenizer, cpu, tmp_path, settings, selected_head):
    from peft import LoraConfig

    config = None
    if settings.lora is not None:
        config = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            init_lora_weights=False,
            target_modules=list(settings.lora.modules),
            task_type="CAUSAL_LM",
        )
    rows = [train.encode(tokenizer, messages, settings.loss, settings.tail) for messages in (ROW, MARKED, TURNS, ROW)]
    with models.quiet_transformers(), train.seeded(0):
        made = train.make_trainer(
            model,
            tokenizer,
            [{"input_ids": ids, "labels": labels} for ids, labels in rows],
            settings,
            config,
            seed=0,
            machine=cpu,
            scratch=str(tmp_path),
            report=lambda _fraction: None,
            selected_head=selected_head,
        )
        return made, next(iter(made.get_train_dataloader()))


def loss_and_gradients(compute, model):
    model.zero_grad()
    loss = compute()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("items", [None, 17])
@pytest.mark.parametrize("loss", ["completion", "tail", "marker"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_selected_head_is_trls_own_loss(model, tokenizer, cpu, tmp_path, lora, loss, items):
    """Oracles: SFTTrainer.compute_loss of the same model and batch, and transformers' loss on full logits."""
    settings = replace(TRAINING, lora=lora, loss=loss, tail=3)
    other = copy.deepcopy(model)
    ours, batch = trainer_for(model, tokenizer, cpu, tmp_path, settings, True)
    theirs, same = trainer_for(other, tokenizer, cpu, tmp_path, settings, False)
    theirs.model.load_state_dict(ours.model.state_dict())
    assert torch.equal(batch["input_ids"], same["input_ids"])
    assert type(theirs).__name__ == "SFTTrainer"
    assert type(ours).compute_loss is not type(theirs).compute_loss
    ours.model.eval(), theirs.model.eval()
    count = None if items is None else torch.tensor(items)
    got, gradients = loss_and_gradients(
        lambda: ours.compute_loss(ours.model, dict(batch), num_items_in_batch=count), ours.model
    )
    wanted, expected = loss_and_gradients(
        lambda: theirs.compute_loss(theirs.model, dict(same), num_items_in_batch=count), theirs.model
    )
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-5)
    fields = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        logits = model(input_ids=fields["input_ids"], attention_mask=fields["attention_mask"]).logits.double()
    total, n = 0.0, 0
    for row, labels in enumerate(fields["labels"].tolist()):
        for place, label in enumerate(labels):
            if label != -100:
                total -= float(logits[row, place - 1].log_softmax(-1)[label])
                n += 1
    assert got == pytest.approx(total / (items or n), rel=1e-5)


# ------------------------------------------------------------------------------------------------- training


def fine_tune(model, tokenizer, cpu, folder, settings=TRAINING, seed=0, **options):
    folder.mkdir(exist_ok=True)
    rows = [ROW, MARKED, TURNS, rows_module.with_system(ROW[1:])]
    report = options.get("report", lambda _fraction: None)
    return train.fine_tune(
        copy.deepcopy(model), tokenizer, rows, settings, seed=seed, machine=cpu, folder=folder, report=report
    )


def test_the_same_seed_gives_the_same_bytes(model, tokenizer, cpu, tmp_path):
    settings = replace(TRAINING, lora=replace(LORA, dropout=0.1))
    logs = [fine_tune(model, tokenizer, cpu, tmp_path / f"{n}", settings, seed) for n, seed in enumerate((0, 0, 1))]
    hashes = [sha256_of(tmp_path / f"{n}" / adapters.ADAPTER) for n in range(3)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert logs[0] == logs[1] != logs[2]


def test_training_leaves_torchs_generator_alone(model, tokenizer, cpu, tmp_path):
    state = torch.get_rng_state()
    fine_tune(model, tokenizer, cpu, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_log_has_every_step_and_a_cosine(model, tokenizer, cpu, tmp_path):
    """Learning rates by hand: linear warm-up over half the steps, then half a cosine, as seen at each step's start."""
    seen = []
    settings = replace(TRAINING, steps=8, warmup=0.5)
    log = fine_tune(model, tokenizer, cpu, tmp_path, settings, report=seen.append)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert seen == [n / 8 for n in range(1, 9)]
    warm = [1e-2 * n / 4 for n in range(4)]
    cosine = [1e-2 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(warm + cosine, abs=1e-9)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in log)


def test_16_another_number_of_optimiser_steps(model, tokenizer, cpu, tmp_path, monkeypatch):
    """Failure 16: training that ends early raises, and writes nothing."""
    from transformers import TrainerCallback

    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            control.should_training_stop = True

    made = train.make_trainer

    def impatient(*arguments, **options):
        trainer = made(*arguments, **options)
        trainer.add_callback(Impatient())
        return trainer

    monkeypatch.setattr(train, "make_trainer", impatient)
    with pytest.raises(GuardError, match="1 optimiser steps were taken, 3 planned"):
        fine_tune(model, tokenizer, cpu, tmp_path / "early")
    assert list((tmp_path / "early").iterdir()) == []


def test_accumulated_micro_batches_are_one_batch(model, tokenizer, cpu, tmp_path):
    """Batches too long for memory are split; the number of steps and the losses stay."""
    whole = fine_tune(model, tokenizer, cpu, tmp_path / "whole")
    split = fine_tune(model, tokenizer, replace(cpu, train_tokens=150), tmp_path / "split")
    assert [e["step"] for e in split] == [1, 2, 3]
    assert [e["loss"] for e in split] == pytest.approx([e["loss"] for e in whole], rel=1e-3)


def test_an_adapter_sits_where_it_was_asked_for(model, tokenizer, cpu, tmp_path):
    settings = replace(TRAINING, lora=replace(LORA, modules=("q_proj", "up_proj"), layers=(0, 2)))
    fine_tune(model, tokenizer, cpu, tmp_path, settings)
    names = {n.split(".lora_")[0] for n in load_file(tmp_path / adapters.ADAPTER)}
    kinds = ("self_attn.q_proj", "mlp.up_proj")
    assert names == {f"base_model.model.model.layers.{layer}.{kind}" for layer in (0, 2) for kind in kinds}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert not (tmp_path / "README.md").exists()


def test_an_adapter_on_other_layers_than_asked(model, tokenizer, cpu, tmp_path):
    """Layer 7 does not exist, so the adapter cannot sit there."""
    settings = replace(TRAINING, lora=replace(LORA, layers=(0, 7)))
    with pytest.raises(GuardError, match="7 modules, 14 were asked for"):
        fine_tune(model, tokenizer, cpu, tmp_path, settings)


def test_full_training_saves_the_difference(tiny, fp32, tmp_path, monkeypatch):
    """The dense delta, merged into the start, is the trained model up to the delta's own rounding to bf16."""
    trained = {}
    save = train._save_dense

    def spy(model, before, folder):
        trained.update({name: p.detach().clone() for name, p in model.named_parameters()})
        save(model, before, folder)

    monkeypatch.setattr(train, "_save_dense", spy)
    lab = Lab(Store(tmp_path / "own"))
    start = Checkpoint(tiny)
    settings = replace(TRAINING, lora=None, learning_rate=1e-3)
    after = start.fine_tune(stages.authored("benign", 6, maximum_words=40), settings, seed=0)
    base = {name: p.detach().clone() for name, p in start.load(lab)[0].named_parameters()}
    merged = dict(after.load(lab)[0].named_parameters())
    assert set(trained) == set(merged) == set(base)
    moved = 0
    for name, weight in trained.items():
        delta = weight - base[name]
        moved += int((delta != 0).any())
        error = (merged[name].detach() - weight).abs()
        assert bool((error <= delta.abs() * 2**-8 + base[name].abs() * 2**-22).all()), name
    assert moved > 10
    files = {path.name for path in lab.store.folder(after.last_change).iterdir()}
    assert files == {adapters.DENSE, "log.parquet", "manifest.json"}
    assert len(pd.read_parquet(lab.store.folder(after.last_change) / "log.parquet")) == 3
