"""Modules that combine a frozen module with a trained part while a model is fine-tuned."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdlrt.nn.layer import TuckerLayer
from tdlrt.nn.layer_types import as_stored
from tdlrt.nn.models import check_model
from tdlrt.nn.weight_value import WeightValue

__all__ = ["AdaptedModule", "AdapterLayer", "TrainedCopy", "adapted_modules", "adapter_parts"]


class AdaptedModule(nn.Module):
    """A frozen module together with a trained part.

    Attributes that it does not have itself, such as `stride`, are read from one of its submodules.

    Attributes:
        base: The original module, frozen.
    """

    base: nn.Module

    # Name of the submodule from which missing attributes are read.
    _acts_as: ClassVar[str]

    def merged(self) -> nn.Module:
        """The module with the trained part merged into it."""
        raise NotImplementedError

    @property
    def replaced_parameters(self) -> int:
        """Number of frozen parameters that the result of `merged` replaces."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._acts_as:
                raise
            return getattr(getattr(self, self._acts_as), name)


class AdapterLayer(AdaptedModule):
    """y = base(x) + s update(x): a frozen layer and a trainable Tucker update of its weight.

    Args:
        base: A torch convolution or linear layer.
        update: A Tucker layer without bias, with the options of the base.
        scale: s.

    Attributes:
        base: The torch layer.
        update: The Tucker layer.
        scale: s, a buffer, so that the state_dict contains it.
    """

    update: TuckerLayer
    scale: Tensor

    _acts_as = "base"

    def __init__(self, base: nn.Module, update: TuckerLayer, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        self.base = base
        self.update = update
        number = torch.as_tensor(scale, dtype=torch.float32, device=update.core.device)
        self.register_buffer("scale", number)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        """Add the outputs of the frozen layer and of the scaled update."""
        output: Tensor = self.base(input) + self.scale * self.update(input)
        return output

    @property
    def weight(self) -> Tensor:
        """W + s C x_1 U_1 ... x_d U_d in full, for code that reads a layer's weight."""
        return WeightValue.of(self._sum())

    def _sum(self) -> Tensor:
        weight = self.base.get_parameter("weight")
        return weight + self.scale * as_stored(self.base, self.update.dense_weight())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the update again, with a zero core and random bases; the base stays as it is."""
        self.update.reset_parameters()
        nn.init.zeros_(self.update.core)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A torch layer with the weight `weight` and the bias of the base."""
        merged = copy.copy(self.base)
        weight = nn.Parameter(self._sum().to(self.base.get_parameter("weight").dtype), False)
        merged._parameters = {**self.base._parameters, "weight": weight}
        return merged.train(self.training)

    @property
    def replaced_parameters(self) -> int:
        """Size of the frozen weight."""
        return self.base.get_parameter("weight").numel()


class TrainedCopy(AdaptedModule):
    """A frozen module and a copy of it that is used and trained instead.

    Args:
        base: The module.
        requires_grad: Whether the parameters of the copy are trained. If not, only buffers change,
            such as the running statistics of a batch norm.

    Attributes:
        base: The original module.
        trained: The copy.
    """

    trained: nn.Module

    _acts_as = "trained"

    def __init__(self, base: nn.Module, requires_grad: bool = True) -> None:
        super().__init__()
        self.base = base
        self.trained = copy.deepcopy(base).requires_grad_(requires_grad)
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the copy."""
        return self.trained(*args, **kwargs)

    def merged(self) -> nn.Module:
        """The copy."""
        return self.trained.requires_grad_(False)

    @property
    def replaced_parameters(self) -> int:
        """Size of the frozen module."""
        return sum(parameter.numel() for parameter in self.base.parameters())


def adapter_parts(model: nn.Module) -> nn.Module:
    """A module with the trained parts of all adapted modules, under the same names.

    It shares its tensors with the model, so loading into it loads into the model.
    """
    parts = nn.Module()
    for name, module in adapted_modules(model).items():
        beside = nn.Module()
        beside._modules = {key: part for key, part in module._modules.items() if key != "base"}
        beside._buffers = dict(module._buffers)
        *path, last = name.split(".")
        place: nn.Module = parts
        for key in path:  # load_state_dict expects a submodule for every dot in a name
            place = place._modules.setdefault(key, nn.Module())  # type: ignore[assignment]
        place._modules[last] = beside
    return parts


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """The adapted modules of a model by name; empty if there are none.

    Raises:
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)
    }
