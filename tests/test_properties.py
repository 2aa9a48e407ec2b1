"""Anything at all as an argument: a right result, or an error that says which argument is wrong."""

import contextlib
import copy
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import tdlrt
from reference import kept_rank
from reference.cases import laws, relative_error, rounding, seeds
from tdlrt.linalg import check_ranks
from tdlrt.nn.models import tucker_layers

few = settings(laws, max_examples=60)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ODD = (
    *(None, True, False, 0, -1, 2**70, 0.0, -0.5, 1.5, math.nan, math.inf, -math.inf, 1e-300),
    *(
        "",
        "half",
        "\0",
        "*",
        b"full",
        (),
        [],
        {},
        (0,),
        (1, -1),
        (1.5, 2),
        ((1, 2), 3),
        {"*": None},
    ),
    *(
        object(),
        1j,
        torch.tensor(0.5),
        torch.tensor([2, 2]),
        range(1, 3),
        {"nowhere": 1},
        nn.ReLU(),
    ),
)
odd = st.sampled_from(ODD)


def mostly(values):
    """These values, and once in a while anything else."""
    return st.one_of(values, values, values, values, odd)


counts = st.integers(1, 12)


@st.composite
def networks(draw):
    """A chain of convolutions of some dimension and linear layers, and the size of its input."""
    torch.manual_seed(draw(seeds))
    dimension = draw(st.sampled_from([2, 1, 3]))
    channels, sizes = draw(st.integers(1, 6)), (draw(st.integers(4, 7)),) * dimension
    size = (2, channels, *sizes)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        out = draw(counts)
        groups = draw(st.sampled_from([1, 1, 1, math.gcd(out, channels)]))
        layers += [
            CONVOLUTIONS[dimension](
                channels,
                out,
                draw(st.integers(1, 3)),
                stride=draw(st.integers(1, 2)),
                padding=draw(st.integers(1, 2)),
                dilation=draw(st.integers(1, 2)),
                groups=groups,
                bias=draw(st.booleans()),
                padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect"])),
            ),
            nn.Tanh(),
        ]
        channels = out
    layers += [(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimension - 1](1)]
    layers += [nn.Flatten(), nn.Linear(channels, draw(counts), bias=draw(st.booleans()))]
    layers += [nn.Linear(layers[-1].out_features, 3)] * draw(st.integers(0, 1))
    model = nn.Sequential(*layers).to(draw(st.sampled_from([torch.float64, torch.float32])))
    x = torch.randn(size, dtype=next(model.parameters()).dtype)
    try:
        model(x)
    except RuntimeError:  # an image smaller than the kernel
        assume(False)
    return model, x


ranks = st.one_of(
    st.floats(0.01, 1.0),
    counts,
    st.just("full"),
    st.floats(0, 0.9).map(tdlrt.RelativeTolerance),
    st.dictionaries(st.sampled_from(["0", "*", "[0-3]"]), st.floats(0.1, 1) | counts, min_size=1),
    st.lists(counts, min_size=2, max_size=5).map(tuple),
)


def snapshot(model):
    state = model.state_dict(keep_vars=True)
    return repr(model), {name: (id(t), t.detach().clone()) for name, t in state.items()}


def assert_unchanged(model, before):
    text, tensors = snapshot(model)
    assert text == before[0]
    for name, (number, value) in before[1].items():
        assert tensors[name][0] == number and torch.equal(tensors[name][1], value)


def assert_named(error, names):
    """The message begins with an argument, or with a layer or parameter of it."""
    assert str(error) and re.match(rf"^({'|'.join(names)})\b", str(error)), repr(error)


@few
@given(
    networks(),
    mostly(ranks),
    mostly(st.sampled_from(["all", "channels"])),
    mostly(st.sampled_from(["auto", None, 0.3, 2])),
)
def test_factorize(network, rank, modes, init_scale):
    model, x = network
    before, dense = snapshot(model), copy.deepcopy(model)
    arguments = {"rank": rank, "modes": modes, "init_scale": init_scale}
    try:
        planned = tdlrt.factorize_(model, **arguments, dry_run=True)
    except tdlrt.TdlrtError as error:
        assert_named(error, [*arguments, "model"])
        assert_unchanged(model, before)
        with pytest.raises(type(error)):
            tdlrt.factorize_(model, **arguments)
        assert_unchanged(model, before)
        return
    assert_unchanged(model, before)
    report = tdlrt.factorize_(model, **arguments)
    assert str(report) == str(planned)
    layers = tucker_layers(model)
    assert {row.name: row.ranks for row in report.factorized} == {
        n: m.ranks for n, m in layers.items()
    }
    for name, layer in layers.items():
        layer.check_invariants()
        assert layer.shape == tuple(dense.get_submodule(name).weight.shape)
    assert_same_everywhere(model, x)


def assert_same_everywhere(model, x):
    """The model, its dense and its plain form agree, and the summary counts what is there."""
    model, x = copy.deepcopy(model).double(), x.double()
    outputs = model(x)
    for other in (
        tdlrt.to_dense(model),
        tdlrt.to_plain(model),
        tdlrt.to_plain(model, input_size=x.shape),
    ):
        assert not any(type(m).__module__.startswith("tdlrt") for m in other.modules())
        assert relative_error(other(x), outputs) < rounding(torch.float64, 1e4)
    summary = tdlrt.summary(model, input_size=x.shape)
    layers = tucker_layers(model)
    assert summary.parameters == sum(layer.weight_parameters for layer in layers.values())
    assert summary.dense_parameters == sum(math.prod(layer.shape) for layer in layers.values())
    assert summary.network_parameters == sum(p.numel() for p in model.parameters())
    assert 0 < summary.macs


@few
@given(networks(), odd | st.lists(odd | st.integers(-2, 8), max_size=5), st.booleans())
def test_input_sizes(network, input_size, plain):
    model, x = network
    with contextlib.suppress(tdlrt.NothingMatchedError):
        tdlrt.factorize_(model, rank="full", include="*")
    before = snapshot(model)
    try:
        (tdlrt.to_plain if plain else tdlrt.summary)(model, input_size=input_size)
    except (TypeError, ValueError) as error:
        assert_named(error, ["input_size"])
    except (RuntimeError, IndexError):  # of the network itself, which takes other shapes
        with pytest.raises((RuntimeError, IndexError)):
            model(torch.zeros(tuple(input_size), dtype=x.dtype))
    assert_unchanged(model, before)


@few
@given(networks(), ranks, ranks, st.sampled_from(["all", "channels"]))
def test_a_saved_model_comes_back_at_any_ranks(tmp_path_factory, network, rank, other, modes):
    model, x = network
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    try:
        tdlrt.factorize_(model, rank=rank, modes=modes)
        tdlrt.factorize_(again, rank=other, modes=modes)
    except tdlrt.TdlrtError:
        assume(False)
    tdlrt.save(model, path)
    for target in (dense, again):
        before = snapshot(target)
        try:
            assert tdlrt.load(path, target) == {}
        except (
            tdlrt.CheckpointError
        ) as error:  # the target has a Tucker layer that the file has not
            assert "dense in the file" in str(error) and target is again
            assert_unchanged(target, before)
        else:
            assert torch.equal(target(x), model(x))
            assert tdlrt.summary(target).ranks == tdlrt.summary(model).ranks


@few
@given(networks(), networks())
def test_a_model_is_not_loaded_into_another(tmp_path_factory, one, other):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    with contextlib.suppress(tdlrt.NothingMatchedError):
        tdlrt.factorize_(one[0], rank=0.5)
    tdlrt.save(one[0], path)
    before = snapshot(other[0])
    try:
        tdlrt.load(path, other[0])
    except tdlrt.CheckpointError as error:
        assert str(error).startswith(f"{path}: ")
        assert_unchanged(other[0], before)
    else:
        same = tdlrt.to_dense(one[0]).state_dict()
        now = tdlrt.to_dense(other[0]).state_dict()
        assert {n: t.shape for n, t in same.items()} == {n: t.shape for n, t in now.items()}


RANGES = {"min_rank": counts, "max_rank": st.none() | counts, "multiple_of": counts}
options = st.fixed_dictionaries(
    {},
    optional={name: st.one_of(values, odd) for name, values in RANGES.items()}
    | {"spare": st.floats(0, 3) | odd},
)


@laws
@given(
    st.floats(0, 0.99) | odd,
    options,
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9),
    st.integers(0, 10**6),
)
def test_tolerances(tau, options, values, step):
    try:
        policy = tdlrt.RelativeTolerance(tau, **options)
    except tdlrt.RankError as error:
        assert_named(error, ["tau", *RANGES, "spare"])
        return
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64).square()
    rank = kept_rank(squares, 0, policy.cutoff((len(values),) * 2, step), 2, (0, 1))
    assert 1 <= rank <= min(len(values), policy.max_rank or len(values))
    assert rank >= min(policy.min_rank, len(values), policy.max_rank or len(values))
    if policy.max_rank is None:
        left = math.sqrt(float(squares[rank:].sum()))
        assert left <= policy.tau * math.sqrt(float(squares.sum())) * (1 + 1e-9)


@laws
@given(
    st.sampled_from([tdlrt.LinearSchedule, tdlrt.CubicSchedule]),
    st.floats(-1e3, 1e3) | odd,
    st.floats(-1e3, 1e3) | odd,
    st.integers(1, 10**9) | odd,
    st.lists(st.integers(0, 2 * 10**9), min_size=2, max_size=5),
)
def test_schedules(kind, start, end, steps, times):
    try:
        schedule = kind(start, end, steps=steps)
    except tdlrt.RankError as error:
        assert_named(error, ["start", "end", "steps"])
        return
    values = [schedule.value(time) for time in sorted(times)]
    smallest, largest = schedule.extremes
    slack = 1e-9 * max(1, abs(smallest), abs(largest))
    assert all(smallest - slack <= value <= largest + slack for value in values)
    assert schedule.value(steps) == end
    with pytest.raises(tdlrt.RankError, match="tau"):
        tdlrt.RelativeTolerance(kind(0.1, 1.0, steps=steps))


@few
@given(st.floats(0.01, 1) | odd, st.integers(1, 10**4) | odd, options, st.booleans())
def test_budgets(fraction, parameters, options, both):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 3))
    tdlrt.factorize_(model, rank="full")
    given_ = (
        {"fraction": fraction} if fraction is not None and not both else {"parameters": parameters}
    )
    before = snapshot(model)
    try:
        policy = tdlrt.ParameterBudget(**given_, **options)
        optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, rank_policy=policy)
    except tdlrt.RankError as error:
        assert_named(
            error, ["budget", "fraction", "parameters", "ParameterBudget", *RANGES, "spare"]
        )
        assert_unchanged(model, before)
        return
    model(torch.randn(2, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    optimizer.freeze_ranks()
    for layer in tucker_layers(model).values():
        layer.check_invariants()
        check_ranks(layer.ranks, layer.learned_modes)
    size = tdlrt.summary(model)
    limit = policy.parameters or policy.fraction * size.dense_parameters
    assert size.parameters <= limit


CONSTRUCTION = {
    "tau": st.none() | st.floats(0, 0.99),
    "rank_policy": st.none() | st.just(tdlrt.FixedRank()),
    "integrator": st.sampled_from(["parallel", "bug"]),
    "adapt_every": counts,
    "core_steps": counts,
    "freeze_after": st.none() | counts,
    "skip_nonfinite": st.integers(0, 3),
}


@few
@given(
    st.fixed_dictionaries(
        {}, optional={n: st.one_of(v, v, v, odd) for n, v in CONSTRUCTION.items()}
    ),
    st.sampled_from([torch.optim.SGD] * 3 + [torch.optim.Adam, torch.optim.RMSprop, None, "SGD"]),
)
def test_construction(options, optimizer_cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    tdlrt.factorize_(model, rank=4)
    before = snapshot(model)
    try:
        optimizer = tdlrt.TDLRT(model, optimizer_cls, lr=0.1, **options)
    except (tdlrt.TdlrtError, ValueError) as error:
        assert_named(error, [*CONSTRUCTION, "optimizer_cls", "model"])
        assert_unchanged(model, before)
        return

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(2, 9)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    for layer in tucker_layers(model).values():
        layer.check_invariants()
