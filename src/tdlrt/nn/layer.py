"""What all Tucker layers share: core, bases, ranks, the one resize, loading into other ranks."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdlrt.errors import (
    IntegratorStateError,
    NonFiniteError,
    NothingMatchedError,
    RankError,
    StateDictError,
)
from tdlrt.linalg import (
    TuckerTensor,
    check_ranks,
    multi_mode_product,
    orthonormality_error,
    orthonormality_tolerance,
    polish_basis,
    truncate,
    truncate_weighted,
)
from tdlrt.planning import MANY_ROWS, LayerShape, Mode, Path, PathChoice, check_path, choose_path
from tdlrt.ranks import RankSpec, initial_cutoff
from tdlrt.tables import format_shape

__all__ = [
    "FactorList",
    "Modes",
    "Start",
    "TuckerLayer",
    "resize_layers_",
    "tucker_layers",
    "weight_shape",
    "weighted_start",
]

Modes: TypeAlias = Literal["all", "channels"]
Start: TypeAlias = RankSpec | TuckerTensor


class FactorList(nn.Module):
    """The bases of a Tucker layer, one per mode.

    A basis that is learned is a Parameter; the identity of a mode that is left unfactorised is a
    buffer, so that it moves with the model but is neither trained nor counted.
    """

    def __init__(self, factors: Sequence[Tensor], learned: Collection[int]) -> None:
        super().__init__()
        for mode, factor in enumerate(factors):
            if mode in learned:
                self.register_parameter(str(mode), nn.Parameter(factor))
            else:
                self.register_buffer(str(mode), factor)

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def __getitem__(self, mode: int) -> Tensor:
        if not -len(self) <= mode < len(self):
            raise IndexError(f"mode: got {mode}, expected an int from 0 to {len(self) - 1}")
        factor: Tensor = getattr(self, str(mode % len(self)))
        return factor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[mode] for mode in range(len(self)))

    def extra_repr(self) -> str:
        """Shapes of the bases."""
        return ", ".join(format_shape(factor.shape) for factor in self)


class TuckerLayer(nn.Module):
    """A layer whose weight is W = C x_1 U_1 ... x_d U_d with orthonormal U_i.

    Attributes:
        core: C, a Parameter of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i.
        bias: Parameter of shape (n_1,), or None.
        recompute: Whether the backward pass computes the maps between the stages anew instead of
            keeping them: memory for time. Not with torch.func's transforms.

    Source: arXiv:2305.19059, section 2.
    """

    core: nn.Parameter
    factors: FactorList
    bias: nn.Parameter | None

    recompute: bool = False
    _path: PathChoice = "auto"

    def _factorize(
        self, layer: nn.Module, rank: Start, modes: Modes, init_scale: float | None
    ) -> None:
        """Take over weight and bias of a torch layer; called once, in place of __init__."""
        weight = layer.get_parameter("weight")
        learned = _learned_modes(modes, weight.ndim)
        start = _initial_tensor(weight.detach(), rank, learned, init_scale)
        super().__init__()
        self.core = nn.Parameter(start.core, requires_grad=weight.requires_grad)
        self.factors = FactorList(start.factors, learned)
        self.factors.requires_grad_(weight.requires_grad)
        self.register_parameter("bias", None if layer.bias is None else layer.get_parameter("bias"))
        self.train(layer.training)

    def to_dense(self) -> nn.Module:
        """The torch layer with the weight in full; parameters are copies."""
        raise NotImplementedError

    def to_plain(self, path: PathChoice = "auto") -> nn.Module:
        """Torch layers that apply the weight along a path; parameters are copies.

        Args:
            path: One of `tdlrt.planning.PATHS`; 'auto' is the layer's own or, if that is 'auto'
                too, the cheapest for many positions, the folding not counted.
        """
        raise NotImplementedError

    @property
    def path(self) -> PathChoice:
        """Order of contractions: 'auto' for the cheapest at each shape, or one by name.

        'three_stage', 'fold_in' (U_in folded into the core), 'fold_out' (U_out folded), 'dense'.

        Raises:
            PathError: When set to another name.
        """
        return self._path

    @path.setter
    def path(self, path: PathChoice) -> None:
        self._path = check_path(path)

    def plan_shape(
        self, input: Sequence[int], *, channels_last: bool = False, input_grad: bool = True
    ) -> LayerShape:
        """What the planner needs to know for an input of this shape."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer along its path."""
        if self.recompute and torch.is_grad_enabled():
            applied: Tensor = checkpoint(
                self._apply_weight, input, use_reentrant=False, preserve_rng_state=False
            )
            return applied
        return self._apply_weight(input)

    def _apply_weight(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def planned_path(self, shape: LayerShape, mode: Mode) -> Path:
        """The layer's own path or, where that is 'auto', the cheapest (see `choose_path`)."""
        return choose_path(shape, mode) if self._path == "auto" else self._path

    def _plain_path(self, path: PathChoice) -> Path:
        """The path that `to_plain` takes for a choice."""
        if check_path(path) != "auto":
            return cast("Path", path)
        many = LayerShape(self.shape, self.ranks, MANY_ROWS, MANY_ROWS)
        return self.planned_path(many, "plain")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Multilinear rank (r_1, ..., r_d)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the weight."""
        return tuple(factor.shape[0] for factor in self.factors)

    @property
    def learned_modes(self) -> tuple[int, ...]:
        """Modes that are factorised."""
        return tuple(
            mode for mode, factor in enumerate(self.factors) if isinstance(factor, nn.Parameter)
        )

    @property
    def weight_parameters(self) -> int:
        """Number of trainable numbers that stand for the weight: core and learned bases."""
        return self.core.numel() + sum(self.factors[mode].numel() for mode in self.learned_modes)

    @property
    def _bases(self) -> list[Tensor]:
        # By index: the compiler of torch 2.8 does not see through the iterator of a module.
        return [self.factors[mode] for mode in range(len(self.factors))]

    @property
    def _own_repr(self) -> str:
        forced = "" if self._path == "auto" else f", path={self._path!r}"
        return f"ranks={self.ranks}{forced}"

    def dense_weight(self) -> Tensor:
        """The weight W in full, of shape n_1 x ... x n_d, differentiable in core and factors."""
        return multi_mode_product(self.core, self._bases)

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, formed at every access: for code that reads the weight of a layer."""
        return self.dense_weight()

    def check_invariants(self) -> None:
        """Verify shapes, r_i <= prod_{j != i} r_j, finite values and orthonormal bases.

        Raises:
            RankError: The ranks do not fit together.
            NonFiniteError: The core or a basis is not finite.
            IntegratorStateError: A basis is not orthonormal to the tolerance of its type and size.
        """
        check_ranks(self.ranks, self.learned_modes)
        for mode, factor in enumerate(self.factors):
            if factor.ndim != 2 or factor.shape[1] != self.ranks[mode]:
                raise RankError(
                    f"factors[{mode}]: got shape {tuple(factor.shape)}, expected "
                    f"{self.ranks[mode]} columns, the size of mode {mode} of the core"
                )
        for name, tensor in (("core", self.core), *_named(self.factors)):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name}: got NaN or infinite values, expected finite ones")
        for name, factor in _named(self.factors):
            error = float(orthonormality_error(factor.detach()))
            allowed = orthonormality_tolerance(factor.dtype, len(factor))
            if error > allowed:
                raise IntegratorStateError(
                    f"{name}: max |U^T U - I| is {error:.1e}, expected at most {allowed:.1e}; "
                    "was it changed by something else than tdlrt.TDLRT?"
                )

    @torch.no_grad()
    def resize_(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        """Put a new core and new bases in place, of any rank, keeping every Parameter's identity.

        If a rank changes, core and bases lose their gradients, which belong to the old bases.

        Args:
            core: C, of shape r_1 x ... x r_d.
            factors: U_i, of shape n_i x r_i.

        Raises:
            RankError: The shapes do not fit together or do not fit the layer.
        """
        _check_shapes(self.shape, self.learned_modes, core, factors)
        resize_layers_([self], [[core, *(factors[mode] for mode in self.learned_modes)]])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        *args: Any,
    ) -> None:
        """Resize to the incoming ranks, then let torch copy the values."""
        expected = [f"{prefix}core", *(f"{prefix}factors.{i}" for i in range(len(self.factors)))]
        present = [key for key in expected if isinstance(state_dict.get(key), Tensor)]
        if not present and f"{prefix}weight" in state_dict:
            raise StateDictError(
                f"{prefix}weight: got a dense weight for a {type(self).__name__}; load it into "
                "the dense model and factorise that (tdlrt.factorize_)"
            )
        self._check_bias(state_dict.get(f"{prefix}bias"), prefix)
        if len(present) == len(expected):
            self._adopt_ranks(prefix, [state_dict[key] for key in expected])
        elif present:
            missing = ", ".join(key for key in expected if key not in present)
            raise StateDictError(
                f"{missing}: missing, while {present[0]} is there; expected the core and all "
                f"{len(self.factors)} factors of a {type(self).__name__}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_bias(self, incoming: object, prefix: str) -> None:
        """Refuse a bias that torch would refuse after core and factors have changed."""
        own = None if self.bias is None else tuple(self.bias.shape)
        got = tuple(incoming.shape) if isinstance(incoming, Tensor) else None
        if got is not None and got != own:
            raise StateDictError(
                f"{prefix}bias: got one of shape {got}, expected "
                f"{'none' if own is None else f'shape {own}'}; it is of another layer"
            )

    def _adopt_ranks(self, prefix: str, incoming: list[Tensor]) -> None:
        core, *factors = incoming
        try:
            _check_shapes(self.shape, self.learned_modes, core, factors)
        except RankError as error:
            raise StateDictError(
                f"{prefix.rstrip('.') or 'layer'}: the state_dict does not fit a "
                f"{type(self).__name__} with a weight of shape {self.shape}: {error}"
            ) from error
        if tuple(core.shape) != self.ranks:
            self.resize_(core, factors)


@torch.no_grad()
def resize_layers_(layers: Sequence[TuckerLayer], values: Sequence[Sequence[Tensor]]) -> None:
    """Put new cores and learned bases in place in many layers, keeping every Parameter's identity.

    Where a rank changes, core and bases lose their gradients, which belong to the old bases.

    Args:
        layers: The layers.
        values: Of each layer the core and the learned bases, of shapes that fit together.
    """
    targets, sources = [], []
    for layer, of in zip(layers, values, strict=True):
        parameters = [layer.core, *(layer.factors[mode] for mode in layer.learned_modes)]
        resized = layer.core.shape != of[0].shape
        for parameter, value in zip(parameters, of, strict=True):
            if resized:
                parameter.grad = None
            if parameter.shape != value.shape:
                # set_ keeps the Parameter object, so optimisers, hooks and averages still hold it
                parameter.set_(parameter.new_empty(value.shape))  # type: ignore[call-overload]
            targets.append(parameter)
            sources.append(value)
    torch._foreach_copy_(targets, sources)


def tucker_layers(model: nn.Module) -> dict[str, TuckerLayer]:
    """The Tucker layers of a model by name.

    Raises:
        NothingMatchedError: There is none.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, TuckerLayer)
    }
    if not layers:
        raise NothingMatchedError(
            "model: got one without Tucker layers, expected at least one; call "
            "tdlrt.factorize_(model) first"
        )
    return layers


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, in Tucker format or dense."""
    if isinstance(module, TuckerLayer):
        return module.shape
    weight = module.weight  # not get_parameter: a reparametrised weight is no Parameter
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


@torch.no_grad()
def weighted_start(
    weight: Tensor, rank: RankSpec, modes: Modes, covariance: Tensor
) -> TuckerTensor:
    """Truncation of a weight that keeps its outputs, for inputs of this covariance.

    Args:
        weight: W; the inputs belong to its second mode.
        rank: The rank, see `factorize_`; a tolerance is one of the outputs.
        modes: See `factorize_`.
        covariance: Second moments of the inputs, of shape n_2 x n_2.

    Raises:
        RankError: The rank is not positive, or larger than its mode; the covariance does not fit.
        NonFiniteError: The weight or the covariance is not finite.
    """
    expected = (weight.shape[1],) * 2
    if tuple(covariance.shape) != expected:
        raise RankError(
            f"covariances: got one of shape {tuple(covariance.shape)} for a layer with "
            f"{expected[0]} inputs, expected shape {expected}"
        )
    for name, tensor in (("weight", weight), ("covariances", covariance)):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name}: got NaN or infinite values, expected finite ones")
    learned = _learned_modes(modes, weight.ndim)
    cutoff = initial_cutoff(rank, weight.shape)
    return truncate_weighted(weight, covariance.to(weight.device), 1, cutoff, learned)


def _named(factors: FactorList) -> list[tuple[str, Tensor]]:
    return [(f"factors[{mode}]", factor) for mode, factor in enumerate(factors)]


def _learned_modes(modes: Modes, order: int) -> tuple[int, ...]:
    if modes not in ("all", "channels"):
        raise RankError(f"modes: got {modes!r}, expected 'all' or 'channels'")
    return tuple(range(order if modes == "all" else 2))


@torch.no_grad()
def _initial_tensor(
    weight: Tensor, rank: Start, learned: Collection[int], init_scale: float | None
) -> TuckerTensor:
    """Truncated HOSVD of a weight, its norm set to init_scale times that of the weight."""
    if isinstance(rank, TuckerTensor):
        _check_shapes(weight.shape, learned, *rank)
        return _stored(weight, *rank)
    if init_scale is not None and not (
        isinstance(init_scale, int | float) and 0 < init_scale < sys.float_info.max
    ):
        raise RankError(f"init_scale: got {init_scale!r}, expected a positive number or None")
    if not torch.isfinite(weight).all():
        raise NonFiniteError(
            "weight: got NaN or infinite values, expected finite ones; the layer cannot be "
            "factorised"
        )
    # Half-precision types have no QR and no eigenvalues on CPU.
    tensor = weight if weight.dtype == torch.float64 else weight.float()
    norm = torch.linalg.vector_norm(tensor)
    core, projections = truncate(tensor, initial_cutoff(rank, weight.shape), learned)
    if init_scale is not None:
        kept = torch.linalg.vector_norm(core)
        core = core * torch.where(kept > 0, float(init_scale) * norm / kept, 1.0)
        if not torch.isfinite(core.to(weight.dtype)).all():
            raise RankError(
                f"init_scale: got {init_scale!r}, with which the weight is beyond {weight.dtype}; "
                "lower it"
            )
    factors = tuple(
        torch.eye(size, dtype=tensor.dtype, device=tensor.device)
        if projection is None
        else polish_basis(projection)
        for size, projection in zip(weight.shape, projections, strict=True)
    )
    return _stored(weight, core, factors)


def _stored(weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> TuckerTensor:
    """Copies with the type and the device of a weight."""
    parts = [part.to(weight, copy=True).contiguous() for part in (core, *factors)]
    return TuckerTensor(parts[0], tuple(parts[1:]))


def _check_shapes(
    shape: Sequence[int], learned: Collection[int], core: Tensor, factors: Sequence[Tensor]
) -> None:
    expected = tuple(zip(shape, core.shape, strict=False))
    got = tuple(tuple(factor.shape) for factor in factors)
    if core.ndim != len(shape) or got != expected:
        raise RankError(
            f"core of shape {tuple(core.shape)} with factors of shapes {got}: expected a core of "
            f"{len(shape)} modes and factors of shapes (n_i, r_i) for n = {tuple(shape)}"
        )
    for mode, (size, rank) in enumerate(expected):
        if mode not in learned and rank != size:
            raise RankError(
                f"mode {mode}: got rank {rank}, expected {size}, as the layer leaves it "
                "unfactorised; build it with modes='all'"
            )
