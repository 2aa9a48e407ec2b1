"""torch's own attention again, with the weights of a SplitAttention whose layers are torch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlrt.nn.attention import SplitAttention

__all__ = ["PROJECTIONS", "attention_options", "inner_sizes", "packed", "packed_like"]

PROJECTIONS = ("q", "k", "v", "out")

_OPTIONS = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")


def packed(split: SplitAttention) -> nn.MultiheadAttention:
    """torch.nn.MultiheadAttention with the parameters of a SplitAttention.

    Each projection is a torch.nn.Linear or several in a row. Where it is several, W is their
    product, which torch's attention cannot apply factor by factor. Its weight is then a
    parametrisation (torch.nn.utils.parametrize): the parameters are the factors, and W is computed
    from them in every forward pass.

    Args:
        split: The attention; the result shares its tensors.
    """
    chains = {
        name: [stage.get_parameter("weight") for stage in _stages(layer)]
        for name, layer in zip(PROJECTIONS, split.projections().values(), strict=True)
    }
    inner = {name: [len(one) for one in chain[:-1]] for name, chain in chains.items()}
    attention = packed_like(attention_options(split), inner)
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        if getattr(split, name) is not None:
            attention.register_parameter(name, getattr(split, name))
    output = attention.out_proj
    output.register_parameter("bias", _stages(split.out_proj)[-1]._parameters["bias"])
    if attention.in_proj_weight is not None:
        three = [chains[name][0] for name in "qkv"]
        trained = any(one.requires_grad for one in three)
        attention.in_proj_weight = nn.Parameter(torch.cat([w.detach() for w in three]), trained)
    else:
        for name in "qkv":
            _fill(attention, f"{name}_proj_weight", chains[name])
    _fill(output, "weight", chains["out"])
    return attention.train(split.training)


def packed_like(
    options: Mapping[str, Any], inner: Mapping[str, Sequence[int]]
) -> nn.MultiheadAttention:
    """An attention on the meta device whose projections are products of matrices.

    Args:
        options: Arguments of torch.nn.MultiheadAttention.
        inner: For each of 'q', 'k', 'v' and 'out' the sizes between the matrices of its product, in
            the order in which these are applied to an input; [] for one matrix.
    """
    with torch.device("meta"):
        attention = nn.MultiheadAttention(**options)
        if attention._qkv_same_embed_dim and any(inner[name] for name in "qkv"):
            attention._qkv_same_embed_dim = False
            weight = attention.in_proj_weight
            for name, part in zip("qkv", weight.detach().chunk(3), strict=True):
                setattr(attention, f"{name}_proj_weight", nn.Parameter(part))
            attention.register_parameter("in_proj_weight", None)
        for name in "qkv":
            if attention.in_proj_weight is None:
                _factorize(attention, f"{name}_proj_weight", inner[name])
        _factorize(attention.out_proj, "weight", inner["out"])
    return attention


def attention_options(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """The arguments with which an attention like this one is made."""
    options = {name: getattr(attention, name) for name in _OPTIONS}
    options["bias"] = attention.in_proj_bias is not None
    return options | {"add_bias_kv": attention.bias_k is not None}


def inner_sizes(attention: nn.MultiheadAttention) -> dict[str, list[int]]:
    """The `inner` of `packed_like` for an attention that it has made."""
    owners: dict[str, tuple[nn.Module, str]] = {
        name: (attention, f"{name}_proj_weight") for name in "qkv"
    }
    owners["out"] = (attention.out_proj, "weight")
    return {
        name: [one.shape[1] for one in _factors(*owner)[:0:-1]] for name, owner in owners.items()
    }


def _factorize(owner: nn.Module, name: str, inner: Sequence[int]) -> None:
    """Let a weight W = F_n ... F_1 be computed from factors, with F_n as original.

    A torch.nn.Linear with the weight F_i^T takes a product X to X F_i.
    """
    if not inner:
        return
    rows, columns = owner.get_parameter(name).shape
    sizes = [rows, *reversed(inner), columns]
    setattr(owner, name, nn.Parameter(torch.empty(sizes[:2])))
    for before, after in pairwise(sizes[1:]):
        linear = nn.Linear(before, after, bias=False)
        parametrize.register_parametrization(owner, name, linear, unsafe=True)


def _factors(owner: nn.Module, name: str) -> list[Tensor]:
    """The factors F_n, F_{n-1}^T, ..., F_1^T of a weight, or the weight itself."""
    if not parametrize.is_parametrized(owner, name):
        weight = owner._parameters[name]
        return [] if weight is None else [weight]
    kept: Any = owner.parametrizations
    return [kept[name].original, *(linear.weight for linear in kept[name])]


def _fill(owner: nn.Module, name: str, chain: Sequence[Tensor]) -> None:
    """Give a weight its factors F_1, ..., F_n, which share the memory of a chain of layers."""
    *others, last = chain
    own = nn.Parameter(last.detach(), last.requires_grad)
    if not others:
        owner.register_parameter(name, own)
        return
    kept: Any = owner.parametrizations
    kept[name].original = own
    for linear, factor in zip(kept[name], reversed(others), strict=True):
        linear.weight = nn.Parameter(factor.detach().T.contiguous(), factor.requires_grad)


def _stages(layer: nn.Module) -> list[nn.Module]:
    return list(layer) if isinstance(layer, nn.Sequential) else [layer]
