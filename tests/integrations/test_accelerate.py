"""Accelerate: prepared objects, its clipping and its checkpoints."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from integrations.problems import (
    EPOCHS,
    STEPS_PER_EPOCH,
    assert_same_weights,
    linear_rank,
    loader,
    network,
    optimizer,
    plain_loop,
    scheduler,
)


class Run:
    def __init__(self, *, max_grad_norm=None, accumulate=1, dtype=torch.float32, **options):
        self.max_grad_norm = max_grad_norm
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.plain = network().to(dtype)
        moved = optimizer(self.plain, **options)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.plain, moved, loader(), scheduler(moved)
        )
        self.losses = []

    def epochs(self, number):
        for _ in range(number):
            dtype = self.plain[0].core.dtype
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.cross_entropy(self.model(x.to(dtype)), y)
                    self.accelerator.backward(loss)
                    if self.max_grad_norm is not None and self.accelerator.sync_gradients:
                        self.optimizer.optimizer.clip_grad_norm_(self.max_grad_norm)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.losses.append(loss.item())


@pytest.mark.parametrize(
    "options",
    [{}, {"integrator": "bug"}, {"max_grad_norm": 0.05}, {"accumulate": 2}],
    ids=["parallel", "bug", "clipped", "accumulated"],
)
def test_it_equals_the_plain_loop(options):
    run = Run(**options)
    run.epochs(EPOCHS)
    model, losses = plain_loop(closure=False, **options)
    assert_same_weights(run.plain, model)
    assert run.losses == losses


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_resuming_continues_the_loss_curve_bit_for_bit(tmp_path, integrator):
    first = Run(integrator=integrator)
    first.epochs(2)
    first.accelerator.save_state(tmp_path)
    resumed = Run(integrator=integrator)
    assert linear_rank(resumed.plain) != linear_rank(first.plain)
    resumed.accelerator.load_state(tmp_path)
    resumed.epochs(EPOCHS - 2)
    model, losses = plain_loop(closure=False, integrator=integrator)
    assert linear_rank(first.plain) != linear_rank(model)
    assert first.losses + resumed.losses == losses
    assert len(losses) == EPOCHS * STEPS_PER_EPOCH
    assert_same_weights(resumed.plain, model)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_resuming_in_bfloat16_continues_bit_for_bit(tmp_path, integrator):
    options = {"integrator": integrator, "dtype": torch.bfloat16}
    first = Run(**options)
    first.epochs(2)
    first.accelerator.save_state(tmp_path)
    rank = linear_rank(first.plain)
    resumed = Run(**options)
    resumed.accelerator.load_state(tmp_path)
    for run in (first, resumed):
        run.epochs(EPOCHS - 2)
    assert linear_rank(first.plain) != rank
    assert first.losses[2 * STEPS_PER_EPOCH :] == resumed.losses
    assert_same_weights(resumed.plain, first.plain)
