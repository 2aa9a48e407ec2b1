"""What stands in for a module while it is fine-tuned: the frozen one, and a change beside it."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdlrt.nn.layer import TuckerLayer

__all__ = ["AdaptedModule", "AdapterLayer", "TrainedCopy", "adapted_modules", "adapter_parts"]


class AdaptedModule(nn.Module):
    """A frozen module and what is trained beside it.

    Attributes that it lacks are those of the module it stands for, such as `stride`.

    Attributes:
        base: The module as it was, frozen.
    """

    base: nn.Module

    # Name of the submodule whose attributes are taken for the whole.
    _acts_as: ClassVar[str]

    def merged(self) -> nn.Module:
        """The module with the change taken in."""
        raise NotImplementedError

    @property
    def stands_in_for(self) -> int:
        """Number of frozen parameters that `merged` replaces."""
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
        scale: s, a buffer: it goes with the state_dict.
    """

    update: TuckerLayer
    scale: Tensor

    _acts_as = "base"

    def __init__(self, base: nn.Module, update: TuckerLayer, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.update = update
        self.register_buffer("scale", torch.tensor(float(scale), device=update.core.device))
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both."""
        output: Tensor = self.base(input) + self.scale * self.update(input)
        return output

    @property
    def weight(self) -> Tensor:
        """W + s C x_1 U_1 ... x_d U_d in full, for code that reads a layer's weight."""
        return self.base.get_parameter("weight") + self.scale * self.update.dense_weight()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A torch layer with `weight`; its bias is the base's."""
        merged = copy.copy(self.base)
        weight = nn.Parameter(self.weight.to(self.base.get_parameter("weight").dtype), False)
        merged._parameters = {**self.base._parameters, "weight": weight}
        return merged.train(self.training)

    @property
    def stands_in_for(self) -> int:
        """Size of the frozen weight."""
        return self.base.get_parameter("weight").numel()


class TrainedCopy(AdaptedModule):
    """A frozen module and the copy of it that is used and trained in its place.

    Args:
        base: The module.
        requires_grad: Whether the parameters of the copy are trained. Without it only buffers
            change: the running statistics of a batch norm.

    Attributes:
        base: The module as it was.
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
    def stands_in_for(self) -> int:
        """Size of the frozen module."""
        return sum(parameter.numel() for parameter in self.base.parameters())


def adapter_parts(model: nn.Module) -> nn.Module:
    """A module that holds what adapters have beside the frozen modules, under the same names.

    Its tensors are those of the model: to load into it is to load into the model.
    """
    parts = nn.Module()
    for name, module in adapted_modules(model).items():
        beside = nn.Module()
        beside._modules = {key: part for key, part in module._modules.items() if key != "base"}
        beside._buffers = dict(module._buffers)
        *path, last = name.split(".")
        place: nn.Module = parts
        for key in path:  # load_state_dict takes a dot for a step into a module
            place = place._modules.setdefault(key, nn.Module())  # type: ignore[assignment]
        place._modules[last] = beside
    return parts


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """The adapted modules of a model by name; empty if there are none."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)
    }
