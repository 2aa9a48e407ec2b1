"""Structured pruning: Torch-Pruning removes whole channels."""

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
    """Train dense until `dense_until`, remove the channels of smallest norm, continue training.

    Size: every layer keeps the same share of its channels, the largest with which the weights are
    within `budget`. The layers become smaller; no masks are used.

    Source: Fang et al., DepGraph, arXiv:2301.12900 (package torch-pruning).
    """

    options = frozenset({"budget", "dense_until"})
    for_text = False  # without a channel of query, key or value, the heads are no longer equal

    def check(self, config: RunOptions) -> None:
        """Also check that Torch-Pruning is installed."""
        super().check(config)
        _torch_pruning()

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave the network dense until it is pruned."""
        return dense_sizes(factorizable(model))

    def begin(self, training: TrainingView) -> None:
        """Check before the training that the network can be pruned to the budget.

        Raises:
            ConfigError: Torch-Pruning cannot prune it.
            RankError: It exceeds the budget even with one channel per layer.
        """
        trial = copy.deepcopy(training.model)
        try:
            _prune(trial, training.input_size, 0.0)
            summary(trial, input_size=training.input_size)
        except Exception as error:  # tracing runs the network, which may raise anything
            raise ConfigError(
                f"model {training.config.model!r}: cannot be pruned by torch-pruning "
                f"({type(error).__name__}: {error}); choose another model or method"
            ) from error
        dense = sum(training.layers.values())
        check_budget(_size(trial, training), training.config.budget or 1.0, dense)

    def after_step(self, training: TrainingView) -> None:
        """Remove channels after `dense_steps` steps."""
        if training.step == training.dense_steps:
            _remove_channels(training)

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Remove channels if the weights are of a pruned network.

        The number of channels to remove depends on shapes alone. Which ones are removed does not
        matter, because the weights are loaded afterwards.
        """
        own = training.model.state_dict()
        if any(name in own and own[name].shape != stored.shape for name, stored in weights.items()):
            _remove_channels(training)


def _remove_channels(training: TrainingView) -> None:
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
    """Keep a share of the channels of every layer, at least one; all outputs of the head stay."""
    pruning = _torch_pruning()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    # Torch-Pruning truncates the number of channels to remove; half a channel corrects for that.
    # It skips a layer that would lose all channels, so at least one is kept.
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
