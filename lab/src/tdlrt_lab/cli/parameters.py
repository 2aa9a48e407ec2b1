"""Parameters of the commands, in part made from the fields of `RunOptions`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from tdlrt_lab.config import CHOICES, LEARNING_RATES, WITH_BUDGET, WITH_TAU
from tdlrt_lab.data import DATA_SETS
from tdlrt_lab.methods import DEFAULT_TAU
from tdlrt_lab.options import Option, RunOptions

__all__ = [
    "Batch",
    "Data",
    "Device",
    "Model",
    "Rank",
    "takes_run_options",
]

HINTS = {
    name: get_args(hint) for name, hint in get_type_hints(RunOptions, include_extras=True).items()
}
"""Type and description of each option."""


def _per_data_set(option: str) -> str:
    names: dict[int, list[str]] = {}
    for name, info in DATA_SETS.items():
        names.setdefault(getattr(info, option), []).append(name)
    return "; ".join(f"{value} for {', '.join(group)}" for value, group in names.items())


DEPENDENT_DEFAULTS = {
    **{name: f"{value}; {WITH_BUDGET[name]} with --budget" for name, value in WITH_TAU.items()},
    **{name: _per_data_set(name) for name in ("epochs", "batch_size")},
    "optimizer": f"{WITH_TAU['optimizer']}; {WITH_BUDGET['optimizer']} with --budget; "
    + "; ".join(
        f"{info.optimizer} for {name}" for name, info in DATA_SETS.items() if info.optimizer
    ),
    "tau": f"{DEFAULT_TAU} without --budget",
    "lr": "; ".join(
        f"{rates['sgd']} for {method}, {rates['adam']} with Adam(W)"
        for method, rates in LEARNING_RATES.items()
    ),
}
"""Help texts for defaults that depend on other options."""


def _run_option(name: str, **settings: Any) -> Any:
    """The typer option for a field; the model is an argument.

    Args:
        name: Name of the field.
        settings: Further settings of typer, such as `min`.
    """
    option: Option = HINTS[name][1]
    names = CHOICES.get(name, ())
    settings["help"] = option.help.format(choices=", ".join(names))
    if names:
        settings["autocompletion"] = lambda incomplete: [
            one for one in names if one.startswith(incomplete)
        ]
    if option.metavar:
        settings["metavar"] = option.metavar
    if name == "model":
        return typer.Argument(**settings)
    unset = DEPENDENT_DEFAULTS.get(name, option.unset)
    if unset:
        settings["show_default"] = unset
    return typer.Option(rich_help_panel=option.group, **settings)


# Parameters shared by the commands that do not train.
Model = Annotated[str, _run_option("model")]
Data = Annotated[str, _run_option("data")]
Batch = Annotated[int | None, _run_option("batch_size", min=1)]
Rank = Annotated[str, _run_option("rank")]
Device = Annotated[str, _run_option("device")]


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the first parameter of a command by the options of a run.

    The command receives a dict of those options that were typed, by field name.
    """
    first, *others = inspect.signature(command).parameters.values()
    own = [_parameter(field) for field in fields(RunOptions)]

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> None:
        run_values = {parameter.name: values.pop(parameter.name) for parameter in own}
        given = {
            name: _read(name, value)
            for name, value in run_values.items()
            if _is_typed(context, name)
        }
        command(given, **values)

    context = inspect.Parameter("context", first.kind, annotation=typer.Context)
    signature = inspect.Signature([context, *own, *others])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return wrapped


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """The command-line parameter for a field."""
    hint, option = HINTS[field.name]
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kinds = [part for part in get_args(hint) or (hint,) if part is not NoneType]
    kind: Any = kinds[0] if isinstance(kinds[0], type) and not option.read else str
    if default is None:
        kind = kind | None
    elif option.read:
        default = str(default)
    annotation: Any = Annotated[kind, _run_option(field.name)]
    # Keyword-only, so that parameters with defaults may precede those without.
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given by the user."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _read(name: str, value: Any) -> Any:
    read = HINTS[name][1].read
    return read(value) if read else value
