"""The base class of methods: their options, and hooks that a training calls."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdlrt.errors import ConfigError
from tdlrt.optim import registered_optimizers
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions

__all__ = [
    "DENSE_RATES",
    "FREE_FACTOR_RATES",
    "OPTIMIZERS",
    "OPTIMIZER_OPTIONS",
    "Method",
    "learning_rates",
    "optimizer_options",
]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    cls.__name__.lower(): cls
    for cls in registered_optimizers()
    if cls.__module__.startswith("torch.optim.")
}
"""Torch's own optimisers that can train Tucker weights."""

_SIGNATURES = {name: inspect.signature(cls).parameters for name, cls in OPTIMIZERS.items()}

OPTIMIZER_OPTIONS = {
    name: frozenset({"lr", "weight_decay"} & set(options)) for name, options in _SIGNATURES.items()
}
OPTIMIZER_OPTIONS["sgd"] |= {"momentum"}
"""The options of `RunOptions` that each optimiser uses."""

# By what the default rate is larger than that of Adam; the rates of the others are torch's.
_OF_ADAM = {"adam": 1, "adamw": 1, "nadam": 1, "radam": 1, "rmsprop": 1, "adamax": 2, "adagrad": 10}


def learning_rates(*, sgd: float, adam: float) -> dict[str, float]:
    """Default rates of all optimisers, from those of two.

    Args:
        sgd: The rate of SGD with momentum 0.9.
        adam: The rate of Adam.
    """
    rates = {name: float(options["lr"].default) for name, options in _SIGNATURES.items()}
    return rates | {"sgd": sgd} | {name: adam * times for name, times in _OF_ADAM.items()}


DENSE_RATES = learning_rates(sgd=0.02, adam=0.001)
FREE_FACTOR_RATES = learning_rates(sgd=0.02, adam=0.006)


class Method:
    """A way to train a small network. Methods have no state; all of it is in the training.

    The defaults are those of a method that trains with an ordinary optimiser and whose size is
    given by `budget`.

    Attributes:
        learning_rates: Default peak learning rate for each optimiser.
        options: The options of `RunOptions` that this method uses, of those that some methods do
            not use. The others must have their default values; if the set is empty, they are
            ignored.
        needs_budget: Whether `budget` is required.
        for_text: Whether it can be used for networks of text.
    """

    learning_rates: ClassVar[Mapping[str, float]] = DENSE_RATES
    options: ClassVar[frozenset[str]] = frozenset({"budget"})
    needs_budget: ClassVar[bool] = True
    for_text: ClassVar[bool] = True

    def check(self, config: RunOptions) -> None:
        """Check the options of this method.

        Raises:
            ConfigError: `budget` is missing, or options contradict each other.
        """
        if self.needs_budget and config.budget is None:
            raise ConfigError(
                f"budget None: expected a share in (0, 1] for method {config.method!r}, whose "
                "size is given by it alone; add for example --budget 0.05"
            )

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Change the new network in place, before it is moved to its device.

        Args:
            model: The dense network.
            config: Options of the run.

        Returns:
            The layers that the method compresses, by name, with the number of entries of their
            dense weights. Compression is measured over these layers.

        Raises:
            RankError: The smallest network of this method exceeds the budget.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, config: RunOptions, steps: int) -> torch.optim.Optimizer:
        """The optimiser of all parameters, for a training of `steps` steps."""
        return OPTIMIZERS[config.optimizer](model.parameters(), **optimizer_options(config))

    def begin(self, training: TrainingView) -> None:
        """Called before the first step, with the network on its device."""

    def penalty(self, training: TrainingView) -> Tensor | None:
        """A term to add to the loss of this step, or None."""
        return None

    def after_step(self, training: TrainingView) -> None:
        """Called after each step."""

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Change the structure of the network so that these weights can be loaded into it."""


def optimizer_options(config: RunOptions) -> dict[str, Any]:
    """Keyword arguments for the class of the optimiser."""
    return {name: getattr(config, name) for name in OPTIMIZER_OPTIONS[config.optimizer]}
