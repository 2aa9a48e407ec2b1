"""Calls in any order: after each the network is a right one, or as it was before an error."""

import contextlib
import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import tdlrt
from reference.cases import laws, relative_error
from tdlrt.nn.models import tucker_layers

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
POLICIES = (
    tdlrt.FixedRank(),
    tdlrt.RelativeTolerance(0.0),
    tdlrt.RelativeTolerance(0.3, min_rank=2, spare=0.5),
    tdlrt.RelativeTolerance(0.9, multiple_of=2, max_rank=4),
    tdlrt.RelativeTolerance(tdlrt.CubicSchedule(0.0, 0.5, steps=5)),
    tdlrt.ParameterBudget(0.4, spare=0.25),
    tdlrt.ParameterBudget(parameters=tdlrt.LinearSchedule(400, 120, steps=6)),
    tdlrt.ParameterBudget(0.01),  # less than there can be
    {"0": tdlrt.RelativeTolerance(0.2), "nowhere": tdlrt.FixedRank()},  # a layer too many
    {"[03]": tdlrt.RelativeTolerance(0.2)},
)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


class Orders(RuleBasedStateMachine):
    @initialize(
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        integrator=st.sampled_from(["parallel", "bug"]),
        modes=st.sampled_from(["all", "channels"]),
        adapt_every=st.integers(1, 2),
        core_steps=st.integers(1, 2),
        skip=st.integers(0, 1),
    )
    def begin(self, optimizer, integrator, modes, adapt_every, core_steps, skip):
        torch.manual_seed(0)
        self.model, self.options = network(), (optimizer, integrator, adapt_every, core_steps, skip)
        tdlrt.factorize_(self.model, rank=0.5, modes=modes)
        self.optimizer = self.construct(self.model)
        self.identities = [id(parameter) for parameter in self.model.parameters()]

    def construct(self, model):
        name, integrator, adapt_every, core_steps, skip = self.options
        optimizer_cls, options = OPTIMIZERS[name]
        return tdlrt.TDLRT(
            model,
            optimizer_cls,
            integrator=integrator,
            adapt_every=adapt_every,
            core_steps=core_steps,
            skip_nonfinite=skip,
            **options,
        )

    @property
    def layers(self):
        return tucker_layers(self.model).values()

    def loss(self, factor=1.0):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64)
        return factor * (self.model(x) - x.flatten(1)[:, :3]).square().mean()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def assert_as(self, before):
        now = list(self.model.parameters())
        assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))

    @rule(factor=st.sampled_from([1.0, 1.0, 0.0, 1e-8]))
    def backward(self, factor):
        self.loss(factor).backward()

    @rule(none=st.booleans())
    def clear(self, none):
        self.optimizer.zero_grad(set_to_none=none)

    @rule()
    def step(self):
        before = self.values()
        try:
            self.optimizer.step()
        except tdlrt.NonFiniteError:
            self.assert_as(before)

    @rule(factor=st.sampled_from([1.0, 1.0, float("nan")]))
    def step_on_closure(self, factor):
        def closure():
            self.optimizer.zero_grad()
            loss = self.loss(factor)
            loss.backward()
            return loss

        before, calls = self.values(), self.optimizer.state_dict()["tdlrt"]["core_steps_left"]
        try:
            self.optimizer.step(closure)
        except tdlrt.NonFiniteError:
            assert factor != 1
            self.assert_as(before)
        except tdlrt.IntegratorStateError:
            assert calls
            self.assert_as(before)

    @rule(where=st.integers(0, 8))
    def spoil_a_gradient(self, where):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if grads:
            grads[where % len(grads)].view(-1)[0] = float("inf")

    @rule(norm=st.sampled_from([1e-3, 1.0, 0.0, float("inf")]), strict=st.booleans())
    def clip(self, norm, strict):
        with contextlib.suppress(tdlrt.NonFiniteError):
            self.optimizer.clip_grad_norm_(norm, error_if_nonfinite=strict)

    @rule(policy=st.sampled_from(POLICIES))
    def change_policy(self, policy):
        before = self.optimizer.rank_policy
        try:
            self.optimizer.rank_policy = policy
        except (tdlrt.RankError, tdlrt.NothingMatchedError, tdlrt.IntegratorStateError):
            assert self.optimizer.rank_policy is before

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.1]))
    def change_rate(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @rule()
    def freeze(self):
        self.optimizer.freeze_ranks()
        assert self.optimizer.ranks_frozen

    @rule()
    def go_on_elsewhere(self):
        """Model and optimiser stored and loaded into new ones at other ranks."""
        state, policy = copy.deepcopy(self.optimizer.state_dict()), self.optimizer.rank_policy
        weights = copy.deepcopy(self.model.state_dict())
        modes = "all" if len(next(iter(self.layers)).learned_modes) == 4 else "channels"
        model = network()
        tdlrt.factorize_(model, rank=1, modes=modes)
        optimizer = self.construct(model)
        optimizer.rank_policy = policy
        if self.ranks_of(model) != self.ranks_of(self.model):
            before = [p.detach().clone() for p in model.parameters()]
            with contextlib.suppress(tdlrt.IntegratorStateError):
                optimizer.load_state_dict(copy.deepcopy(state))
            assert all(map(torch.equal, model.parameters(), before))
            optimizer = self.construct(model)
            optimizer.rank_policy = policy
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        self.model, self.optimizer = model, optimizer
        self.identities = [id(parameter) for parameter in model.parameters()]

    @staticmethod
    def ranks_of(model):
        return [layer.ranks for layer in tucker_layers(model).values()]

    @rule()
    def convert(self):
        before, x = self.values(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
        for other in (tdlrt.to_dense(self.model), tdlrt.to_plain(self.model, input_size=x.shape)):
            assert relative_error(other(x), self.model(x)) < 1e-10
        self.assert_as(before)

    @invariant()
    def every_parameter_is_still_there(self):
        assert [id(parameter) for parameter in self.model.parameters()] == self.identities
        for parameter in self.model.parameters():
            assert parameter.isfinite().all()
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            for value in self.optimizer.state.get(parameter, {}).values():
                assert not (isinstance(value, torch.Tensor) and value.ndim) or (
                    value.shape == parameter.shape
                )

    @invariant()
    def bases_are_orthonormal(self):
        for layer in self.layers:
            assert all(1 <= r <= n for r, n in zip(layer.ranks, layer.shape, strict=True))
            for basis in layer.factors:
                eye = torch.eye(basis.shape[1], dtype=torch.float64)
                assert relative_error(basis.T @ basis, eye) < 1e-10

    @invariant()
    @precondition(lambda self: not self.optimizer.state_dict()["tdlrt"]["core_steps_left"])
    def ranks_fit_together_between_steps(self):
        for layer in self.layers:
            layer.check_invariants()


TestOrders = Orders.TestCase
TestOrders.settings = settings(laws, max_examples=40, stateful_step_count=25)
