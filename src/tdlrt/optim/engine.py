"""The engine of `TDLRT`: a step of an integrator and of the plain parameters, and its count."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError, NonFiniteError
from tdlrt.optim.adaptation import Adaptation
from tdlrt.optim.batches import Batches
from tdlrt.optim.bug import Bug
from tdlrt.optim.finite import Finite, PlainAtRiskError
from tdlrt.optim.groups import group_of_each_layer, tucker_parameters
from tdlrt.optim.integrator import Context, Pass, active_layers, gradient_norm, truncate_unmoved
from tdlrt.optim.parallel import Parallel
from tdlrt.optim.plain import PlainParameters
from tdlrt.optim.resting import RestingBases
from tdlrt.optim.rules import Rule
from tdlrt.optim.skipping import SkippedSteps
from tdlrt.optim.slot import LayerSlot, OptimizerState
from tdlrt.optim.stored import are_same, core_norms
from tdlrt.optim.team import Team
from tdlrt.optim.threads import threads_for
from tdlrt.ranks import FixedRank, RankPolicy

__all__ = ["Engine"]


class Engine:
    """The steps of an optimiser: its integrator on the layers, torch's on the plain parameters.

    Args:
        state: The optimiser's state.
        groups: Its param_groups.
        slots: All layers by name.
        names: Names of all parameters of the model.
        rule: The rule of the layers.
        plain: The parameters that are not in Tucker format.
        policy: Which ranks to keep.
        skipped: Counts steps that change nothing.
        integrator, adapt_every, core_steps, basis_every, freeze_after, capturable: See `TDLRT`.

    Attributes:
        plain: See above.
        skipped: See above.
        adaptation: When ranks are examined.
        team: Who computes the steps of which layers.

    Raises:
        RankError: The policy cannot be met.
        ValueError: A group has an option out of its range, or a part of a layer.
        UnsupportedOptimizerError: A group has an option that the rule refuses.
    """

    def __init__(
        self,
        state: OptimizerState,
        groups: Sequence[dict[str, Any]],
        slots: Mapping[str, LayerSlot],
        names: Mapping[Tensor, str],
        rule: type[Rule],
        plain: PlainParameters,
        policy: RankPolicy,
        skipped: SkippedSteps,
        *,
        integrator: str,
        adapt_every: int | None,
        core_steps: int,
        basis_every: int,
        freeze_after: int | None,
        capturable: bool,
    ) -> None:
        self._slots, self._names, self._rule = slots, names, rule
        self._integrator, self._core_steps = integrator, core_steps
        self._freeze_after, self._capturable = freeze_after, capturable
        self.plain, self.skipped = plain, skipped
        self.adaptation = Adaptation(policy, slots, adapt_every)
        self._resting = RestingBases(slots, basis_every)
        self.team = Team()
        self._read_on_host = False
        self._bindings = 0
        for group in plain.others(groups):
            self.rule_from(group)
        self._bind(state, groups)

    def _bind(
        self,
        state: OptimizerState,
        groups: Sequence[dict[str, Any]],
        core_steps_left: int = 0,
        ranks_before: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Make the integrators for a state and groups, at rest or in the middle of a step."""
        self._groups = groups
        self.plain.share_state(state)
        group_of = group_of_each_layer(self._slots, groups)
        self._batches = Batches(
            self._slots, self._rule, state, self.adaptation.curvatures, group_of
        )
        self._bindings += 1
        self._context = Context(
            batches=self._batches,
            adaptation=self.adaptation,
            finite=Finite(self._names, self.plain.among(self._names), self.plain.state),
            state=state,
            rule_of=lambda number: self.rule_from(self._groups[number]),
            resting=self._resting,
            capturable=self._capturable,
        )
        self._bug = Bug(self._context, self._core_steps)
        self._bug.core_steps_left = core_steps_left
        self._bug.ranks_before = ranks_before or {}
        self._parallel = Parallel(self._context)

    def bind(self, state: OptimizerState, groups: Sequence[dict[str, Any]]) -> None:
        """Go on with the optimiser's state and groups, which others may have replaced."""
        if self._context.state is not state:
            self._bind(state, groups, self._bug.core_steps_left, self._bug.ranks_before)
        self._groups = groups

    def rule_from(self, group: Mapping[str, Any]) -> Rule:
        """The rule with the options of a param_group."""
        return self._rule.from_group(group, capturable=self._capturable)

    @property
    def examines_next(self) -> bool:
        """See `TDLRT.examines_next`."""
        return self.adaptation.examines or self.adaptation.steps + 1 == self._freeze_after

    @property
    def storage_version(self) -> tuple[int, ...]:
        """See `TDLRT.storage_version`."""
        cores = (slot.layer.core.data_ptr() for slot in self._slots.values())
        return self._bindings, self._batches.generation, *cores

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """See `TDLRT.step`."""
        loss = None
        if closure is not None:
            if self._bug.core_steps_left:
                raise IntegratorStateError(
                    f"closure: got one in the middle of a `bug` step; call step() without it "
                    f"{self._bug.core_steps_left} more times first, or always pass it"
                )
            with torch.enable_grad():
                loss = closure()
        with self.skipped.allowed():
            if closure is None or self._integrator == "parallel":
                self._advance()
            else:
                with self._plain_arithmetic(), self._bug.undone_on_error(self.team):
                    self._advance()
                    self._core_passes(closure)
        if self._capturable and self._read_on_host:
            self.skipped.read_after_a_step()
        return loss

    def _core_passes(self, closure: Callable[[], Any]) -> None:
        cores = [self._slots[name].layer.core for name in self._bug.ranks_before]
        try:
            while self._bug.core_steps_left:
                with self._bug.without_basis_gradients(), torch.enable_grad():
                    closure()
                self._advance()
        finally:
            for core in cores:  # the bases have no gradient, and a layer has all of them or none
                core.grad = None

    def _advance(self) -> None:
        """Let the integrator and then the plain optimiser use the present gradients."""
        with self._plain_arithmetic(), threads_for(self._batches.work):
            done = self._moved()
            self._settle()
            if done.ends_step:
                self.end_step(done.examined, postponed=done.postponed)
            self._read_on_host = done.accepted is None

    def _moved(self) -> Pass:
        """Check, and move the layers and the plain parameters, which torch does in place.

        Plain parameters move first, and back if the check fails, where only their step can tell.
        """
        integrator = self._parallel if self._integrator == "parallel" else self._bug
        if not integrator.moves_plain:
            return integrator.advance(self.team)
        bound = 0.0
        if not self._capturable:
            bound = self.plain.largest_norm(self._groups, self._context.rule_of)
        if bound > 1:  # smaller only for a huge lr and for float16
            finite = self._context.finite
            finite.largest_norm = bound
            with suppress(PlainAtRiskError):
                try:
                    done = integrator.advance(self.team)
                finally:
                    finite.largest_norm = math.inf
                self.plain.move(self._groups)
                return done
        with self.plain.moved(self._groups) as before:
            done = integrator.advance(self.team)
            if done.accepted is not None:
                before.restore_unless(done.accepted)
                self.skipped.note(done.accepted)
            return done

    def _settle(self) -> None:
        """Note which weights the state belongs to, so that it follows when they are written."""
        with suppress(IntegratorStateError), torch.no_grad():  # the next step raises it
            self._batches.settle(self.team.owners())

    def end_step(self, examined: Iterable[str] = (), *, postponed: bool = False) -> None:
        """Count a whole step in which the ranks of these layers were examined, or were to be."""
        self.adaptation.end_step(examined, postponed=postponed)
        self._freeze_if_due()

    def _freeze_if_due(self) -> None:
        if self._freeze_after is not None and self.adaptation.steps >= self._freeze_after:
            with suppress(NonFiniteError):  # the step is taken; the next one tries again
                self.freeze_ranks()

    def freeze_ranks(self) -> None:
        """See `TDLRT.freeze_ranks`."""
        adaptation = self.adaptation
        if adaptation.frozen:
            return
        adaptation.frozen = True
        if isinstance(adaptation.rank_policy.settled(), FixedRank):
            return
        adaptation.settling = True
        if not self._bug.core_steps_left:
            try:
                with self._plain_arithmetic():
                    truncate_unmoved(self._context)
                    self._settle()
            except BaseException:
                adaptation.frozen = adaptation.settling = False
                raise
            adaptation.settling = False

    @property
    def moves_bases(self) -> bool:
        """See `TDLRT.moves_bases`."""
        return not self._bug.core_steps_left

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of the next step, see `TDLRT.clip_grad_norm_`."""
        with self._plain_arithmetic():
            plain = self.plain.among(self._names)
            return gradient_norm(self._context, plain, *self._moving())

    def _moving(self) -> tuple[Collection[str], Collection[str]]:
        """Layers whose core alone moves in the next step, and layers that move as a whole."""
        if self._bug.core_steps_left:
            return self._bug.ranks_before, ()
        active = active_layers(self._batches)
        resting = self._resting.names(active)
        return resting, [name for name in active if name not in resting]

    @contextmanager
    def _plain_arithmetic(self) -> Iterator[None]:
        """Disable autocast inside the block, and drop its cached casts of weights afterwards."""
        with torch.no_grad(), torch.autocast(self._batches.device.type, enabled=False):
            yield
        torch.clear_autocast_cache()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        made_anew = ("plain", "team", "_groups", "_batches", "_context", "_bug", "_parallel")
        for name, value in self.__dict__.items():
            if name not in made_anew:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        copied.team = self.team
        copied.plain = self.plain.copied(tucker_parameters(copied._slots.values()), memo)
        state, groups = copy.deepcopy((self._context.state, self._groups), memo)
        copied._bind(state, groups, self._bug.core_steps_left, self._bug.ranks_before)
        copied._settle()
        return copied

    @torch.no_grad()
    def bring_up_to_date(self) -> None:
        """Bring the state to the weights, where others have written these."""
        self._batches.bring_up_to_date()

    def state_dict(self) -> dict[str, Any]:
        """The integrator's position: what a training that goes on must know besides torch's."""
        return {
            "integrator": self._integrator,
            "optimizer": self.plain.optimizer_name,
            **self.plain.state_dict(),
            **self.adaptation.state_dict(),
            **self.skipped.state_dict(),
            "resting_bases": self._resting.state_dict(),
            "core_steps_left": self._bug.core_steps_left,
            "resting_ranks": {name: list(of) for name, of in self._bug.ranks_before.items()},
            "norms": core_norms(self._slots.values()),
        }

    def load_state_dict(
        self,
        position: Mapping[str, Any],
        state: OptimizerState,
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """Go on from a position, with the state and the groups that belong to it."""
        self.skipped.load_state_dict(position)
        self.adaptation.load_state_dict(position)
        self._resting.load_state_dict(position.get("resting_bases", {}))
        self._bind(state, groups, position["core_steps_left"], dict(position["resting_ranks"]))
        if are_same(position.get("norms", {}), core_norms(self._slots.values())):
            self._settle()
        self._freeze_if_due()
