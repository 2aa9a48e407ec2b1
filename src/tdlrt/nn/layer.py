"""The base class of all Tucker layers, and the one function that resizes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdlrt.errors import (
    IntegratorStateError,
    NonFiniteError,
    RankError,
    UnsupportedLayerError,
)
from tdlrt.linalg import (
    check_ranks,
    multi_mode_product,
    orthonormality_error,
    orthonormality_tolerance,
)
from tdlrt.nn.factors import FactorList, check_shapes
from tdlrt.nn.loading import check_bias, stored_weight
from tdlrt.nn.reshape import Reshape, tensor_shape
from tdlrt.nn.start import Modes, Start, initial_tensor, learned_modes, weight_obstacle
from tdlrt.nn.tracing import is_traced, traced_call
from tdlrt.nn.weight_value import WeightValue
from tdlrt.paths import (
    LayerShape,
    PathChoice,
    PathName,
    Preference,
    Purpose,
    check_path,
    choose_path,
    path_parameters,
)
from tdlrt.paths.apply import fastest_path, has_known_shape, is_channels_last, known_shape

__all__ = ["TuckerLayer", "resize_layers_"]


class TuckerLayer(nn.Module):
    """A layer whose weight is W = C x_1 U_1 ... x_d U_d with orthonormal U_i.

    Attributes:
        core: C, a Parameter of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i.
        bias: Parameter of shape (n_1,), or None.
        recompute: Whether the backward pass computes the maps between the stages again instead of
            storing them, which saves memory and takes time. Not for torch.func's transforms.
        is_averaged: Whether all processes average its gradients, although others hold parts of the
            other parameters (`tdlrt.integrations.fsdp`).
        path_is_measured: Whether `autotune_` has set `path`, to the fastest one.
        reshape: Sizes of the modes of the rows and of the columns, if the layer is linear and its
            matrix is a tensor of more than two modes; otherwise None.

    Source: arXiv:2305.19059, section 2.
    """

    core: nn.Parameter
    factors: FactorList
    bias: nn.Parameter | None

    is_averaged: bool = False
    recompute: bool = False
    path_is_measured: bool = False
    reshape: Reshape | None = None
    _init_scale: float | None = None
    _path: PathChoice = "auto"

    def _factorize(
        self,
        layer: nn.Module,
        rank: Start,
        modes: Modes,
        init_scale: float | None,
        reshape: Reshape | None = None,
    ) -> None:
        """Initialise from the weight and bias of a torch layer; called once instead of __init__.

        Raises:
            UnsupportedLayerError: The weight is complex, quantised, lazy or computed.
        """
        reason = weight_obstacle(layer)
        if reason is not None:
            raise UnsupportedLayerError(
                f"{type(layer).__name__}: got one that has no Tucker format ({reason}), expected a "
                "weight that is a Parameter of a real floating-point type, float16 to float64; "
                "leave this layer dense"
            )
        weight = layer.get_parameter("weight")
        tensor = weight.detach().reshape(tensor_shape(weight.shape, reshape))
        learned = learned_modes(modes, tensor.ndim)
        start = initial_tensor(tensor, rank, learned, init_scale)
        check_shapes(tensor.shape, learned, *start)
        super().__init__()
        self._init_scale = init_scale
        if reshape is not None:
            self.reshape = reshape
        self.core = nn.Parameter(start.core, requires_grad=weight.requires_grad)
        self.factors = FactorList(start.factors, learned)
        self.factors.requires_grad_(weight.requires_grad)
        self.register_parameter("bias", None if layer.bias is None else layer.get_parameter("bias"))
        self.train(layer.training)

    def _hand_over(self, converted: nn.Module) -> None:
        """Give the torch layers of a conversion the training flag, and freeze what is frozen."""
        trainable = any(one.requires_grad for one in (self.core, *self.factors))
        for name, parameter in converted.named_parameters():
            own = self.bias if name.split(".")[-1] == "bias" else None
            parameter.requires_grad_(trainable if own is None else own.requires_grad)
        converted.train(self.training)

    def to_dense(self) -> nn.Module:
        """The torch layer with the full weight; its parameters are copies."""
        raise NotImplementedError

    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Torch layers that apply the weight along a path; their parameters are copies.

        Args:
            path: One of `tdlrt.paths.PATHS`, or 'auto' for the one that `plain_path` chooses.

        Raises:
            PathError: There is no path of this name.
        """
        raise NotImplementedError

    @property
    def path(self) -> PathChoice:
        """The forward path, an order of contractions; 'auto' for the cheapest at each input shape.

        The others are 'three_stage', 'fold_in' (U_in is folded into the core), 'fold_out' (U_out is
        folded into the core) and 'dense'.

        Raises:
            PathError: It is set to another name.
        """
        return self._path

    @path.setter
    def path(self, path: PathChoice) -> None:
        self._path, self.path_is_measured = check_path(path), False

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """The shapes of the layer and of an input, from which a path is chosen."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer along its path."""
        if is_traced(input):
            return traced_call(self, TuckerLayer.forward, (input,), {})  # type: ignore[no-any-return]
        if self.recompute and torch.is_grad_enabled():
            applied: Tensor = checkpoint(
                self._apply_weight, input, use_reentrant=False, preserve_rng_state=False
            )
            return applied
        return self._apply_weight(input)

    def _apply_weight(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _call_path(self, input: Tensor, bases: Sequence[Tensor]) -> PathName:
        if self._path != "auto":
            return self._path
        if not has_known_shape(self.core):
            return "three_stage"  # one graph serves all ranks: no guards that compare their costs
        last = is_channels_last(input, self.core.ndim)
        grad = input.requires_grad
        shape = self.plan_shape(known_shape(input), channels_last=last, input_grad=grad)
        return fastest_path(shape, (input, self.core, *bases))

    def planned_path(self, shape: LayerShape, purpose: Purpose) -> PathName:
        """The path of a call: the path set on the layer, or the fastest one if that is 'auto'."""
        return choose_path((shape,), purpose) if self._path == "auto" else self._path

    def plain_path(self, calls: Sequence[LayerShape] = (), prefer: Preference = "size") -> PathName:
        """The path of the torch layers that `to_plain` makes (see `choose_path`).

        A path that was set on the layer is followed; a path measured by `autotune_` only if speed
        is preferred.

        Args:
            calls: Shapes from `plan_shape`, one per call. If empty, an input with many positions is
                assumed.
            prefer: 'size' for the fewest parameters, 'speed' for the least time.
        """
        if self._path != "auto" and (prefer == "speed" or not self.path_is_measured):
            return self._path
        shapes = calls or (self._shape_of_many,)
        return choose_path(shapes, "plain", prefer)

    @property
    def plain_parameters(self) -> int:
        """Number of weight parameters of the torch layers that `to_plain` makes, without biases."""
        return path_parameters(self.plain_path(), self._shape_of_many)

    @property
    def _shape_of_many(self) -> LayerShape:
        """The shapes of the layer and of an input with many positions."""
        return LayerShape(self.shape, self.ranks, row_modes=self._row_modes)

    @property
    def _row_modes(self) -> int:
        return 0 if self.reshape is None else len(self.reshape[0])

    def _chosen_plain_path(self, path: PathChoice) -> PathName:
        return self.plain_path() if check_path(path) == "auto" else cast("PathName", path)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Multilinear rank (r_1, ..., r_d)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the weight."""
        return tuple(factor.shape[0] for factor in self._bases)

    @property
    def learned_modes(self) -> tuple[int, ...]:
        """Modes that are factorised."""
        return tuple(
            mode for mode, factor in enumerate(self.factors) if isinstance(factor, nn.Parameter)
        )

    @property
    def weight_parameters(self) -> int:
        """Number of parameters of the weight: entries of the core and of the learned bases."""
        return self.core.numel() + sum(self.factors[mode].numel() for mode in self.learned_modes)

    @property
    def _bases(self) -> list[Tensor]:
        # By name, because torch.compile of torch 2.8 cannot trace the iterator of a module, and
        # because the index checks of `factors[mode]` cost more time than choosing a path.
        factors = self.factors
        return [getattr(factors, str(mode)) for mode in range(self.core.ndim)]

    @property
    def _own_repr(self) -> str:
        forced = "" if self._path == "auto" else f", path={self._path!r}"
        return f"ranks={self.ranks}{forced}"

    def dense_weight(self) -> Tensor:
        """The full weight W, of shape n_1 x ... x n_d, differentiable in core and factors."""
        return multi_mode_product(self.core, self._bases)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, computed at every access, for code that reads the weight of a layer.

        Writing into it raises an `UnsupportedLayerError`, because the write would be lost.
        """
        return WeightValue.of(self.dense_weight())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from the random weight and bias of a new torch layer, at the present ranks.

        The weight is truncated and scaled as it was when the layer was made. Every Parameter stays
        the same object.
        """
        dense = self._random_dense()
        weight = dense.weight.reshape(self.shape)
        start = initial_tensor(weight, self.ranks, self.learned_modes, self._init_scale)
        self.resize_(*start)
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def _random_dense(self) -> Any:
        """A new torch layer with random parameters, its weight in the order of W."""
        dense: Any = self.to_dense()
        dense.reset_parameters()
        return dense

    def check_invariants(self) -> None:
        """Verify shapes, r_i <= prod_{j != i} r_j, finite values and orthonormal bases.

        Raises:
            RankError: Shapes or ranks do not fit together.
            NonFiniteError: The core or a basis is not finite.
            IntegratorStateError: A basis is not orthonormal up to the tolerance of its type and
                size.
        """
        check_ranks(self.ranks, self.learned_modes)
        for mode, factor in enumerate(self.factors):
            if factor.ndim != 2 or factor.shape[1] != self.ranks[mode]:
                raise RankError(
                    f"factors[{mode}]: got shape {tuple(factor.shape)}, expected "
                    f"{self.ranks[mode]} columns, the size of mode {mode} of the core"
                )
        for name, tensor in (("core", self.core), *self.factors.named()):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name}: got NaN or infinite values, expected finite ones")
        for name, factor in self.factors.named():
            error = float(orthonormality_error(factor.detach()))
            allowed = orthonormality_tolerance(factor.dtype, len(factor))
            if error > allowed:
                raise IntegratorStateError(
                    f"{name}: max |U^T U - I| is {error:.1e}, expected at most {allowed:.1e}; "
                    "train Tucker layers with tdlrt.TDLRT alone, or factorise the layer again"
                )

    @torch.no_grad()
    def resize_(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        """Set a new core and new bases of any ranks; every Parameter stays the same object.

        If a rank changes, the gradients of core and bases, which belong to the old bases, are
        dropped.

        Args:
            core: C, of shape r_1 x ... x r_d.
            factors: U_i, of shape n_i x r_i.

        Raises:
            RankError: The shapes do not fit together or do not fit the layer.
        """
        check_shapes(self.shape, self.learned_modes, core, factors)
        resize_layers_([self], [[core, *(factors[mode] for mode in self.learned_modes)]])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        *args: Any,
    ) -> None:
        """Resize to the ranks in the state_dict, then let torch copy the values."""
        kind, learned = type(self).__name__, self.learned_modes
        incoming = stored_weight(state_dict, prefix, kind, self.shape, learned)
        check_bias(state_dict.get(f"{prefix}bias"), self.bias, prefix)
        if incoming and tuple(incoming[0].shape) != self.ranks:
            self.resize_(incoming[0], incoming[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def resize_layers_(layers: Sequence[TuckerLayer], values: Sequence[Sequence[Tensor]]) -> None:
    """Set new cores and learned bases of many layers; every Parameter stays the same object.

    If a rank of a layer changes, the gradients of its core and bases, which belong to the old
    bases, are dropped.

    Args:
        layers: The layers.
        values: For each layer the core and the learned bases, whose shapes fit together.
    """
    targets, sources = [], []
    for layer, of in zip(layers, values, strict=True):
        parameters = [layer.core, *(layer.factors[mode] for mode in layer.learned_modes)]
        resized = layer.core.shape != of[0].shape
        for parameter, value in zip(parameters, of, strict=True):
            if resized:
                parameter.grad = None
            if parameter.shape != value.shape:
                # set_ keeps the Parameter object, to which optimisers, hooks and averages refer
                parameter.set_(parameter.new_empty(value.shape))  # type: ignore[call-overload]
            targets.append(parameter)
            sources.append(value)
    torch._foreach_copy_(targets, sources)
