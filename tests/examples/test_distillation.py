"""The examples of distillation against the trainers' own losses on logits, with tiny random models."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from udi_kernels import js_div

transformers = pytest.importorskip("transformers", reason="transformers is not installed; extra [examples]")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

VOCABULARY = 97


def model(width):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(rows=3, tokens=12):
    ids = torch.randint(VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[:, :4] = labels[0, 9:] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in student.parameters()]


@pytest.mark.parametrize("items", [None, 37])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_has_trls_loss(beta, items):
    pytest.importorskip("trl", reason="trl is not installed; extra [examples]")
    from gkd import FusedGKDTrainer, GKDTrainer

    student, teacher, inputs = model(16), model(32), batch()
    results = []
    for kind in (GKDTrainer, FusedGKDTrainer):
        trainer = kind.__new__(kind)  # what the loss reads; a tokenizer and a dataset would be needed for the rest
        trainer.teacher_model, trainer.beta = teacher, beta
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda m: m)
        loss = trainer.compute_loss(student, inputs, num_items_in_batch=items)
        results.append((loss.detach(), *gradients(student, loss)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_trainer_has_the_loss_of_logits(tmp_path):
    from distil import DistillationTrainer

    student, teacher, inputs = model(16), model(32), batch()
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: value[i % 3] for name, value in inputs.items()} for i in range(8)]
    trainer = DistillationTrainer(student, options, train_dataset=rows, teacher=teacher)
    loss = trainer.compute_loss(student, dict(inputs), num_items_in_batch=torch.tensor(21))
    own = gradients(student, loss)

    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    z, y = (m(**read).logits[:, :-1] for m in (student, teacher))
    labels = inputs["labels"][:, 1:]
    expected = js_div(z, y.detach(), weight=labels != -100, reduction="sum")
    expected = (expected + cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum")) / 21
    torch.testing.assert_close(loss, expected)
    for a, b in zip(own, gradients(student, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = student.lm_head.weight.detach().clone()
    assert trainer.train().training_loss > 0 and not torch.equal(before, student.lm_head.weight)
