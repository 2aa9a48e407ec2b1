"""`TDLRT`: the integrators as a torch optimiser that wraps the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.errors import (
    IntegratorStateError,
    NonFiniteError,
    NothingMatchedError,
    RankError,
    UnsupportedOptimizerError,
)
from tdlrt.nn import TuckerLayer
from tdlrt.optim.sgd import SGDRule
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.steps import Augmented, Iterate, basis_step, core_step, parallel_step, retract
from tdlrt.ranks import FixedRank, RankPolicy, RelativeTolerance

__all__ = ["TDLRT"]

_RULES: dict[type[torch.optim.Optimizer], type[SGDRule]] = {torch.optim.SGD: SGDRule}
_EXTRA = "tdlrt"


class TDLRT(torch.optim.Optimizer):
    """Rank-adaptive optimiser for the Tucker layers of a model; the rest gets the plain optimiser.

    `param_groups[0]` holds the cores and bases of the Tucker layers, `param_groups[1]` every other
    parameter of the model. Both take any learning-rate scheduler.

    - `integrator="parallel"` takes one gradient a step: W_1 = R(W_0 - lr P(grad L(W_0))), P the
      projection onto the tangent space and R the truncation of the rank policy.
    - `integrator="bug"` spends one gradient on the bases, which it augments to [U_i | K_i(1)], then
      `core_steps` gradients on the core in them, and truncates. `step(closure)` does all of it
      on one closure. Without a closure the calls alternate: one for the bases, `core_steps` for
      the core. The other parameters move in the core steps, not in the basis step.

    Args:
        model: A model with Tucker layers (see `tdlrt.factorize_`).
        optimizer_cls: The plain optimiser's class; today torch.optim.SGD.
        tau: Relative truncation tolerance in [0, 1), short for RelativeTolerance(tau); 0.1 if
            neither this nor rank_policy is given.
        rank_policy: `RelativeTolerance(...)` or `FixedRank()`.
        integrator: 'parallel' or 'bug'.
        adapt_every: Ranks are examined every so many steps; they stay as they are in between.
        core_steps: Steps on the core for one on the bases (`bug` alone).
        **optimizer_kwargs: Passed to optimizer_cls (lr, momentum, weight_decay, ...).

    Raises:
        NothingMatchedError: The model has no Tucker layer.
        UnsupportedOptimizerError: The class or one of its options has no rule for Tucker weights.
        RankError: tau is outside [0, 1), or given together with rank_policy.
        ValueError: Another argument is out of its range.

    Source: arXiv:2305.19059 (`bug`), arXiv:2412.00858 (`parallel`), arXiv:2506.17475 (momentum).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_cls: type[torch.optim.Optimizer],
        *,
        tau: float | None = None,
        rank_policy: RankPolicy | None = None,
        integrator: str = "parallel",
        adapt_every: int = 1,
        core_steps: int = 1,
        **optimizer_kwargs: Any,
    ) -> None:
        self.rank_policy = _resolve_policy(tau, rank_policy)
        self._rule_type = _resolve_rule(optimizer_cls)
        if integrator not in ("parallel", "bug"):
            raise ValueError(f"integrator: got {integrator!r}, expected 'parallel' or 'bug'")
        for name, value in (("adapt_every", adapt_every), ("core_steps", core_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an int of at least 1")
        self.integrator = integrator
        self.adapt_every = adapt_every
        self.core_steps = core_steps
        self._slots = {
            name: LayerSlot(name, module)
            for name, module in model.named_modules()
            if isinstance(module, TuckerLayer)
        }
        if not self._slots:
            raise NothingMatchedError(
                "model: got one without Tucker layers; call tdlrt.factorize_(model) first"
            )
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self._steps = 0
        self._frozen = False
        self._core_steps_left = 0
        self._resting_ranks: dict[str, list[int]] = {}

        tucker = {id(p): p for slot in self._slots.values() for p in slot.parameters}
        others = [parameter for parameter in self._names if id(parameter) not in tucker]
        self._plain = optimizer_cls([{"params": others}], **optimizer_kwargs)
        self._rule_type.from_group(self._plain.param_groups[0])
        super().__init__(
            [{"params": list(tucker.values())}, {"params": others}], self._plain.defaults
        )
        self._link()

    def _link(self) -> None:
        """Let the plain optimiser work on this one's groups and state, not on copies of them."""
        self._plain.param_groups = self.param_groups[1:]
        self._plain.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters outside the Tucker layers, as in torch."""
        super().add_param_group(param_group)
        self._link()

    def freeze_ranks(self) -> None:
        """Keep every layer's ranks as they are from now on; the bases still rotate."""
        self._frozen = True

    @property
    def ranks_frozen(self) -> bool:
        """Whether `freeze_ranks` was called."""
        return self._frozen

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters; see the class for what a step is with each integrator.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss.
                `parallel` evaluates it once, `bug` 1 + core_steps times.

        Returns:
            The loss of the first evaluation, or None without a closure.

        Raises:
            NonFiniteError: A gradient or a weight is not finite; nothing was changed.
            IntegratorStateError: The state does not fit the layers, or a closure came in the
                middle of an alternation.
        """
        if closure is None:
            self._advance()
            return None
        if self._core_steps_left:
            raise IntegratorStateError(
                f"closure: got one in the middle of a `bug` step; call step() without it "
                f"{self._core_steps_left} more times first, or always pass it"
            )
        with torch.enable_grad():
            loss = closure()
        if self.integrator == "parallel":
            self._advance()
        else:
            with self._undo_on_error():
                self._advance()
                while self._core_steps_left:
                    with torch.enable_grad():
                        closure()
                    self._advance()
        return loss

    def _advance(self) -> None:
        """Spend the gradients that are there on what is due."""
        device = next(iter(self._slots.values())).layer.core.device
        with torch.autocast(device.type, enabled=False):
            if self.integrator == "parallel":
                self._parallel_pass()
            elif self._core_steps_left:
                self._core_pass()
            else:
                self._basis_pass()
        # Autocast would go on with casts of the weights from before the step.
        torch.clear_autocast_cache()

    def _parallel_pass(self) -> None:
        active = self._active_slots()
        rule, policy = self._rule(), self._policy()
        updates: dict[str, Iterate | Augmented] = {}
        for slot in active:
            iterate = slot.iterate(self.state)
            gradient = slot.gradient(iterate.space)
            updates[slot.name] = parallel_step(iterate, gradient, rule, policy)
        self._assign(updates)
        self._plain.step()
        self._steps += 1

    def _basis_pass(self) -> None:
        active = self._active_slots()
        rule = self._rule()
        updates: dict[str, Iterate | Augmented] = {}
        for slot in active:
            iterate = slot.iterate(self.state)
            updates[slot.name] = basis_step(iterate, slot.gradient(iterate.space), rule)
        self._resting_ranks = {slot.name: list(slot.layer.ranks) for slot in active}
        self._assign(updates)
        self._core_steps_left = self.core_steps

    def _core_pass(self) -> None:
        self._check_finite()
        rule, last = self._rule(), self._core_steps_left == 1
        updates: dict[str, Iterate | Augmented] = {}
        for name in self._resting_ranks:
            slot = self._slots[name]
            augmented = slot.augmented(self.state)
            if slot.layer.core.grad is not None:
                augmented = core_step(augmented, slot.core_gradient(), rule)
            updates[name] = self._retracted(slot, augmented) if last else augmented
        self._assign(updates)
        self._plain.step()
        self._core_steps_left -= 1
        if last:
            self._resting_ranks = {}
            self._steps += 1

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        """Leave `bug` in the bases it came with when a closure or a gradient fails.

        Before the first core step the model becomes what it was, bit for bit; after it the core
        steps taken are kept and truncated.
        """
        before = {name: slot.iterate(self.state) for name, slot in self._slots.items()}
        try:
            yield
        except BaseException:
            if self._core_steps_left == self.core_steps:
                self._assign({name: before[name] for name in self._resting_ranks})
            elif self._core_steps_left:
                slots = [self._slots[name] for name in self._resting_ranks]
                self._assign(
                    {slot.name: self._retracted(slot, slot.augmented(self.state)) for slot in slots}
                )
            self._core_steps_left, self._resting_ranks = 0, {}
            raise

    def _retracted(self, slot: LayerSlot, augmented: Augmented) -> Iterate:
        """End of a `bug` step for one layer."""
        ranks, modes = self._resting_ranks[slot.name], slot.layer.learned_modes
        return retract(augmented, self._policy(), ranks, modes)

    def _rule(self) -> SGDRule:
        return self._rule_type.from_group(self.param_groups[0])

    def _policy(self) -> RankPolicy:
        due = (self._steps + 1) % self.adapt_every == 0
        return self.rank_policy if due and not self._frozen else FixedRank()

    def _active_slots(self) -> list[LayerSlot]:
        self._check_finite()
        return [slot for slot in self._slots.values() if slot.has_gradient()]

    def _assign(self, updates: Mapping[str, Iterate | Augmented]) -> None:
        """Put all layers' updates in place; every one was computed before the first is."""
        for name, update in updates.items():
            self._slots[name].assign_(update, self.state)

    def _check_finite(self) -> None:
        parameters = list(self._names)
        tensors = [p.detach() for p in parameters if p.is_floating_point()]
        tensors += [p.grad for p in parameters if p.grad is not None]
        # One synchronisation for all. A norm can overflow where no entry does: then look closer.
        norms = [norm.to(tensors[0].device).float() for norm in torch._foreach_norm(tensors, 2)]
        if torch.isfinite(torch.stack(norms)).all():
            return
        for parameter in parameters:
            for what, tensor in (("gradient", parameter.grad), ("value", parameter.detach())):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise NonFiniteError(
                        f"{self._names[parameter]}: its {what} has NaN or infinite entries, "
                        "expected finite ones; nothing was changed. Lower lr, or check the loss"
                    )

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser: torch's own keys and the integrator's position under 'tdlrt'."""
        state: dict[str, Any] = super().state_dict()
        state[_EXTRA] = {
            "integrator": self.integrator,
            "steps": self._steps,
            "frozen": self._frozen,
            "core_steps_left": self._core_steps_left,
            "resting_ranks": {name: list(ranks) for name, ranks in self._resting_ranks.items()},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; load the model's state_dict first, so that its ranks are there.

        Args:
            state_dict: What `state_dict()` gave.

        Raises:
            IntegratorStateError: It is another optimiser's, another integrator's, or another
                model's, or the model has other ranks. Nothing was changed.
        """
        extra = state_dict.get(_EXTRA)
        if extra is None:
            raise IntegratorStateError(
                "state_dict: got one without a 'tdlrt' entry, expected what "
                "TDLRT.state_dict() gives"
            )
        if extra["integrator"] != self.integrator:
            raise IntegratorStateError(
                f"state_dict: got one of integrator={extra['integrator']!r}, expected "
                f"{self.integrator!r}; construct TDLRT with the same integrator"
            )
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        self._link()
        self._steps, self._frozen = extra["steps"], extra["frozen"]
        self._core_steps_left = extra["core_steps_left"]
        self._resting_ranks = {name: list(ranks) for name, ranks in extra["resting_ranks"].items()}

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        got = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if got != expected:
            raise IntegratorStateError(
                f"state_dict: got groups of {got} parameters, expected {expected}; it is of "
                "another model"
            )
        for saved, own in zip(groups, self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], own["params"], strict=True):
                for value in state_dict["state"].get(key, {}).values():
                    if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                        raise IntegratorStateError(
                            f"{self._names[parameter]}: got a state of shape {tuple(value.shape)} "
                            f"for a parameter of shape {tuple(parameter.shape)}; load the model's "
                            "state_dict before the optimiser's"
                        )


def _resolve_policy(tau: float | None, rank_policy: RankPolicy | None) -> RankPolicy:
    if rank_policy is None:
        return RelativeTolerance(0.1 if tau is None else tau)
    if tau is not None:
        raise RankError(f"tau: got {tau} and rank_policy={rank_policy}; give one of them")
    if not isinstance(rank_policy, FixedRank | RelativeTolerance):
        raise RankError(
            f"rank_policy: got {rank_policy!r}, expected RelativeTolerance(...) or FixedRank()"
        )
    return rank_policy


def _resolve_rule(optimizer_cls: type[torch.optim.Optimizer]) -> type[SGDRule]:
    if optimizer_cls not in _RULES:
        known = ", ".join(f"torch.optim.{cls.__name__}" for cls in _RULES)
        got = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got {got}, which has no rule for Tucker weights; use {known}"
        )
    return _RULES[optimizer_cls]
