"""`TDLRT`: the integrators as a torch optimiser that wraps the user's own."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdlrt.errors import (
    IntegratorStateError,
    NonFiniteError,
    RankError,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
)
from tdlrt.linalg import TangentVector, well_conditioned
from tdlrt.nn.layer import tucker_layers
from tdlrt.optim.adam import AdamRule, AdamWRule
from tdlrt.optim.rule import Rule
from tdlrt.optim.sgd import SGDRule
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.steps import (
    Augmented,
    Iterate,
    Lifted,
    augmented_step,
    basis_step,
    core_step,
    fixed_rank_step,
    retract,
    retract_lifted,
)
from tdlrt.optim.team import Team
from tdlrt.optim.threads import by_layer
from tdlrt.ranks import ByName, Candidate, FixedRank, RankPolicy, RelativeTolerance

__all__ = ["TDLRT"]

_RULES: dict[type[torch.optim.Optimizer], type[Rule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamWRule,
}
_EXTRA = "tdlrt"

Result = TypeVar("Result")

# Steps without a look at a layer's ranks after which a user is told.
_LONG_WITHOUT_ADAPTATION = 1000

# Share of the past in the running mean of squared gradients of the cores.
_CURVATURE_DECAY = 0.9


class TDLRT(torch.optim.Optimizer):
    """Rank-adaptive optimiser for the Tucker layers of a model; the rest gets the plain optimiser.

    `param_groups[0]` holds the cores and bases of the Tucker layers, `param_groups[1]` every other
    parameter of the model; groups of your own follow. All take any learning-rate scheduler.

    - `integrator="parallel"` takes one gradient a step: W_1 = R(W_0 - lr P(grad L(W_0))), P the
      projection onto the tangent space and R the truncation of the rank policy.
    - `integrator="bug"` spends one gradient on the bases, which it augments to [U_i | K_i(1)], then
      `core_steps` gradients on the core in them, and truncates. `step(closure)` does all of it
      on one closure. Without a closure the calls alternate: one for the bases, `core_steps` for
      the core. The other parameters move in the core steps, not in the basis step.

    Args:
        model: A model with Tucker layers (see `tdlrt.factorize_`).
        optimizer_cls: The plain optimiser's class: torch.optim.SGD, Adam or AdamW.
        tau: Relative truncation tolerance in [0, 1), short for RelativeTolerance(tau); 0.1 if
            neither this nor rank_policy is given.
        rank_policy: `RelativeTolerance(...)`, `ParameterBudget(...)`, `FixedRank()`, or a dict from
            layer-name pattern to one of these (the first that matches; layers that none matches
            keep their ranks).
        integrator: 'parallel' or 'bug'.
        adapt_every: Ranks are examined every so many steps; they stay as they are in between.
        core_steps: Steps on the core for one on the bases (`bug` alone).
        freeze_after: Steps after which `freeze_ranks` is called; None for never.
        skip_nonfinite: How many steps in a row may be skipped, and counted in `skipped_steps`,
            because something is not finite; 0 for none. The next one raises NonFiniteError.
        param_groups: Groups with options of their own, as in torch: dicts with 'params' and any of
            lr, weight_decay, ... A Tucker layer's core and bases belong in one group.
        **optimizer_kwargs: Passed to optimizer_cls (lr, momentum, weight_decay, ...).

    Raises:
        NothingMatchedError: The model, or a pattern of the policy, has no Tucker layer.
        UnsupportedLayerError: The parameters are sharded (FSDP, tensor parallelism).
        UnsupportedOptimizerError: The class or one of its options has no rule for Tucker weights.
        RankError: tau is outside [0, 1), or given together with rank_policy, or the policy cannot
            be met.
        ValueError: Another argument is out of its range.

    Source: arXiv:2305.19059 (`bug`), arXiv:2412.00858 (`parallel`), arXiv:2506.17475 (momentum).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_cls: type[torch.optim.Optimizer],
        *,
        tau: float | None = None,
        rank_policy: RankPolicy | Mapping[str, RankPolicy] | None = None,
        integrator: str = "parallel",
        adapt_every: int = 1,
        core_steps: int = 1,
        freeze_after: int | None = None,
        skip_nonfinite: int = 0,
        param_groups: Iterable[Mapping[str, Any]] = (),
        **optimizer_kwargs: Any,
    ) -> None:
        policy = _resolve_policy(tau, rank_policy)
        self._rule_type = _resolve_rule(optimizer_cls)
        if integrator not in ("parallel", "bug"):
            raise ValueError(f"integrator: got {integrator!r}, expected 'parallel' or 'bug'")
        _check_count("adapt_every", adapt_every)
        _check_count("core_steps", core_steps)
        if freeze_after is not None:
            _check_count("freeze_after", freeze_after)
        _check_count("skip_nonfinite", skip_nonfinite, least=0)
        self.integrator = integrator
        self.adapt_every = adapt_every
        self.core_steps = core_steps
        self.freeze_after = freeze_after
        self.skip_nonfinite = skip_nonfinite
        self.team = Team()
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._slots = {name: LayerSlot(name, layer) for name, layer in tucker_layers(model).items()}
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        _check_whole(self._names)
        self._steps = 0
        self._frozen = False
        self._settling = False
        self._core_steps_left = 0
        self._resting_ranks: dict[str, list[int]] = {}
        self._examined = dict.fromkeys(self._slots, 0)
        self._curvatures: dict[str, Tensor] = {}
        self._warned = False
        self._asking = threading.Lock()  # a policy may have a state: one question at a time
        self._check_policy(policy)
        self._rank_policy = policy

        self._tucker = {id(p) for slot in self._slots.values() for p in slot.parameters}
        if len(self._tucker) < sum(len(slot.parameters) for slot in self._slots.values()):
            raise ValueError(
                "model: got Tucker layers that share a core or a basis, which would move twice a "
                "step; use one layer in both places"
            )
        given = [{**group, "params": _as_list(group["params"])} for group in param_groups]
        taken = {id(parameter) for group in given for parameter in group["params"]}
        rest = [parameter for parameter in self._names if id(parameter) not in taken]
        groups = [
            {"params": [p for p in rest if id(p) in self._tucker]},
            {"params": [p for p in rest if id(p) not in self._tucker]},
            *given,
        ]
        # It checks the options and knows the defaults; its groups are set in every step.
        self._plain = optimizer_cls(list(self._names), **optimizer_kwargs)
        super().__init__(groups, self._plain.defaults)
        self._plain.state = self.state
        self._group_of = self._find_groups()
        for group in self.param_groups:
            self._rule_type.from_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by torch for every group at construction; afterwards the groups stay as they are.

        Every parameter of the model is in a group from the start, and no other can be added: of
        those it would not be known whether they are bases of a Tucker layer.

        Raises:
            ValueError: A parameter is in a group already, or is none of the model's.
        """
        parameters = _as_list(param_group["params"])
        for parameter in parameters:
            if not isinstance(parameter, Tensor) or parameter not in self._names:
                raise ValueError(
                    "param_groups: got a parameter that is not the model's; pass TDLRT a module "
                    "that holds it too, such as nn.ModuleList([model, criterion])"
                )
        super().add_param_group({**param_group, "params": parameters})

    def _find_groups(self) -> dict[str, int]:
        """Index of the param_group of each layer."""
        index = {
            id(parameter): number
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
        }
        found = {}
        for name, slot in self._slots.items():
            numbers = {index[id(parameter)] for parameter in slot.parameters}
            if len(numbers) > 1:
                raise ValueError(
                    f"param_groups: {name} has parameters in groups {sorted(numbers)}; put its "
                    "core and factors in the same group"
                )
            found[name] = numbers.pop()
        return found

    @property
    def rank_policy(self) -> RankPolicy:
        """Which ranks to keep. A new policy may be assigned; it holds from the next step."""
        return self._rank_policy

    @rank_policy.setter
    def rank_policy(self, policy: RankPolicy | Mapping[str, RankPolicy]) -> None:
        if self._frozen:
            raise IntegratorStateError(
                "rank_policy: the ranks are frozen, so no policy would take effect; construct a "
                "new TDLRT to adapt them again"
            )
        policy = _resolve_policy(None, policy)
        self._check_policy(policy)
        self._rank_policy = policy

    def _check_policy(self, policy: RankPolicy) -> None:
        policy.check(
            {
                name: self._candidate(name, slot.layer.core.detach())
                for name, slot in self._slots.items()
            }
        )

    def freeze_ranks(self) -> None:
        """Keep every layer's ranks from now on; the bases still rotate.

        Spare directions of the policy are given up first, and a budget is met: at once, or, in the
        middle of a step of `bug`, at its end.
        """
        if self._frozen:
            return
        self._frozen = True
        if isinstance(self._rank_policy.settled(), FixedRank):
            return
        self._settling = True
        if not self._core_steps_left:
            with self._plain_arithmetic():
                self._assign(self._retracted(self._at_rest(self._slots)))
            self._settling = False

    @property
    def ranks_frozen(self) -> bool:
        """Whether `freeze_ranks` was called."""
        return self._frozen

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their norm is at most max_norm.

        A Tucker layer counts with the norm of its projected gradient,
        ||P(grad_W L)||^2 = ||C.||^2 + sum_i ||K._i||^2: grad_{U_i} L scales with the core and says
        little about the weight. In a core step of `bug` only the core counts.

        Args:
            max_norm: Largest norm to leave.
            error_if_nonfinite: Raise if the norm is NaN or infinite, before anything is scaled.

        Returns:
            The norm before.

        Raises:
            NonFiniteError: As error_if_nonfinite asks.
        """
        norms = [torch.zeros((), device=self._device())]
        for parameter in self._names:
            if parameter.grad is not None and id(parameter) not in self._tucker:
                norms.append(torch.linalg.vector_norm(parameter.grad.double()))
        with self._plain_arithmetic():
            if self._core_steps_left:
                for slot in (self._slots[name] for name in self._resting_ranks):
                    if slot.layer.core.grad is not None:
                        norms.append(torch.linalg.vector_norm(slot.core_gradient()))
            else:
                norms += [slot.gradient().norm() for slot in self._active_slots().values()]
        total: Tensor = torch.linalg.vector_norm(
            torch.stack([norm.to(self._device(), torch.float64) for norm in norms])
        )
        if error_if_nonfinite and not torch.isfinite(total):
            raise NonFiniteError(
                f"gradients: their norm is {float(total)}, expected a finite number; nothing was "
                "scaled. Lower lr, or check the loss"
            )
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for parameter in self._names:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device, parameter.grad.dtype))
        return total

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters; see the class for what a step is with each integrator.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss.
                `parallel` evaluates it once, `bug` 1 + core_steps times, all but the first without
                gradients of the bases.

        Returns:
            The loss of the first evaluation, or None without a closure.

        Raises:
            NonFiniteError: A gradient or a weight is not finite, more than skip_nonfinite times in
                a row; nothing was changed.
            IntegratorStateError: The state does not fit the layers, or a closure came in the
                middle of an alternation.
        """
        if closure is None:
            with self._skipping():
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
            with self._skipping():
                self._advance()
        else:
            with self._skipping(), self._undo_on_error():
                self._advance()
                self._core_passes(closure)
        return loss

    def _core_passes(self, closure: Callable[[], Any]) -> None:
        cores = [self._slots[name].layer.core for name in self._resting_ranks]
        try:
            while self._core_steps_left:
                with self._bases_at_rest(), torch.enable_grad():
                    closure()
                self._advance()
        finally:
            for core in cores:  # the bases have no gradient, and a layer has all of them or none
                core.grad = None

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Turn errors of numbers that are not finite into counts, up to the limit."""
        try:
            yield
        except NonFiniteError:
            if self._skipped_in_a_row >= self.skip_nonfinite:
                raise
            self._skipped_in_a_row += 1
            self.skipped_steps += 1
        else:
            self._skipped_in_a_row = 0

    @contextmanager
    def _bases_at_rest(self) -> Iterator[None]:
        """No gradients of bases inside: a core step has no use for them."""
        resting = [
            basis
            for name in self._resting_ranks
            for basis in self._slots[name].bases
            if basis.requires_grad
        ]
        for basis in resting:
            basis.requires_grad_(False)
        try:
            yield
        finally:
            for basis in resting:
                basis.requires_grad_(True)

    def _advance(self) -> None:
        """Spend the gradients that are there on what is due."""
        with self._plain_arithmetic():
            if self.integrator == "parallel":
                self._parallel_pass()
            elif self._core_steps_left:
                self._core_pass()
            else:
                self._basis_pass()

    def _device(self) -> torch.device:
        return next(iter(self._slots.values())).layer.core.device

    @contextmanager
    def _plain_arithmetic(self) -> Iterator[None]:
        """No autocast inside, and none of its casts of weights from before outside."""
        with torch.no_grad(), torch.autocast(self._device().type, enabled=False):
            yield
        torch.clear_autocast_cache()

    def _parallel_pass(self) -> None:
        active = self._active_slots()
        examined = active if self._examines() else {}
        self._update(active, self._examined_steps if examined else self._fixed_rank_steps)
        self._finish_step(examined)

    def _update(
        self,
        names: Collection[str],
        compute: Callable[[Collection[str]], Mapping[str, Iterate | Lifted]],
    ) -> None:
        """Compute the steps of layers and put them in place, each on the process whose it is."""
        # A joint policy compares the spectra of all layers.
        team = Team() if self._examines() and self._policy().joint else self.team
        with team.agreement():
            updates = compute(team.share(names))
        self._assign(updates)
        team.exchange([self._slots[name] for name in names], self.state, self._curvatures)

    def _fixed_rank_steps(self, names: Collection[str]) -> dict[str, Iterate]:
        updates = self._by_layer(names, partial(self._after, fixed_rank_step))
        self._check_finite((), updates.values())
        self._observe(updates)
        return updates

    def _examined_steps(self, names: Collection[str]) -> dict[str, Iterate]:
        """Steps with truncation: layer by layer where the policy allows, for memory's sake."""
        if self._policy().joint:
            augmented = self._by_layer(names, partial(self._after, augmented_step))
            self._check_finite(augmented.values())
            self._observe(augmented)
            return self._retracted(augmented)
        self._check_finite(())
        return self._by_layer(names, self._examined_step)

    def _examined_step(self, name: str) -> Iterate:
        augmented = {name: self._after(augmented_step, name)}
        self._check_finite(augmented.values(), inputs=False)
        self._observe(augmented)
        return self._retracted(augmented)[name]

    def _basis_pass(self) -> None:
        active = self._active_slots()
        ranks = {name: list(slot.layer.ranks) for name, slot in active.items()}
        self._update(active, self._basis_steps)
        self._resting_ranks = ranks
        self._core_steps_left = self.core_steps

    def _basis_steps(self, names: Collection[str]) -> dict[str, Lifted]:
        updates = self._by_layer(names, partial(self._after, basis_step))
        self._check_finite(updates.values())
        return updates

    def _after(self, step: Callable[[Iterate, TangentVector, Rule], Result], name: str) -> Result:
        """A layer after a step along its gradient."""
        slot, rule = self._slots[name], self._rule(name)
        return step(slot.iterate(self.state, rule), slot.gradient(), rule)

    def _by_layer(
        self, names: Collection[str], function: Callable[[str], Result]
    ) -> dict[str, Result]:
        return by_layer(function, {name: self._slots[name].work() for name in names})

    def _core_pass(self) -> None:
        last = self._core_steps_left == 1
        examined = self._resting_ranks if last and self._examines() else {}
        self._update(self._resting_ranks, self._last_core_steps if last else self._core_steps)
        self._core_steps_left -= 1
        if last:
            self._resting_ranks = {}
            self._settling = False
            self._finish_step(examined)
        else:
            self._plain_step()

    def _core_steps(self, names: Collection[str]) -> dict[str, Lifted]:
        lifted = self._by_layer(names, self._after_core_step)
        self._check_finite(lifted.values())
        self._observe(lifted)
        return lifted

    def _after_core_step(self, name: str) -> Lifted:
        slot, rule = self._slots[name], self._rule(name)
        lifted = slot.lifted(self.state, rule)
        if slot.layer.core.grad is None:
            return lifted
        return core_step(lifted, slot.core_gradient(), rule)

    def _last_core_steps(self, names: Collection[str]) -> dict[str, Iterate]:
        steps: dict[str, Augmented | Lifted] = {**self._core_steps(names)}
        if self._settling:  # it is for the layers, too, that this step left alone
            steps |= self._at_rest(n for n in self._slots if n not in self._resting_ranks)
        return self._retracted(steps)

    def _observe(self, names: Iterable[str]) -> None:
        """Take the gradients into the running mean squares of the entries of grad_C L."""
        if self._frozen and not self._settling:  # nobody will ask again
            return
        for name in names:
            if self._slots[name].layer.core.grad is not None:
                square = self._slots[name].core_gradient().double().square().mean()
                past = self._curvatures.get(name, square).to(square)
                self._curvatures[name] = torch.lerp(square, past, _CURVATURE_DECAY)

    def _finish_step(self, examined: Iterable[str]) -> None:
        self._plain_step()
        self._steps += 1
        self._examined |= dict.fromkeys(examined, self._steps)
        self._warn_if_never_examined()
        if self._steps == self.freeze_after:
            self.freeze_ranks()

    def _plain_step(self) -> None:
        """Let the plain optimiser move what is not in Tucker format, on this one's groups."""
        self._plain.param_groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in self._tucker]}
            for group in self.param_groups
        ]
        self._plain.step()

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        """Leave `bug` in the bases it came with when a closure or a gradient fails.

        Before the first core step the model becomes what it was, bit for bit; after it the core
        steps taken are kept and truncated.
        """
        before = {
            name: slot.iterate(self.state, self._rule(name)) for name, slot in self._slots.items()
        }
        try:
            yield
        except BaseException:
            if self._core_steps_left == self.core_steps:
                self._assign({name: before[name] for name in self._resting_ranks})
            elif self._core_steps_left:
                lifted = {
                    name: self._slots[name].lifted(self.state, self._rule(name))
                    for name in self._resting_ranks
                }
                self._assign(self._retracted(lifted))
            self._core_steps_left, self._resting_ranks = 0, {}
            raise

    def _at_rest(self, names: Iterable[str]) -> dict[str, Augmented]:
        """Layers as they are, to be truncated without a step."""
        iterates = {name: self._slots[name].iterate(self.state, self._rule(name)) for name in names}
        return {name: Augmented(iterate.point, iterate) for name, iterate in iterates.items()}

    def _retracted(self, steps: Mapping[str, Augmented | Lifted]) -> dict[str, Iterate]:
        """Truncate all layers to the ranks that the policy chooses for them together."""
        policy = self._policy()
        candidates = {
            name: self._candidate(name, steps[name].point.core)
            if name in steps
            else self._candidate(name, slot.layer.core.detach())._replace(resting=True)
            for name, slot in self._slots.items()
            if policy.joint or name in steps
        }
        with self._asking:
            rules = policy.rules(candidates, self._steps + 1)

        def retracted(name: str) -> Iterate:
            step, rule = steps[name], self._rule(name)
            if isinstance(step, Augmented):
                update = retract(step, rule, rules[name])
            else:
                modes = self._slots[name].layer.learned_modes
                update = retract_lifted(step, rule, rules[name], modes)
            update.space.settle()
            return update

        return self._by_layer(steps, retracted)

    def _candidate(self, name: str, core: Tensor) -> Candidate:
        layer = self._slots[name].layer
        ranks = self._resting_ranks.get(name, layer.ranks)
        curvature = self._curvatures.get(name)
        return Candidate(core, ranks, layer.shape, layer.learned_modes, curvature)

    def _rule(self, name: str) -> Rule:
        return self._rule_type.from_group(self.param_groups[self._group_of[name]])

    def _examines(self) -> bool:
        """Whether the ranks may change in the step that is under way."""
        return not isinstance(self._policy(), FixedRank)

    def _policy(self) -> RankPolicy:
        if self._settling:
            return self._rank_policy.settled()
        due = (self._steps + 1) % self.adapt_every == 0
        return self._rank_policy if due and not self._frozen else FixedRank()

    def _warn_if_never_examined(self) -> None:
        if self._warned or self._frozen or isinstance(self._rank_policy, FixedRank):
            return
        idle = [
            name
            for name, step in self._examined.items()
            if self._steps - step >= _LONG_WITHOUT_ADAPTATION
        ]
        if idle:
            self._warned = True
            warnings.warn(
                f"the ranks of {', '.join(idle)} have not been examined for "
                f"{_LONG_WITHOUT_ADAPTATION} steps (adapt_every={self.adapt_every}); lower "
                "adapt_every, check that these layers get a gradient, or call freeze_ranks()",
                stacklevel=_level_of_the_user(),
            )

    def _active_slots(self) -> dict[str, LayerSlot]:
        return {name: slot for name, slot in self._slots.items() if slot.has_gradient()}

    def _assign(self, updates: Mapping[str, Iterate | Lifted]) -> None:
        """Put all layers' updates in place; every one was computed before the first is."""
        for name, update in updates.items():
            self._slots[name].assign_(update, self.state, self._rule(name))

    def _check_finite(
        self,
        steps: Iterable[Augmented | Lifted],
        updates: Collection[Iterate] = (),
        *,
        inputs: bool = True,
    ) -> None:
        """Refuse values, gradients and results that are not finite, and settle the new spaces.

        One synchronisation for all: the device is not waited for elsewhere in a step at fixed rank.
        """
        parameters = list(self._names) if inputs else []
        tensors = [p.detach() for p in parameters if p.is_floating_point()]
        tensors += [p.grad for p in parameters if p.grad is not None]
        cores = [step.point.core for step in (*steps, *updates)]
        device = self._device()
        tensors.append(torch.zeros((), device=device))  # there may be none
        norms = [norm.to(device).float() for norm in torch._foreach_norm(tensors, 2)]
        results = [torch.linalg.vector_norm(core, dtype=torch.float64).to(device) for core in cores]
        results.append(torch.zeros((), dtype=torch.float64, device=device))
        flags = [torch.stack(scalars).isfinite().all()[None] for scalars in (norms, results)]
        if updates:
            flags.append(well_conditioned([update.space for update in updates]).to(device))
        given_finite, found_finite, *safe = torch.cat(flags).tolist()
        for update in updates:
            moving = len(update.space.moving_modes)
            update.space.settle(safe[:moving])
            safe = safe[moving:]
        if not given_finite:
            self._check_entries(parameters)
        if not found_finite:
            raise NonFiniteError(
                "weight: the step would make it NaN or infinite, expected finite values; nothing "
                "was changed. Lower lr"
            )

    def _check_entries(self, parameters: Iterable[Tensor]) -> None:
        """Look closer: a norm can overflow where no entry does."""
        for parameter in parameters:
            for what, tensor in (("gradient", parameter.grad), ("value", parameter.detach())):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise NonFiniteError(
                        f"{self._names[parameter]}: its {what} has NaN or infinite entries, "
                        "expected finite ones; nothing was changed. Lower lr, or check the loss"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies and pickles: this object belongs to its model's layers.

        Raises:
            IntegratorStateError: Always.
        """
        raise IntegratorStateError(
            "optimizer: TDLRT holds its model's layers and cannot be copied or pickled; construct "
            "one for the copied model and load this one's state_dict() there"
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser: torch's own keys and the integrator's position under 'tdlrt'."""
        state: dict[str, Any] = super().state_dict()
        state[_EXTRA] = {
            "integrator": self.integrator,
            "optimizer": type(self._plain).__name__,
            "steps": self._steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "frozen": self._frozen,
            "settling": self._settling,
            "core_steps_left": self._core_steps_left,
            "resting_ranks": {name: list(ranks) for name, ranks in self._resting_ranks.items()},
            "curvatures": dict(self._curvatures),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; load the model's state_dict first, so that its ranks are there.

        The rank policy is not part of the state: the one that this optimiser was constructed with
        goes on from here.

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
        own = type(self._plain).__name__
        if extra.get("optimizer", own) != own:
            raise IntegratorStateError(
                f"state_dict: got one of {extra['optimizer']}, expected one of {own}; construct "
                "TDLRT with the same optimizer_cls"
            )
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        self._plain.state = self.state
        self._steps, self._frozen = extra["steps"], extra["frozen"]
        self._settling = extra["settling"]
        self.skipped_steps = extra.get("skipped_steps", 0)
        self._skipped_in_a_row = extra.get("skipped_in_a_row", 0)
        self._examined = dict.fromkeys(self._slots, self._steps)
        self._core_steps_left = extra["core_steps_left"]
        self._resting_ranks = {name: list(ranks) for name, ranks in extra["resting_ranks"].items()}
        self._curvatures = dict(extra.get("curvatures", {}))

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


def _resolve_policy(
    tau: float | None, rank_policy: RankPolicy | Mapping[str, RankPolicy] | None
) -> RankPolicy:
    if rank_policy is None:
        return RelativeTolerance(0.1 if tau is None else tau)
    if tau is not None:
        raise RankError(f"tau: got {tau} and rank_policy={rank_policy}; give one of them")
    if isinstance(rank_policy, Mapping):
        return ByName(rank_policy)
    if not isinstance(rank_policy, RankPolicy):
        raise RankError(
            f"rank_policy: got {rank_policy!r}, expected RelativeTolerance(...), "
            "ParameterBudget(...), FixedRank(), or a dict from layer-name pattern to these"
        )
    return rank_policy


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _check_whole(names: Mapping[Tensor, str]) -> None:
    """Refuse parameters of which each process holds a part."""
    for parameter, name in names.items():
        if type(parameter.detach()).__name__ == "DTensor":  # its import takes a while
            raise UnsupportedLayerError(
                f"{name}: is a DTensor, expected a plain parameter; TDLRT does not train sharded "
                "models: leave out fully_shard and tensor parallelism, and train on several "
                "processes by tdlrt.integrations.distributed.wrap(model, optimizer)"
            )


def _check_count(name: str, value: object, *, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")


def _resolve_rule(optimizer_cls: type[torch.optim.Optimizer]) -> type[Rule]:
    if optimizer_cls not in _RULES:
        known = ", ".join(f"torch.optim.{cls.__name__}" for cls in _RULES)
        got = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got {got}, which has no rule for Tucker weights; use {known}"
        )
    return _RULES[optimizer_cls]


def _level_of_the_user() -> int:
    """Which `stacklevel` names the line outside torch and this package that led to the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _package(frame) in ("tdlrt", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
