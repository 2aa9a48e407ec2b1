"""`rest=` with optimisers whose state is tensors of 8 bits with scales, as that of torchao."""

import copy
import io
import math

import pytest
import torch
from torch import optim

import tdlrt
from optim.problems import INTEGRATORS, Small, assert_same
from tdlrt.optim.composed import copies_by_id, parts

aten = torch.ops.aten


class Codes(torch.Tensor):
    """Numbers from 0 as codes with a scale, which like torchao's implement no `clone`."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return f"Codes({self.codes}, {self.scale})"

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner, dtype, size, stride):
        return cls(inner["codes"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.copy_.default:
            own, values = args
            own.scale.copy_(values.max() + 1e-30)
            own.codes.copy_((values / own.scale * 255).round())
            return own
        raise NotImplementedError(func)


class Eight(optim.Optimizer):
    """p - lr g / sqrt(v) with v = decay v + (1 - decay) g^2 in 8 bits."""

    def __init__(self, params, lr=0.01, *, decay=0.9):
        super().__init__(params, {"lr": lr})
        self.decay = decay  # which torch leaves out of copies

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    codes = torch.zeros_like(p, dtype=torch.uint8)
                    state["square"] = Codes(codes, torch.zeros(1), p.dtype)
                past = state["square"].codes / 255 * state["square"].scale
                square = self.decay * past + (1 - self.decay) * p.grad.square()
                state["square"].copy_(square)
                p.sub_(group["lr"] * p.grad / (square.sqrt() + 1e-3))


def small(integrator="parallel"):
    return Small("momentum", integrator=integrator, tau=0.3, rest=Eight)


def values(problem):
    """Weights, and the tensors of the state of the rest."""
    rest = problem.optimizer.state_dict()["tdlrt"]["rest"][0]["state"]
    states = [part for of in rest.values() for value in of.values() for part in parts(value)]
    return {**problem.model.state_dict(), **{str(n): t for n, t in enumerate(states)}}


def copied(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([Codes]):
        return torch.load(buffer, weights_only=True)


@INTEGRATORS
@pytest.mark.parametrize("through_a_file", [True, False])
def test_a_resumed_training_is_the_same_to_the_last_bit(integrator, through_a_file):
    problem = small(integrator)
    before = problem.ranks
    problem.step(3)
    assert problem.ranks != before
    stored, weights = problem.optimizer.state_dict(), copy.deepcopy(problem.model.state_dict())
    resumed = small(integrator)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(copied(stored) if through_a_file else stored)
    for one in (problem, resumed):  # in turn: no memory is shared
        one.step(3)
    assert_same(values(problem), values(resumed))


def test_a_copy_of_model_and_optimiser_goes_on_alone():
    problem = small()
    problem.step(2)
    twin = copy.copy(problem)
    twin.model, twin.optimizer = copy.deepcopy((problem.model, problem.optimizer))
    before = copy.deepcopy(problem.model.state_dict())
    twin.step(2)
    assert_same(problem.model.state_dict(), before)
    problem.step(2)
    assert_same(values(problem), values(twin))


def spoil_a_layer(problem):
    problem.layers[1].core.grad[0, 0] = math.nan


def spoil_the_rest(problem):
    """A finite gradient whose square is not: p stays finite, as it is divided by infinity."""
    problem.model[-1].bias.grad.fill_(3e38)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spoil", [spoil_a_layer, spoil_the_rest])
def test_a_refused_step_changes_no_bit(spoil, steps):
    problem = small()
    problem.step(steps)
    problem.backward()
    spoil(problem)
    before = {name: tensor.clone() for name, tensor in values(problem).items()}
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert_same(before, values(problem))


def test_copies_share_no_memory():
    state = Codes(torch.ones(3, dtype=torch.uint8), torch.ones(1), torch.float32)
    twin = copies_by_id([{"square": state, "step": torch.ones(()), "count": 1}, None])[id(state)]
    assert [part.tolist() for part in parts(twin)] == [[1, 1, 1], [1.0]]
    twin.codes.zero_()
    assert state.codes.tolist() == [1, 1, 1]
    assert parts(torch.ones(2))[0].tolist() == [1.0, 1.0]
    assert parts(3) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, which torchao's step calls
def test_the_8_bit_adamw_of_torchao():
    rest = pytest.importorskip("torchao.optim").AdamW8bit
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 64), torch.arange(16) % 4

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(64, n) for n in (64, 64, 4)))
        tdlrt.factorize_(model, rank=0.5, exclude="1")  # 4096 numbers, of which torchao codes
        return model, tdlrt.TDLRT(
            model, optim.AdamW, lr=1e-2, tau=0.3, rest=lambda p: rest(p, lr=1e-2)
        )

    def call(model, optimizer, times):
        losses = []
        for _ in range(times):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    model, optimizer = make()
    losses, ranks = call(model, optimizer, 3), [model[0].ranks]
    stored = optimizer.state_dict()
    kinds = [v for of in stored["tdlrt"]["rest"][0]["state"].values() for v in of.values()]
    assert any(type(value).__name__ == "OptimState8bit" for value in kinds)
    assert losses[-1] < losses[0]
    buffer = io.BytesIO()
    torch.save((model.state_dict(), stored), buffer)
    buffer.seek(0)
    weights, stored = torch.load(buffer, weights_only=True)
    other, its = make()
    other.load_state_dict(weights)
    its.load_state_dict(stored)
    third, own = copy.deepcopy((model, optimizer))
    assert call(model, optimizer, 2) == call(other, its, 2) == call(third, own, 2)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(model.state_dict(), third.state_dict())
    assert model[0].ranks not in ranks
