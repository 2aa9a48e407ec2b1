"""Iterative magnitude pruning with retraining."""

from tdlrt_lab.methods.masks import Masked
from tdlrt_lab.methods.training_view import TrainingView

__all__ = ["Magnitude"]

ROUNDS = 5


class Magnitude(Masked):
    """Remove the smallest weights in five rounds until `dense_until`, with training in between.

    The rounds are evenly spaced, and each keeps the same share of the remaining weights. Weights
    are not rewound to their initial values.

    Source: Han et al., arXiv:1506.02626; Frankle and Carbin, arXiv:1803.03635.
    """

    options = frozenset({"budget", "dense_until"})

    def after_step(self, training: TrainingView) -> None:
        """Prune at the end of a round."""
        ends = [round(training.dense_steps * (k + 1) / ROUNDS) for k in range(ROUNDS)]
        if training.step not in ends:
            return
        # In a short training several rounds can end at the same step; use the last of them.
        done = ROUNDS - ends[::-1].index(training.step)
        scores = {}
        for name in training.layers:
            layer = training.model.get_submodule(name)
            # `weight` is recomputed from `weight_orig` and the mask only in the next forward pass.
            mask = layer._buffers.get("weight_mask")
            scores[name] = (
                layer.get_parameter("weight").detach().abs()
                if mask is None
                else layer.get_parameter("weight_orig").detach().abs() * mask
            )
        share = (training.config.budget or 1.0) ** (done / ROUNDS)
        self.keep(training, scores, share)
