"""Batch norms folded into the convolution or linear layer right before them."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tdlrt.nn.calls import Inputs, calls_for
from tdlrt.surgery.hooks import has_hooks
from tdlrt.surgery.swap import replace_modules

__all__ = ["fuse_batch_norms_"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse_batch_norms_(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Inputs | None = None,
) -> None:
    """Fold batch norms in evaluation mode into the layers before them, in place.

    BN(W x + b) = (g / s) W x + (g / s) (b - m) + h with the statistics m, s and the affine
    parameters g, h of the batch norm, which becomes an Identity.

    Args:
        model: Any model of torch layers.
        input_size: Shape of the input. It, or example inputs, is needed to fuse after a linear
            layer, where a batch norm may also normalise another dimension than the features.
        example_inputs: What the model is called with, instead of input_size.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    calls = calls_for(model, linears, input_size, example_inputs)
    matrices = {one for one, made in calls.items() if all(len(c.output) == 2 for c in made)}
    fused: dict[nn.Module, nn.Module] = {}
    for layer, norm in _neighbours(model):
        if _is_plain(norm, _BATCH_NORM) and not norm.training and norm.running_mean is not None:
            if _is_plain(layer, _CONV) or (_is_plain(layer, (nn.Linear,)) and layer in matrices):
                fused[layer] = _fuse(layer, norm).train(layer.training)
                fused[norm] = nn.Identity().eval()
    replace_modules(model, fused)


def _fuse(layer: Any, norm: Any) -> nn.Module:
    """The layer with the batch norm folded in; trainable where one of the two is."""
    fuse: Callable[..., Any] = (
        fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    )
    fused: nn.Module = fuse(copy.deepcopy(layer).eval(), norm)
    for name, parameter in fused.named_parameters():
        parts = (getattr(layer, name), getattr(norm, name))
        parameter.requires_grad_(any(part is not None and part.requires_grad for part in parts))
    return fused


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of exactly one of these classes and has no hooks or computed weights."""
    return type(module) in kinds and not has_hooks(module, module.parameters())


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs of modules, each called once, where only the second uses the output of the first."""
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception:  # a forward method may raise anything for an input without values
        yield from _sequential_neighbours(model)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(modules[str(node.target)] for node in calls)
    # A parameter that the forward method also reads directly must not change.
    counts.update(
        modules[str(node.target).rpartition(".")[0]]
        for node in graph.nodes
        if node.op == "get_attr"
    )
    for node in calls:
        before = node.args[0] if node.args else None
        if (
            isinstance(before, torch.fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
        ):
            pair = modules[str(before.target)], modules[str(node.target)]
            if counts[pair[0]] == counts[pair[1]] == 1:
                yield pair


def _sequential_neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    places = Counter(
        child for parent in model.modules() for child in parent._modules.values() if child
    )
    for parent in model.modules():
        if type(parent) is nn.Sequential and places[parent] <= 1:
            for before, after in itertools.pairwise(parent):
                while type(before) is nn.Sequential and len(before):  # the stages of a Tucker layer
                    before = before[-1] if places[before] == 1 else nn.Identity()
                if places[before] == places[after] == 1:
                    yield before, after
