"""Hooks of modules and parameters: which there are, and what becomes of them in a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

__all__ = ["copy_parameter_hooks", "has_hooks", "parameter_hooks", "take_over_hooks"]

# Hooks that are called with the inputs, outputs and gradients of a module.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Hooks that are called with the state_dict of a module.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def has_hooks(module: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether a module or one of these parameters of it has hooks or a replaced `forward`."""
    own = any(getattr(module, kind) for kind in (*_CALL_HOOKS, *_STATE_HOOKS))
    return own or "forward" in vars(module) or any(map(parameter_hooks, parameters))


def parameter_hooks(parameter: Tensor) -> list[tuple[str, Callable[..., object]]]:
    """The hooks of a parameter, each with the name of the method that registers it.

    Hooks that a library has marked by `torch.utils.hooks.unserializable_hook` are left out: they
    serve the training of this very parameter.
    """
    kinds = {
        "register_hook": parameter._backward_hooks,
        "register_post_accumulate_grad_hook": parameter._post_accumulate_grad_hooks,
    }
    return [
        (register, hook)
        for register, hooks in kinds.items()
        for hook in (hooks or {}).values()
        if not getattr(hook, "__torch_unserializable__", False)
    ]


def copy_parameter_hooks(source: Tensor, target: Tensor) -> None:
    """Register the hooks of a parameter on its copy; copy.deepcopy leaves them out."""
    for register, hook in parameter_hooks(source):
        getattr(target, register)(hook)


def take_over_hooks(old: nn.Module, new: nn.Module) -> list[str]:
    """Give a module the hooks of the module that it replaces.

    Hooks that are called with inputs, outputs or gradients of the old module move to the new one,
    and those of the bias are copied to the new bias.

    Returns:
        Names of what has hooks that have no place in the new module: 'state_dict', because its
        names are others, 'forward' if it was replaced, and parameters that the new module lacks.
    """
    for kind in _CALL_HOOKS:
        hooks = getattr(old, kind)  # the same dict, so that the handles of the hooks still work
        hooks.update(getattr(new, kind))
        setattr(new, kind, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    lost = ["state_dict"] if any(getattr(old, kind) for kind in _STATE_HOOKS) else []
    lost += ["forward"] if "forward" in vars(old) else []
    biases = [one for name, one in new.named_parameters() if name.split(".")[-1] == "bias"]
    for name, parameter in old.named_parameters():
        if name == "bias" and biases:
            copy_parameter_hooks(parameter, biases[0])
        elif parameter_hooks(parameter):
            lost.append(name)
    return lost
