"""Lightning with automatic optimisation."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from torch.nn import functional as F

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
from tdlrt.integrations.lightning import TDLRTCallback

pytestmark = [
    # Lightning uses a class of torch's pytree that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    # Lightning's advice on speed; the data here are a few tensors.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Module(LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.model = network()
        self.options = options
        self.losses = []

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        moved = optimizer(self.model, **self.options)
        return [moved], [{"scheduler": scheduler(moved), "interval": "step"}]


class Records(Logger):
    """Keeps what it is given."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_):
        pass


def trainer(tmp_path, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **quiet}
    return Trainer(default_root_dir=tmp_path, callbacks=[*callbacks], **{**settings, **options})


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_automatic_optimisation_equals_the_plain_loop(tmp_path, integrator):
    module = Module(integrator=integrator)
    trainer(tmp_path, TDLRTCallback()).fit(module, loader())
    model, losses = plain_loop(integrator=integrator)
    assert_same_weights(module.model, model)
    assert module.losses == losses


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_resuming_continues_the_loss_curve_bit_for_bit(tmp_path, integrator):
    first = Module(integrator=integrator)
    fit = trainer(tmp_path, TDLRTCallback(), max_epochs=2)
    fit.fit(first, loader())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(integrator=integrator)
    assert linear_rank(resumed) != linear_rank(first)
    fit = trainer(tmp_path, TDLRTCallback())
    fit.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    model, losses = plain_loop(integrator=integrator)
    assert linear_rank(first) != linear_rank(model)
    assert first.losses + resumed.losses == losses
    assert_same_weights(resumed.model, model)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_resuming_in_bf16_continues_bit_for_bit(tmp_path, integrator):
    """`bf16-true` makes the parameters bfloat16: the state has their masters."""
    options = {"precision": "bf16-true"}
    whole = Module(integrator=integrator)
    trainer(tmp_path, TDLRTCallback(), **options).fit(whole, loader())
    assert whole.model[0].core.dtype == torch.bfloat16
    first = Module(integrator=integrator)
    fit = trainer(tmp_path, TDLRTCallback(), max_epochs=2, **options)
    fit.fit(first, loader())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(integrator=integrator)
    fit = trainer(tmp_path, TDLRTCallback(), **options)
    fit.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert linear_rank(first) != linear_rank(whole)
    assert first.losses + resumed.losses == whole.losses
    assert_same_weights(resumed.model, whole.model)


def test_metrics_reach_the_logger(tmp_path):
    module, records = Module(), Records()
    fit = trainer(tmp_path, TDLRTCallback(), logger=records, log_every_n_steps=3)
    fit.fit(module, loader())
    assert [*records.metrics] == [*range(2, STEPS, 3)]
    size = tdlrt.summary(module.model)
    last = records.metrics[STEPS - 1]
    assert last["tdlrt/rank/model.3/0"] == size.ranks["3"][0]
    assert last["tdlrt/compression"] == size.compression
    assert records.metrics[2]["tdlrt/parameters"] > last["tdlrt/parameters"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"freeze_at_epoch": 0}, 0),
        ({"freeze_at_epoch": 1}, STEPS_PER_EPOCH),
        ({"freeze_at_share": 0.5}, STEPS // 2),
        ({"freeze_at_share": 1.0}, STEPS),
        ({}, None),
    ],
)
def test_ranks_are_frozen_in_time(tmp_path, monkeypatch, options, steps):
    frozen_at = []
    freeze = tdlrt.TDLRT.freeze_ranks

    def note(self):
        if not self.ranks_frozen:
            frozen_at.append(fit.global_step)
        freeze(self)

    monkeypatch.setattr(tdlrt.TDLRT, "freeze_ranks", note)
    fit = trainer(tmp_path, TDLRTCallback(**options))
    fit.fit(Module(), loader())
    assert frozen_at == ([] if steps is None else [steps])


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_clipping_is_by_the_projected_gradient(tmp_path, integrator):
    module = Module(integrator=integrator)
    trainer(tmp_path, TDLRTCallback(max_grad_norm=0.05)).fit(module, loader())
    model, losses = plain_loop(integrator=integrator, max_grad_norm=0.05)
    assert_same_weights(module.model, model)
    assert losses != plain_loop(integrator=integrator)[1]


def test_a_module_may_clip_by_itself(tmp_path):
    class Clips(Module):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
        ):
            optimizer.clip_grad_norm_(gradient_clip_val)

    module = Clips()
    trainer(tmp_path, TDLRTCallback(), gradient_clip_val=0.05).fit(module, loader())
    assert_same_weights(module.model, plain_loop(max_grad_norm=0.05)[0])


def test_accumulation_equals_the_plain_loop(tmp_path):
    module = Module()
    trainer(tmp_path, TDLRTCallback(), accumulate_grad_batches=2).fit(module, loader())
    assert_same_weights(module.model, plain_loop(accumulate=2)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val: got 1\.0.*TDLRTCallback\(max_grad_norm"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: got 2 with integrator='bug'"),
    ],
)
def test_options_that_would_be_wrong_are_refused(tmp_path, options, message):
    module = Module(integrator="bug")
    with pytest.raises(tdlrt.SetupError, match=message):
        trainer(tmp_path, TDLRTCallback(), **options).fit(module, loader())
    assert_same_weights(module.model, network())


@pytest.mark.parametrize("average", [StochasticWeightAveraging(0.1), EMAWeightAveraging()])
def test_averages_of_factors_are_refused(tmp_path, average):
    fit = trainer(tmp_path, TDLRTCallback(), average)
    with pytest.raises(tdlrt.SetupError, match=f"got {type(average).__name__}, which would"):
        fit.fit(Module(), loader())


def test_another_optimiser_is_refused(tmp_path):
    class Dense(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(tdlrt.SetupError, match=r"optimizers: got \['SGD'\], expected a TDLRT"):
        trainer(tmp_path, TDLRTCallback()).fit(Dense(), loader())


def test_a_share_of_a_training_without_end_is_refused(tmp_path):
    fit = trainer(tmp_path, TDLRTCallback(freeze_at_share=0.5), max_epochs=-1)
    with pytest.raises(tdlrt.SetupError, match="freeze_at_share: got one for a training without"):
        fit.fit(Module(), loader())
