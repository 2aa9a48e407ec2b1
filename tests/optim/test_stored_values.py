"""Every value of a stored state in turn is another: refused at once, or no harm in later steps."""

import copy
import math

import pytest
import torch

import tdlrt
from optim.problems import Small, assert_same

ODD = (
    None,
    True,
    -1,
    0,
    2**80,
    0.5,
    math.nan,
    "a",
    [],
    {},
    {"a": 1},
    torch.zeros(3),
    torch.tensor(math.nan),
    torch.tensor([2, 3]),
    torch.zeros(2, 2).to_sparse(),
    torch.empty(3, device="meta"),
    torch.zeros((), dtype=torch.complex64),
)
PROBLEMS = [
    ("adam", {}, Small.call),
    ("momentum", {"integrator": "bug"}, Small.call),
    ("momentum", {"dtype": torch.bfloat16, "integrator": "bug"}, Small.call),
    pytest.param("momentum", {}, Small.call, marks=pytest.mark.slow),
    pytest.param("adam", {"basis_every": 3}, Small.call, marks=pytest.mark.slow),
    pytest.param("adam", {"integrator": "bug"}, Small.step, marks=pytest.mark.slow),
]


def places(tree, path=()):
    """All places in nested dicts and lists, the containers themselves included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(tree, path, change):
    tree = copy.deepcopy(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return tree


def changes(odd):
    yield lambda holder, key: holder.pop(key)
    for value in odd:
        yield lambda holder, key, value=value: holder.__setitem__(key, value)
    yield (
        lambda holder, key: (
            holder.update(other=holder.pop(key)) if isinstance(holder, dict) else holder.append(3)
        )
    )


@pytest.mark.parametrize(("name", "options", "go_on"), PROBLEMS)
def test_one_value_of_another_kind(name, options, go_on):
    problem = Small(name, **options)
    go_on(problem, 3)
    model, state = problem.model.state_dict(), problem.optimizer.state_dict()
    other = Small(name, **options)
    other.model.load_state_dict(model)
    before = copy.deepcopy(other.optimizer.state_dict())
    parts = {"state": state["state"], "tdlrt": state["tdlrt"]}
    names = [name for name, _ in other.model.named_parameters()]
    shown = [names.index(f"0.{part}") for part in ("core", "factors.0", "bias")]
    refused = taken = 0
    for path in [("state",), ("tdlrt",), ("param_groups",), *places(parts)]:
        if path[0] == "state" and path[1:2] and path[1] not in shown:
            continue
        for number, change in enumerate(changes(ODD)):
            bad = changed(state, path, change)
            try:
                other.optimizer.load_state_dict(bad)
            except tdlrt.IntegratorStateError as error:
                assert str(error).count("; ") or "expected" in str(error)
                assert_same(before, other.optimizer.state_dict())
                refused += 1
                continue
            taken += 1
            try:
                go_on(other, 2)
                other.optimizer.state_dict()
            except tdlrt.TdlrtError:
                pass
            except Exception as error:
                raise AssertionError(f"{path}, change {number}: {error!r}") from error
            other = Small(name, **options)
            other.model.load_state_dict(model)
            before = copy.deepcopy(other.optimizer.state_dict())
    assert refused > 10 * taken


NAMED = {
    "curvature": (("tdlrt", "curvatures", "0"), torch.ones(2), "curvatures: 0: got a tensor of"),
    "ranks": (("tdlrt", "resting_ranks"), {"0": 1}, "resting_ranks: 0: got 1, expected a list of"),
    "number": (("state", 99), {}, "state_dict: state: got 99, expected numbers of the 11 param"),
    "moment": (("state", 0, "exp_avg"), 3, r"state_dict: 0\.core: exp_avg: got 3, expected a ten"),
    "no moments": (("state", 1), {}, r"0\.factors\.0 has no exp_avg, which others of its group"),
    "step": (
        ("state", 0, "step"),
        torch.tensor(-1.0),
        r"0\.core: step: got a tensor .* one number from 0",
    ),
}


@pytest.mark.parametrize(("path", "value", "message"), NAMED.values(), ids=NAMED)
def test_the_error_names_the_place(path, value, message):
    problem = Small("adam")
    problem.call(2)
    state = changed(
        problem.optimizer.state_dict(), path, lambda holder, key: holder.__setitem__(key, value)
    )
    with pytest.raises(tdlrt.IntegratorStateError, match=message):
        problem.optimizer.load_state_dict(state)
