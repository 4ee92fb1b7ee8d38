"""transformers' Trainer trains a converted model and goes on from a checkpoint as if unbroken."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Trainer needs it: pip install 'dynmask[recipes]'")

from dynmask import convert, load_converted  # noqa: E402
from dynmask.nn import collect_retention_loss  # noqa: E402
from tests.tiny import VOCAB, tiny_llama  # noqa: E402

STEPS, STOP, LENGTH = 6, 3, 24


class Teaching(transformers.Trainer):
    """A Trainer that adds the retention loss."""

    taught: list[float]

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            # the task's loss is a mean over the accumulated batches, so this one is made one too
            retention = collect_retention_loss(model) / self.current_gradient_accumulation_steps
            self.taught.append(float(retention.detach()))
            loss = loss + retention
        return (loss, outputs) if return_outputs else loss


def texts():
    ids = torch.randint(3, VOCAB, (16, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, checkpointing=False, weight=0.05):
    lesson = {"retention_weight": weight, "retention_after": 4, "retention_rows": 6}
    model: Any = convert(tiny_llama(), width=9, window=3, sinks=1, **lesson)
    if checkpointing:
        enable = "activation_checkpointing_enable"  # its name since 5.23
        enable = getattr(model, enable, model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STOP,
        eval_strategy="steps",
        eval_steps=STOP,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    made = Teaching(model, settings, train_dataset=texts(), eval_dataset=texts()[:4])
    made.taught = []
    return made


def weights(model):
    return {n: x.detach().clone() for n, x in model.state_dict().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_ends_at_the_weights_of_an_unbroken_one(tmp_path, checkpointing):
    whole = trainer(tmp_path, checkpointing)
    begun = weights(whole.model)
    whole.train()
    expected = weights(whole.model)
    assert len(whole.taught) == 2 * STEPS and min(whole.taught) > 0
    scores = [n for n in expected if "dynmask_score" in n]
    assert scores and all(not torch.equal(begun[n], expected[n]) for n in scores)
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]

    resumed = trainer(tmp_path, checkpointing)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert len(resumed.taught) == 2 * (STEPS - STOP)
    for name, received in weights(resumed.model).items():
        assert torch.equal(received, expected[name]), name

    loaded = weights(load_converted(tmp_path / f"checkpoint-{STEPS}"))
    assert all(torch.equal(loaded[n], x) for n, x in expected.items())


def test_the_retention_loss_of_accumulated_batches_is_a_mean(tmp_path, monkeypatch):
    def two(query, key, scores, **more):
        return scores.sum() * 0 + 2

    monkeypatch.setattr("dynmask.integrations.convert.retention_loss_of", two)
    run = trainer(tmp_path, weight=0.5)
    run.train()
    layers = run.model.config.num_hidden_layers
    assert run.taught == pytest.approx([0.5 * 2 * layers / 2] * 2 * STEPS)
