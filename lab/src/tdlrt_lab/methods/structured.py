"""Structured pruning: whole channels are removed, by Torch-Pruning."""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.errors import ConfigError
from tdlrt.extras import needs_extra
from tdlrt.report import summary
from tdlrt_lab.methods.method import Method
from tdlrt_lab.methods.sizes import (
    check_budget,
    dense_sizes,
    factorizable,
    kept_parameters,
    largest_share,
)
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions

__all__ = ["Structured"]


class Structured(Method):
    """Train dense until `dense_until`, remove the channels of smallest norm, train on.

    Size: every layer loses the same share of its channels, the smallest with which the weights fit
    `budget`; they are physically smaller.

    Source: Fang et al., DepGraph, arXiv:2301.12900 (package torch-pruning).
    """

    options = frozenset({"budget", "dense_until"})

    def check(self, config: RunOptions) -> None:
        """Refuse a missing package as well."""
        super().check(config)
        _torch_pruning()

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave the network dense for now."""
        return dense_sizes(factorizable(model))

    def begin(self, training: TrainingView) -> None:
        """Find out before the training whether the network can be made so small.

        Raises:
            ConfigError: Torch-Pruning cannot prune it.
            RankError: It is larger than the budget with one channel a layer.
        """
        trial = copy.deepcopy(training.model)
        try:
            _prune(trial, training.input_size, 0.0)
            summary(trial, input_size=training.input_size)
        except Exception as error:  # its tracing runs the network, which may raise anything
            raise ConfigError(
                f"model {training.config.model!r}: cannot be pruned by torch-pruning "
                f"({type(error).__name__}: {error}); choose another model or method"
            ) from error
        dense = sum(training.layers.values())
        check_budget(_size(trial, training), training.config.budget or 1.0, dense)

    def after_step(self, training: TrainingView) -> None:
        """Remove channels when the time has come."""
        if training.step == training.dense_steps:
            _shrink(training)

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Remove channels if they were when the network had these weights.

        How many go depends on the shapes alone; which ones, on the weights that follow.
        """
        own = training.model.state_dict()
        if any(name in own and own[name].shape != stored.shape for name, stored in weights.items()):
            _shrink(training)


def _shrink(training: TrainingView) -> None:
    def size(share: float) -> int:
        model = copy.deepcopy(training.model)
        _prune(model, training.input_size, share)
        return _size(model, training)

    dense = sum(training.layers.values())
    share = largest_share(size, training.config.budget or 1.0, dense)
    _prune(training.model, training.input_size, share)
    training.rebuild()


def _size(model: nn.Module, training: TrainingView) -> int:
    layers = [model.get_submodule(name) for name in training.layers]
    return sum(kept_parameters(layer, biases=False) for layer in layers)


def _prune(model: nn.Module, input_size: tuple[int, ...], share: float) -> None:
    """Keep a share of the channels of every layer, at least one; the outputs of the head stay."""
    pruning = _torch_pruning()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    # A layer all of whose channels would go is skipped. Half a channel makes up for truncation.
    ratios = {
        layer: 1 - (max(1, round(share * len(layer.weight))) + 0.5) / len(layer.weight)
        for layer in layers[:-1]
    }
    images = torch.zeros(input_size, device=next(model.parameters()).device)
    training = model.training
    pruning.pruner.BasePruner(
        model.eval(),
        images,
        importance=pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio_dict=ratios,
        ignored_layers=layers[-1:],
    ).step()
    model.train(training)


def _torch_pruning() -> Any:
    with needs_extra("bench", "method 'structured'"):
        return import_module("torch_pruning")
