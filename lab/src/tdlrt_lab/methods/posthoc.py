"""Post-hoc Tucker decomposition of a trained dense network, followed by fine-tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdlrt.linalg import kept_ranks, possible_ranks, relative_spectrum
from tdlrt.ranks import RankSpec
from tdlrt.surgery import factorize_
from tdlrt_lab.methods.method import Method
from tdlrt_lab.methods.sizes import (
    check_budget,
    dense_sizes,
    factorizable,
    largest_shares,
    tucker_size,
)
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions

__all__ = ["Posthoc"]


class Posthoc(Method):
    """Train dense until `dense_until`, truncate every weight by HOSVD, train cores and bases.

    Size: every mode of every layer keeps the same share of its squared singular values, up to
    rounding: the largest share within `budget`. Cores and bases count.

    Source: Kim et al., arXiv:1511.06530, with this rule in place of variational Bayes.
    """

    options = frozenset({"budget", "dense_until"})

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Leave the network dense until it is decomposed; check the budget."""
        layers = factorizable(model)
        sizes = dense_sizes(layers)
        shapes = [layer.get_parameter("weight").shape for layer in layers.values()]
        smallest = sum(1 + sum(shape) for shape in shapes)
        check_budget(smallest, config.budget or 1.0, sum(sizes.values()))
        return sizes

    def after_step(self, training: TrainingView) -> None:
        """Decompose the network after `dense_steps` steps."""
        if training.step != training.dense_steps:
            return
        weights = {
            name: training.model.get_submodule(name).get_parameter("weight").detach()
            for name in training.layers
        }
        spectra = {
            name: [relative_spectrum(weight[None], mode).cpu() for mode in range(weight.ndim)]
            for name, weight in weights.items()
        }

        def ranks(name: str, share: float) -> tuple[int, ...]:
            return possible_ranks([_smallest_rank(values, share) for values in spectra[name]])

        def size(name: str, share: float) -> int:
            return tucker_size(weights[name].shape, ranks(name, share))

        shares = largest_shares(size, training.config.budget or 1.0, training.layers)
        _factorize(training, {name: ranks(name, share) for name, share in shares.items()})

    def restore(self, training: TrainingView, weights: Mapping[str, Tensor]) -> None:
        """Decompose the network if the weights are; loading them sets the ranks."""
        if any(f"{name}.core" in weights for name in training.layers):
            _factorize(training, dict.fromkeys(training.layers, 1))


def _smallest_rank(spectrum: Tensor, share: float) -> int:
    """Smallest rank that keeps a share of the squared singular values; a batch of one spectrum."""
    size = torch.tensor([spectrum.shape[1]])
    budget = torch.tensor([1 - share if share < 1 else -1.0], dtype=torch.float64)
    return int(kept_ranks(spectrum, size, budget, size))


def _factorize(training: TrainingView, ranks: Mapping[str, RankSpec]) -> None:
    factorize_(training.model, rank=ranks, init_scale=None)
    training.rebuild()
