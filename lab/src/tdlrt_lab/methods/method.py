"""What every method is: its options, and what it does at the fixed points of a training."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdlrt.errors import ConfigError
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions

__all__ = [
    "DENSE_RATES",
    "FREE_FACTOR_RATES",
    "OPTIMIZERS",
    "OPTIMIZER_OPTIONS",
    "Method",
    "optimizer_options",
]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

OPTIMIZER_OPTIONS = {
    "sgd": frozenset({"lr", "weight_decay", "momentum"}),
    "adam": frozenset({"lr", "weight_decay"}),
    "adamw": frozenset({"lr", "weight_decay"}),
}
"""The options of `RunOptions` that each optimiser uses."""

DENSE_RATES = {"sgd": 0.02, "adam": 0.001, "adamw": 0.001}
FREE_FACTOR_RATES = {"sgd": 0.02, "adam": 0.006, "adamw": 0.006}


class Method:
    """A way to train a small network; without state, all of which is in the training.

    The defaults are those of a method that trains the network as it is by the plain optimiser and
    is told its size by `budget`.

    Attributes:
        learning_rates: Largest learning rate per optimiser, unless told otherwise.
        options: Options of `RunOptions` that mean something to this method but not to every one.
            The others must keep their defaults; only an empty set ignores them all.
        needs_budget: Whether there is no other way to say the size.
    """

    learning_rates: ClassVar[Mapping[str, float]] = DENSE_RATES
    options: ClassVar[frozenset[str]] = frozenset({"budget"})
    needs_budget: ClassVar[bool] = True

    def check(self, config: RunOptions) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: They do.
        """
        if self.needs_budget and config.budget is None:
            raise ConfigError(
                f"budget None: expected a share in (0, 1] for method {config.method!r}, which "
                "has no other measure of its size; give one such as --budget 0.05"
            )

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Change the new network, in place, before it goes to its device.

        Args:
            model: The dense network.
            config: Options of the run.

        Returns:
            The layers that the method makes small, by name, with the parameters that each of
            their dense weights has. Compression is measured over these.

        Raises:
            RankError: No network is as small as the budget asks.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, config: RunOptions, steps: int) -> torch.optim.Optimizer:
        """The optimiser of all parameters, for a training of so many steps."""
        return OPTIMIZERS[config.optimizer](model.parameters(), **optimizer_options(config))

    def begin(self, training: TrainingView) -> None:
        """Do what needs the data and the device, before the first step."""

    def penalty(self, training: TrainingView) -> Tensor | None:
        """What is added to the loss of this step."""
        return None

    def after_step(self, training: TrainingView) -> None:
        """Do what comes after a step."""

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Give the network the form, not the values, in which it had these weights."""


def optimizer_options(config: RunOptions) -> dict[str, Any]:
    """Arguments of the optimiser's class."""
    return {name: getattr(config, name) for name in OPTIMIZER_OPTIONS[config.optimizer]}
