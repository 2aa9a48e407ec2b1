"""Rules of torch optimisers that move each entry by itself, by means of their own classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias, cast

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError, UnsupportedOptimizerError
from tdlrt.linalg import TangentSpace, TangentVector, reject
from tdlrt.optim.rules.entrywise import check_class, check_entrywise, defaults_of
from tdlrt.optim.rules.rule import Moments, Rule

__all__ = ["AdaptedRule", "Counter", "adapted_rule"]

Counter: TypeAlias = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""A number of the state, from the number of steps taken so far (B of them) and the options."""

_State: TypeAlias = Mapping[str, list[Tensor]]
"""The state by name, a tensor per block."""

_STEP, _SQUARED, _CENTERED = "step", "_squared", "_centered"

# What a rule does itself, so that the class must not.
_DONE = {"weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False}


@dataclass(frozen=True, kw_only=True)
class AdaptedRule(Rule):
    """The rule of a torch optimiser whose own class moves the blocks of coordinates.

    The class moves blocks of zeros, with the gradients G + weight_decay W and its own state, to
    blocks X. Then D = -X / lr, plus weight_decay W where the decay is decoupled. That is its step
    on W if it moves each entry by itself, and uses W for weight decay alone; `adapted_rule` makes
    the rule of a class, and says what the state is.
    """

    counts_steps: ClassVar[bool] = True
    optimizer_cls: ClassVar[type[torch.optim.Optimizer]]
    sizes: ClassVar[tuple[str, ...]]
    centers: ClassVar[Mapping[str, str]]
    counters: ClassVar[Mapping[str, Counter]]
    decouples: ClassVar[bool]

    options: Mapping[str, Any]
    decoupled: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], *, capturable: bool = False) -> Self:
        """See `Rule.from_group`.

        Raises:
            UnsupportedOptimizerError: capturable, an option that has no counterpart for Tucker
                weights, or a class that does not move each entry by itself.
        """
        if capturable:
            raise UnsupportedOptimizerError(
                f"capturable: got True with {cls.optimizer_cls.__name__}, expected SGD, Adam or "
                "AdamW: the state of the others does not begin with zeros, so that their first "
                "step cannot be taken back on the device"
            )
        return super().from_group(group)

    @classmethod
    def options_of(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.options_of`."""
        defaults = defaults_of(cls.optimizer_cls)  # type: ignore[arg-type]  # classes are hashable
        options = {name: group.get(name, of) for name, of in defaults.items()}
        options |= {name: value for name, value in _DONE.items() if name in options}
        del options["lr"]
        if "eps" in options:  # never 0 / 0, so that the direction is zero in the padding of a stack
            options["eps"] = max(float(options["eps"]), torch.finfo(torch.float32).tiny)
        declared = {*cls.first_moments, *cls.second_moments, *cls.sizes, *cls.centers}
        check_entrywise(cls.optimizer_cls, options, declared | {_STEP, *cls.counters})
        decoupled = bool(group.get("decoupled_weight_decay", cls.decouples))
        return {"options": options, "decoupled": decoupled}

    def advance(
        self,
        gradients: list[Tensor],
        weight: Tensor,
        moments: Mapping[str, list[Tensor]],
        steps: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """See `Rule.advance`."""
        fresh = self._fresh(gradients, weight, decoupled=self.decoupled)
        moved, state = self._moved(fresh, self._restored(moments), steps)
        lr = float(self.lr)
        direction = list(torch._foreach_div(moved, -lr)) if lr else moved
        if self.weight_decay and self.decoupled:
            direction[0] = direction[0] + self.weight_decay * weight
        return direction, self._stored(state)

    def direction(
        self,
        gradient: TangentVector,
        moments: Moments,
        space: TangentSpace,
        steps: Tensor,
        basis_steps: Tensor | None = None,
    ) -> tuple[TangentVector, dict[str, TangentVector]]:
        """See `Rule.direction`. Directions that the state has summed up stay tangent vectors."""
        direction, advanced = super().direction(gradient, moments, space, steps, basis_steps)
        for name in self.first_moments:
            if name in advanced:
                core, parts = advanced[name]
                inside = {i: reject(space.factor(i), part) for i, part in parts.items()}
                advanced[name] = TangentVector(core, inside)
        return direction, advanced

    def _moved(
        self, gradients: list[Tensor], state: _State, steps: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Where the class moves blocks of zeros, and its state then."""
        blocks = [torch.zeros_like(gradient) for gradient in gradients]
        copies = {name: [block.clone() for block in of] for name, of in state.items()}
        # Members that have counted alike are one parameter: all of them, or each is its own.
        counts = {id(count): count.detach().cpu().double() - 1 for count in steps}
        taken = [counts[id(count)] for count in steps]
        places: list[list[Any]] = [
            [slice(None)] if (of == of[0]).all() else [*range(len(of))] for of in taken
        ]
        parts = [(n, place) for n, of in enumerate(places) for place in of]
        parameters = [blocks[n][place] for n, place in parts]
        optimizer = self.optimizer_cls(parameters, **{"lr": float(self.lr), **self.options})
        for (n, place), parameter in zip(parts, parameters, strict=True):
            parameter.grad = gradients[n][place]
            if copies:
                count = taken[n][:1] if isinstance(place, slice) else taken[n][[place]]
                numbers = {name: of(count, self.options) for name, of in self.counters.items()}
                own = {name: of[n][place] for name, of in copies.items()}
                for name, number in (numbers | {_STEP: count}).items():
                    own[name] = number.squeeze(0).clone()  # each parameter counts by itself
                optimizer.state[parameter] = own
        try:
            optimizer.step()
        except KeyError as error:
            raise IntegratorStateError(
                f"{self.optimizer_cls.__name__}: its step needs a state {error}, which the steps "
                "before did not make; set the options that ask for it from the first step on"
            ) from error

        def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
            left = iter(tensors)
            return [
                next(left) if isinstance(of[0], slice) else torch.stack([next(left) for _ in of])
                for of in places
            ]

        made = optimizer.state[parameters[0]].keys() - {_STEP, *self.counters}
        after = {n: gathered([optimizer.state[p][n] for p in parameters]) for n in sorted(made)}
        return gathered(parameters), after

    def _stored(self, state: _State) -> dict[str, list[Tensor]]:
        """The state in the form that is transported."""
        stored = dict(state)
        for name in self.sizes:
            if name in stored:
                stored[name + _SQUARED] = [size.square() for size in stored.pop(name)]
        for name, center in self.centers.items():
            if center in stored:
                pairs = zip(stored.pop(name), stored[center], strict=True)
                stored[name + _CENTERED] = [(v - m.square()).clamp(min=0) for v, m in pairs]
        names = (*self.first_moments, *self.second_moments)
        return {name: stored[name] for name in names if name in stored}

    def _restored(self, moments: _State) -> dict[str, list[Tensor]]:
        """The state in the form that the class knows."""
        state = dict(moments)
        for name in self.sizes:
            if name + _SQUARED in state:
                state[name] = [square.sqrt() for square in state.pop(name + _SQUARED)]
        for name, center in self.centers.items():
            if name + _CENTERED in state:
                pairs = zip(state.pop(name + _CENTERED), state[center], strict=True)
                state[name] = [v + m.square() for v, m in pairs]
        return state


def adapted_rule(
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    linear: Sequence[str] = (),
    squares: Sequence[str] = (),
    sizes: Sequence[str] = (),
    centers: Mapping[str, str] | None = None,
    counters: Mapping[str, Counter] | None = None,
    decoupled: bool = False,
) -> type[AdaptedRule]:
    """The rule of a torch optimiser that moves each entry of a parameter by itself.

    The class itself moves the coordinates of a Tucker weight, and its state moves along with bases
    and ranks by its kind. Register the result with `register_rule`.

    Args:
        optimizer_cls: The class. Its step must depend on the parameter by weight decay alone. This
            and the names of the state are tried on a few numbers when `TDLRT` is constructed.
        linear: Names of the state that is linear in gradients or in directions, such as a momentum.
            It is projected onto the new tangent space.
        squares: Names of the state that holds a mean or a sum of squares, a number from 0 for each
            entry. It moves like variances (`tdlrt.linalg.Transport.squares`).
        sizes: Names of the state that holds the size of an entry, such as a running maximum of |G|.
            Its square is stored, as NAME_squared, and moves like variances. So the new size is a
            root mean square of old ones with the shares R_ij^2 that the new entry has in them: at
            most their maximum, while |G'| <= sum_j |R_ij| |G_j| can be larger by a factor sqrt(r).
        centers: Names of squares from which the class subtracts the square of a mean, and the name
            of the mean. Where it keeps that mean, the difference is stored, as NAME_centered: moved
            apart, the two could have a negative difference.
        counters: Numbers of the state other than 'step', as functions of the number of steps taken
            (a tensor of such numbers) and of the options.
        decoupled: Whether weight decay is decoupled, W (1 - lr weight_decay). An option
            decoupled_weight_decay of the class is obeyed in any case.

    Raises:
        UnsupportedOptimizerError: optimizer_cls is no class of torch optimisers, or names are a
            string in place of a collection of strings.
    """
    check_class(optimizer_cls)
    for kind, names in {"linear": linear, "squares": squares, "sizes": sizes}.items():
        if isinstance(names, str):
            raise UnsupportedOptimizerError(
                f"{kind}: got the string {names!r}, expected a list of names; pass [{names!r}]"
            )
    centers = dict(centers or {})
    spread = (*squares, *(f"{n}{_SQUARED}" for n in sizes), *(f"{n}{_CENTERED}" for n in centers))
    members = {
        "__doc__": f"torch.optim.{optimizer_cls.__name__}, by its own class.",
        "__module__": __name__,
        "optimizer_cls": optimizer_cls,
        "first_moments": tuple(linear),
        "second_moments": spread,
        "sizes": tuple(sizes),
        "centers": centers,
        "counters": dict(counters or {}),
        "decouples": decoupled,
    }
    made = type(f"{optimizer_cls.__name__}Rule", (AdaptedRule,), members)
    return cast("type[AdaptedRule]", made)
