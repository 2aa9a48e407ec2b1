"""The Hugging Face Trainer, which steps without a closure."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import tdlrt
from integrations.problems import (
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_weights,
    linear_rank,
    loader,
    network,
    optimizer,
    plain_loop,
    scheduler,
)
from tdlrt.integrations.transformers import TDLRTCallback


class Config(PretrainedConfig):
    model_type = "tdlrt-test"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self):
        super().__init__(Config())
        self.post_init()  # it would initialise the dense layer anew
        self.layers = network()
        self.losses = []

    def forward(self, pixels, labels):
        logits = self.layers(pixels)
        loss = F.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


class InOrder(Trainer):
    """The images in their order, as in the plain loop."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def trainer(tmp_path, model, moved=None, **options):
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 100}
    quiet |= {"dataloader_pin_memory": False}
    settings = {"num_train_epochs": EPOCHS, "max_grad_norm": 0.0, "save_strategy": "no", **quiet}
    settings |= {"per_device_train_batch_size": 8, **options}
    moved = moved or optimizer(model.layers)
    images = [{"pixels": x, "labels": y} for x, y in loader().dataset]
    return InOrder(
        model,
        Arguments(output_dir=str(tmp_path), **settings),
        train_dataset=images,
        optimizers=(moved, scheduler(moved)),
    )


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_it_equals_the_plain_loop(tmp_path, integrator):
    model = Model()
    train = trainer(tmp_path, model, optimizer(model.layers, integrator=integrator))
    train.add_callback(TDLRTCallback(train))
    train.train()
    plain, losses = plain_loop(closure=False, integrator=integrator)
    assert_same_weights(model.layers, plain)
    assert model.losses == losses


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
@pytest.mark.parametrize("step", [7, 8])
def test_resuming_continues_the_loss_curve_bit_for_bit(tmp_path, integrator, step):
    options = {"save_strategy": "steps", "save_steps": step}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == step

    first = Model()
    train = trainer(tmp_path, first, optimizer(first.layers, integrator=integrator), **options)
    train.add_callback(TDLRTCallback(train))
    train.add_callback(Stop())
    train.train()
    resumed = Model()
    assert linear_rank(resumed.layers) != linear_rank(first.layers)
    train = trainer(tmp_path, resumed, optimizer(resumed.layers, integrator=integrator), **options)
    train.add_callback(TDLRTCallback(train))
    train.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    plain, losses = plain_loop(closure=False, integrator=integrator)
    assert linear_rank(first.layers) != linear_rank(plain)
    assert first.losses + resumed.losses == losses
    assert_same_weights(resumed.layers, plain)


def test_metrics_reach_logs_and_reporters_but_not_the_console(tmp_path, capsys):
    seen = []

    class Reporter(TrainerCallback):
        """Stands before the TDLRTCallback, as those of TensorBoard and others do."""

        def on_log(self, args, state, control, logs, **_):
            seen.append((state.global_step, dict(logs)))

    model = Model()
    train = trainer(tmp_path, model, logging_steps=12)
    train.add_callback(Reporter())
    train.add_callback(TDLRTCallback(train))
    train.train()
    size = tdlrt.summary(model)
    history = [record for record in train.state.log_history if "tdlrt/parameters" in record]
    reported = [(step, logs) for step, logs in seen if "tdlrt/parameters" in logs]
    assert [record["step"] for record in history] == [step for step, _ in reported] == [12, STEPS]
    assert history[1]["tdlrt/rank/layers.3/0"] == size.ranks["layers.3"][0]
    assert reported[1][1]["tdlrt/compression"] == size.compression
    assert all("loss" in record for record in history)
    assert "'loss'" in (printed := capsys.readouterr().out)
    assert "tdlrt/" not in printed
    assert history[0]["tdlrt/parameters"] > history[1]["tdlrt/parameters"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"freeze_at_epoch": 0}, 0),
        ({"freeze_at_epoch": 1}, STEPS_PER_EPOCH),
        ({"freeze_at_share": 0.5}, STEPS // 2),
        ({}, None),
    ],
)
def test_ranks_are_frozen_in_time(tmp_path, monkeypatch, options, steps):
    frozen_at = []
    freeze = tdlrt.TDLRT.freeze_ranks

    def note(self):
        if not self.ranks_frozen:
            frozen_at.append(train.state.global_step)
        freeze(self)

    monkeypatch.setattr(tdlrt.TDLRT, "freeze_ranks", note)
    train = trainer(tmp_path, Model())
    train.add_callback(TDLRTCallback(train, **options))
    train.train()
    assert frozen_at == ([] if steps is None else [steps])


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_clipping_is_by_the_projected_gradient(tmp_path, integrator):
    model = Model()
    train = trainer(tmp_path, model, optimizer(model.layers, integrator=integrator))
    train.add_callback(TDLRTCallback(train, max_grad_norm=0.05))
    train.train()
    plain, _ = plain_loop(closure=False, integrator=integrator, max_grad_norm=0.05)
    assert_same_weights(model.layers, plain)


def test_accumulation_equals_the_plain_loop(tmp_path):
    model = Model()
    train = trainer(tmp_path, model, gradient_accumulation_steps=2)
    train.add_callback(TDLRTCallback(train))
    train.train()
    assert_same_weights(model.layers, plain_loop(accumulate=2)[0])


def test_the_trainer_s_own_clipping_is_refused(tmp_path):
    train = trainer(tmp_path, Model(), max_grad_norm=1.0)
    with pytest.raises(tdlrt.SetupError, match=r"max_grad_norm: got TrainingArguments\(max_grad"):
        TDLRTCallback(train)


def test_another_optimiser_is_refused(tmp_path):
    model = Model()
    train = trainer(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(tdlrt.SetupError, match="trainer: got one whose optimizer is SGD"):
        TDLRTCallback(train)
