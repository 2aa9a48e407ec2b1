"""`TDLRT`: the integrators as a torch optimiser that wraps the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from tdlrt.errors import IntegratorStateError, NonFiniteError
from tdlrt.nn.models import tucker_layers
from tdlrt.optim.arguments import (
    Argument,
    check_count,
    check_options,
    check_rates,
    resolve_adapting,
    resolve_policy,
    without_numpy,
)
from tdlrt.optim.engine import Engine
from tdlrt.optim.groups import (
    as_list,
    check_shards,
    check_tucker_alone,
    groups_of,
    tucker_parameters,
)
from tdlrt.optim.plain import PlainParameters
from tdlrt.optim.rest import Rest, RestParameters, rest_of
from tdlrt.optim.rules import resolve_rule
from tdlrt.optim.skipping import SkippedSteps
from tdlrt.optim.slot import LayerSlot
from tdlrt.optim.stored import EXTRA, check_state, owned, restore_types, with_own_tensors
from tdlrt.optim.team import Team
from tdlrt.ranks import RankPolicy
from tdlrt.scalars import as_number

__all__ = ["TDLRT"]


class TDLRT(torch.optim.Optimizer):
    """Rank-adaptive optimiser for the Tucker layers of a model; the rest gets the plain optimiser.

    `param_groups[0]` holds the cores and bases of the Tucker layers, `param_groups[1]` every other
    parameter of the model (with `rest`, the groups of its optimisers stand there); groups of your
    own follow. All take any learning-rate scheduler.

    - `integrator="parallel"` takes one gradient a step: W_1 = R(W_0 - lr P(grad L(W_0))), P the
      projection onto the tangent space and R the truncation of the rank policy.
    - `integrator="bug"` spends one gradient on the bases, which it augments to [U_i | K_i(1)], then
      `core_steps` gradients on the core in them, and truncates. `step(closure)` does all of it
      on one closure. Without a closure the calls alternate: one for the bases, `core_steps` for
      the core. The other parameters move in the core steps, not in the basis step.

    Args:
        model: A model with Tucker layers (see `tdlrt.factorize_`).
        optimizer_cls: The plain optimiser's class: torch.optim.SGD, Adam, AdamW, NAdam, RAdam,
            Adamax, RMSprop, Adagrad, Adadelta, Rprop, or one of `register_rule`.
        tau: Relative truncation tolerance in [0, 1), short for RelativeTolerance(tau); 0.1 if
            neither this nor budget nor rank_policy is given.
        budget: Share in (0, 1] of the dense parameters that the Tucker layers may have. With
            total_steps it is met as BudgetRecipe(budget, total_steps) says, and without from the
            first step on, as by ParameterBudget(budget).
        total_steps: Number of whole steps of the training, for the recipe of a budget. Without a
            closure a whole step of `bug` is 1 + core_steps calls of `step`.
        rank_policy: `RelativeTolerance(...)`, `ParameterBudget(...)`, `FixedRank()`, or a dict from
            layer-name pattern to one of these (the first that matches; layers that none matches
            keep their ranks).
        integrator: 'parallel' or 'bug'.
        adapt_every: Ranks are examined every so many steps; they stay as they are in between. None
            for each of the first 100 steps and every tenth after them, or as the recipe says.
        core_steps: Steps on the core for one on the bases (`bug` alone).
        basis_every: Bases move in one of so many steps, and cores in every one (`parallel` alone).
            Ranks are examined in steps that move all bases. For wide layers at small batches, whose
            bases take most of the time, at a cost in accuracy that docs/integrator-cost.md shows.
        freeze_after: Steps after which `freeze_ranks` is called; None for never, or as the recipe
            says.
        skip_nonfinite: How many steps in a row may be skipped, and counted in `skipped_steps`,
            because something is not finite; 0 for none. The next one raises NonFiniteError.
        capturable: Steps of `parallel` at fixed ranks read nothing on the host, so that a CUDA
            graph can hold them (see `tdlrt.GraphedStep`): lr becomes a tensor, and where something
            is not finite the step changes nothing, which later calls count and raise.
        param_groups: Groups with options of their own, as in torch: dicts with 'params' and any of
            lr, weight_decay, ... A Tucker layer's core and bases belong in one group.
        rest: A function of the list of parameters that are not in Tucker format; returns a torch
            optimiser for them, or a list of optimisers that share them out. These take the place of
            optimizer_cls there, with groups, options and state of their own. None by default.
        **optimizer_kwargs: Passed to optimizer_cls (lr, momentum, weight_decay, ...).

    Raises:
        TypeError: param_groups holds what is no dict with 'params', or a set of parameters.
        NothingMatchedError: The model, or a pattern of the policy, has no Tucker layer.
        UnsupportedLayerError: The model is no module, or its parameters are sharded (FSDP, tensor
            parallelism) in another way than by `tdlrt.integrations.fsdp.fully_shard_`.
        UnsupportedOptimizerError: The class or one of its options has no rule for Tucker weights,
            or rest returns something else than optimisers.
        RankError: tau or budget is out of its range, or more than one of tau, budget and
            rank_policy is given, or total_steps without budget, or the policy cannot be met.
        ValueError: Another argument is out of its range.

    Source: arXiv:2305.19059 (`bug`), arXiv:2412.00858 (`parallel`), arXiv:2506.17475 (momentum).
    """

    integrator = Argument[str]()
    adapt_every = Argument[int | None]()
    core_steps = Argument[int]()
    basis_every = Argument[int]()
    freeze_after = Argument[int | None]()
    capturable = Argument[bool]()

    def __init__(
        self,
        model: nn.Module,
        optimizer_cls: type[torch.optim.Optimizer],
        *,
        tau: float | None = None,
        budget: float | None = None,
        total_steps: int | None = None,
        rank_policy: RankPolicy | Mapping[str, RankPolicy] | None = None,
        integrator: str = "parallel",
        adapt_every: int | None = None,
        core_steps: int = 1,
        basis_every: int = 1,
        freeze_after: int | None = None,
        skip_nonfinite: int = 0,
        capturable: bool = False,
        param_groups: Iterable[Mapping[str, Any]] = (),
        rest: Rest | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        policy, adapt_every, freeze_after = resolve_adapting(
            tau=tau,
            budget=budget,
            total_steps=total_steps,
            rank_policy=rank_policy,
            adapt_every=adapt_every,
            freeze_after=freeze_after,
        )
        rule = resolve_rule(optimizer_cls)
        options = check_options(
            integrator=integrator,
            capturable=capturable,
            adapt_every=adapt_every,
            core_steps=core_steps,
            basis_every=basis_every,
            freeze_after=freeze_after,
            skip_nonfinite=skip_nonfinite,
            has_rest=rest is not None,
        )
        skippable = options.pop("skip_nonfinite")
        self._arguments = options
        self._slots = {name: LayerSlot(name, layer) for name, layer in tucker_layers(model).items()}
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        check_shards(self._names, self._slots.values())
        tucker = tucker_parameters(self._slots.values())
        groups = groups_of(self._names, tucker, param_groups)
        self._device = device = next(iter(self._slots.values())).layer.core.device
        if capturable and device.type != "cpu" and optimizer_cls is not torch.optim.SGD:
            optimizer_kwargs["capturable"] = True
        groups = [check_rates(optimizer_cls, group) for group in groups]
        optimizer = optimizer_cls(list(self._names), **check_rates(optimizer_cls, optimizer_kwargs))
        plain: PlainParameters
        if rest is None:
            plain = PlainParameters(optimizer, tucker, capturable=capturable)
        else:
            check_tucker_alone(groups[2:], tucker, self._names)
            others = rest_of(rest, groups.pop(1)["params"], self._names)
            plain = RestParameters(optimizer, tucker, others)
        super().__init__(groups, plain.defaults)
        for group in self.param_groups[1:]:  # a scheduler divides the rate of each group in place
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].clone()
        self._make_rates()
        self.param_groups[1:1] = plain.groups
        self._engine = Engine(
            *(self.state, self.param_groups, self._slots, self._names),
            *(rule, plain, policy),
            SkippedSteps(skippable, device),
            **self._arguments,
        )

    def _bound_engine(self) -> Engine:
        """The engine, told of the present state and groups, which others may replace."""
        self._engine.bind(self.state, self.param_groups)
        return self._engine

    @contextmanager
    def _without_rest(self) -> Iterator[None]:
        """Leave the groups of the optimisers of `rest` out: these store and load their own."""
        plain = self._engine.plain
        if not plain.groups:
            yield
            return
        self.param_groups = plain.others(self.param_groups)
        try:
            yield
        finally:
            self.param_groups[1:1] = plain.groups

    def _make_rates(self) -> None:
        """Make every lr a tensor if steps are to be captured."""
        if self.capturable:
            for group in self.param_groups:
                rate = torch.as_tensor(group["lr"], dtype=torch.float32)
                group["lr"] = rate.to(self._device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; torch calls this at construction, and later groups are refused.

        Every parameter of the model is in a group from the start, and no other can be added: of
        those it would not be known whether they are bases of a Tucker layer.

        Raises:
            ValueError: A parameter is in a group already, or is none of the model's.
        """
        parameters = as_list(param_group["params"])
        for parameter in parameters:
            if not isinstance(parameter, Tensor) or parameter not in self._names:
                raise ValueError(
                    "param_groups: got a parameter that is not the model's; pass TDLRT a module "
                    "that holds it too, such as nn.ModuleList([model, criterion])"
                )
        super().add_param_group({**param_group, "params": parameters})

    @property
    def rank_policy(self) -> RankPolicy:
        """Which ranks to keep. A new policy may be assigned; it holds from the next step."""
        return self._engine.adaptation.rank_policy

    @rank_policy.setter
    def rank_policy(self, policy: RankPolicy | Mapping[str, RankPolicy]) -> None:
        if self.ranks_frozen:
            raise IntegratorStateError(
                "rank_policy: the ranks are frozen, so no policy would take effect; construct a "
                "new TDLRT to adapt them again"
            )
        policy = resolve_policy(None, policy)
        self._engine.adaptation.check(policy)
        self._engine.adaptation.rank_policy = policy

    def freeze_ranks(self) -> None:
        """Keep every layer's ranks from now on; the bases still rotate.

        Spare directions of the policy are given up first, and a budget is met: at once, or, in the
        middle of a step of `bug`, at its end.
        """
        self._bound_engine().freeze_ranks()

    @property
    def examines_next(self) -> bool:
        """Whether ranks may change in the next step, or at its end."""
        return self._engine.examines_next

    @property
    def moves_bases(self) -> bool:
        """Whether the next call of `step` reads gradients of bases: not in core steps of `bug`."""
        return self._engine.moves_bases

    @property
    def storage_version(self) -> tuple[int, ...]:
        """A version that changes when tensors of a captured step no longer exist."""
        return self._engine.storage_version

    @property
    def ranks_frozen(self) -> bool:
        """Whether `freeze_ranks` was called."""
        return self._engine.adaptation.frozen

    @property
    def team(self) -> Team:
        """Who computes the steps of which layers: this process alone, if no other is assigned."""
        return self._engine.team

    @team.setter
    def team(self, team: Team) -> None:
        self._engine.team = team

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their norm is at most max_norm.

        A Tucker layer counts with the norm of its projected gradient,
        ||P(grad_W L)||^2 = ||C.||^2 + sum_i ||K._i||^2: grad_{U_i} L scales with the core and says
        little about the weight. Where bases stay in the next step, only the core counts.

        Args:
            max_norm: Largest norm to leave.
            error_if_nonfinite: Raise if the norm is NaN or infinite, before anything is scaled.

        Returns:
            The norm before.

        Raises:
            ValueError: max_norm is not a number from 0.
            NonFiniteError: As error_if_nonfinite asks.
        """
        largest = max_norm if isinstance(max_norm, Tensor) else as_number(max_norm)
        if largest is None or (not isinstance(largest, Tensor) and not largest >= 0):
            raise ValueError(f"max_norm: got {max_norm!r}, expected a number from 0, such as 1.0")
        total = self._bound_engine().gradient_norm()
        if error_if_nonfinite and not torch.isfinite(total):
            raise NonFiniteError(
                f"gradients: their norm is {float(total)}, expected a finite number; nothing was "
                "scaled. Lower lr, or check the loss"
            )
        factor = (largest / (total + 1e-6)).clamp(max=1.0)
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
            NonFiniteError: A gradient or a weight is not finite, or a weight or the state would not
                be after the step, more than skip_nonfinite times in a row; nothing was changed.
            IntegratorStateError: The state does not fit the layers, or a closure came in the
                middle of an alternation.
        """
        return self._bound_engine().step(closure)

    def end_step(self) -> None:
        """Count a step; the replay of a captured step calls this."""
        self._engine.end_step()

    def count_skipped(self) -> None:
        """Read how many steps of a `capturable` optimiser changed nothing, into `skipped_steps`.

        Raises:
            NonFiniteError: Too many in a row, as skip_nonfinite says.
        """
        self._engine.skipped.read()

    @property
    def skipped_steps(self) -> int:
        """Steps so far that changed nothing, since something was not finite."""
        return self._engine.skipped.count

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._engine.skipped.count = count

    @property
    def skip_nonfinite(self) -> int:
        """How many steps in a row may be skipped."""
        return self._engine.skipped.most

    @skip_nonfinite.setter
    def skip_nonfinite(self, most: int) -> None:
        self._engine.skipped.most = check_count("skip_nonfinite", most, least=0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy of the optimiser for the copy of its model that the same deepcopy makes.

        `copy.deepcopy((model, optimizer))` copies both, as it does for torch's optimisers.
        """
        self._bound_engine().bring_up_to_date()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            if name != "step":  # on the instance where a learning-rate scheduler has wrapped it
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled, because the optimiser holds its model's layers.

        Raises:
            IntegratorStateError: Always.
        """
        raise IntegratorStateError(
            "optimizer: TDLRT holds its model's layers and cannot be pickled; construct "
            "one for the copied model and load this one's state_dict() there"
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser: torch's own keys and the integrator's position under 'tdlrt'."""
        self._bound_engine().bring_up_to_date()
        with self._without_rest():
            state: dict[str, Any] = super().state_dict()
        state["param_groups"] = list(map(without_numpy, state["param_groups"]))
        # Tensors of their own in place of views of the stacks.
        state["state"] = {
            key: {name: owned(value) for name, value in of.items()}
            for key, of in state["state"].items()
        }
        state[EXTRA] = self._engine.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; load the model's state_dict first, so that its ranks are there.

        The rank policy is not part of the state: the one that this optimiser was constructed with
        goes on from here.

        Args:
            state_dict: What `state_dict()` gave.

        Raises:
            IntegratorStateError: It is another optimiser's, another integrator's, or another
                model's, it is incomplete, or the model has other ranks. Nothing was changed.
        """
        plain = self._engine.plain
        with self._without_rest():
            check_state(
                *(state_dict, self.integrator, plain.optimizer_name),
                *(self.param_groups, self._names, self._slots),
                lambda group: self._engine.rule_from({**self.defaults, **group, "lr": group["lr"]}),
            )
            plain.check_state(state_dict[EXTRA])
            super().load_state_dict(with_own_tensors(state_dict))
            for group in self.param_groups:  # options that its version of torch did not have
                group.update({**self.defaults, **group})
            plain.load_state_dict(state_dict[EXTRA])
            restore_types(self, state_dict, self._slots.values())
        self._make_rates()
        self._engine.load_state_dict(state_dict[EXTRA], self.state, self.param_groups)
