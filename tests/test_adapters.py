"""Adapters: every edge of their life is an equality."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import tdlrt
from nn.cases import CASES, Case
from optim.problems import INTEGRATORS
from reference.cases import gaussian, relative_error
from tdlrt.errors import AdapterError, CheckpointError, NothingMatchedError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.adapted import AdapterLayer, TrainedCopy

EVERY_LAYER = {"rank": 2, "include": "*"}


class Wide(nn.Module):
    """The layer of a case inside a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def small() -> nn.Sequential:
    """Every kind of part: a stem, a batch norm, a hidden layer, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


X = gaussian((6, 3, 8, 8), 1, torch.float32)
Y = torch.tensor([0, 1, 2, 3, 0, 1])
HEAD, NORM = "7", "1"


def trained(steps: int = 4, **options: object) -> nn.Sequential:
    """A model whose adapters have learned something."""
    model = small()
    tdlrt.add_adapters_(model, rank=3, train=HEAD, **options)
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def filled(model: nn.Module) -> nn.Module:
    """The updates' cores are no longer zero."""
    for module in model.modules():
        if isinstance(module, TuckerLayer):
            nn.init.normal_(module.core)
    return model


def same_state(one: nn.Module, other: nn.Module) -> bool:
    state, expected = one.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )


# --- the layers, with all their options ---------------------------------------------------------


def adapted(case: Case, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    model = Wide(case.plain(dtype))
    tdlrt.add_adapters_(model, **(EVERY_LAYER | {"modes": case.modes} | options))
    return model


def saves_something(case: Case) -> bool:
    """Whether an update of rank 1 is smaller than the weight; others get no adapter."""
    shape = case.plain().weight.shape
    factored = shape if case.modes == "all" else shape[:2]
    return shape[len(factored) :].numel() + sum(factored) < shape.numel()


each_layer = pytest.mark.parametrize(
    "case", [case for case in CASES if saves_something(case)], ids=lambda case: case.name
)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_output_by_a_bit(case: Case, dtype: torch.dtype) -> None:
    x = case.input(dtype)
    assert torch.equal(adapted(case, dtype)(x), case.plain(dtype)(x))


@each_layer
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_merged_is_unmerged(case: Case, scale: float) -> None:
    model, x = filled(adapted(case, scale=scale)), case.input()
    expected = model(x)
    plain = case.plain()
    assert relative_error(expected, plain(x)) > 1e-3
    tdlrt.merge_adapters_(model)
    assert type(model.layer) is type(plain)
    assert model.layer.extra_repr() == plain.extra_repr()
    assert relative_error(model(x), expected) < 1e-13


@each_layer
def test_unloaded_is_the_base_itself(case: Case) -> None:
    plain = case.plain()
    model = Wide(plain)
    tdlrt.add_adapters_(model, **EVERY_LAYER)
    tdlrt.unload_adapters_(filled(model))
    assert model.layer is plain
    assert same_state(model, Wide(case.plain()))


@each_layer
def test_attributes_are_those_of_the_layer(case: Case) -> None:
    layer, plain = filled(adapted(case)).layer, case.plain()
    names = {*plain.__constants__, *vars(plain)} - {*vars(nn.Module())}
    assert all(getattr(layer, name) == getattr(plain, name) for name in names)
    assert torch.equal(layer.bias, plain.bias) if plain.bias is not None else layer.bias is None
    tdlrt.merge_adapters_(model := Wide(layer))
    assert torch.equal(layer.weight, model.layer.weight)  # not the frozen one, which is `base`'s
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


@each_layer
def test_the_default_scale_is_the_gain_of_the_layer(case: Case) -> None:
    weight = case.plain().weight
    expected = (3 / weight.shape[0]) ** 0.5 * weight.norm()
    assert relative_error(adapted(case).layer.scale, expected) < 1e-6
    assert adapted(case, scale=0.3).layer.scale == pytest.approx(0.3)


def test_a_layer_as_torch_makes_it_has_scale_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Conv2d(40, 60, 5), nn.Linear(9, 9))
    nn.init.zeros_(model[2].weight)
    tdlrt.add_adapters_(model, rank=2, include="*")
    assert [float(layer.scale) for layer in model] == pytest.approx([1, 1, 1], rel=0.02)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 30))
    tdlrt.add_adapters_(model, rank=2, include="*")
    assert model[0].scale.is_meta


def test_adam_moves_a_layer_relative_to_its_weight() -> None:
    def learned(factor: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10, bias=False))
        model[0].weight.data.mul_(factor)
        tdlrt.add_adapters_(model, rank=3, include="*")
        optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=0.01, tau=0.1)
        x, y = gaussian((20, 12), 1, torch.float32), torch.arange(20) % 10
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x) / factor, y).backward()
            optimizer.step()
        return (model[0].weight - model[0].base.weight) / factor

    assert learned(1).norm() > 0.1
    assert relative_error(learned(50), learned(1)) < 1e-3


# --- a whole model ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_model_is_the_model(training: bool) -> None:
    model, plain = small().train(training), small().train(training)
    tdlrt.add_adapters_(model, rank=3, train=HEAD)
    assert torch.equal(model(X), plain(X))
    assert [module.training for module in model.modules()] == [training] * len([*model.modules()])


def test_what_is_trained_and_what_is_frozen() -> None:
    model = small()
    report = tdlrt.add_adapters_(model, rank=3, train=HEAD)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    updates = {f"{layer}.update" for layer in "035"}
    assert {name.split(".core")[0].split(".factors")[0] for name in names} == updates | {
        "7.trained.weight",
        "7.trained.bias",
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.parameters == trainable
    assert {row.name: row.note for row in report.skipped} == {"7": "trained in full"}
    text = str(report)
    assert "3 of 4 layers get an adapter" in text
    assert "trained in full: 7, 68 parameters" in text


def test_training_leaves_the_base_alone_and_unloading_gives_it_back() -> None:
    model, plain = trained().eval(), small().eval()
    assert not torch.equal(model(X), plain(X))
    assert not torch.equal(model[1].trained.running_mean, plain[1].running_mean)
    tdlrt.unload_adapters_(model)
    assert same_state(model, plain)
    assert torch.equal(model(X), plain(X))


def test_merging_keeps_what_was_learned_and_leaves_torch_layers() -> None:
    model = trained().eval()
    expected = model(X)
    tdlrt.merge_adapters_(model)
    assert [type(module) for module in model] == [type(module) for module in small()]
    assert relative_error(model(X), expected) < 1e-6
    assert model.state_dict().keys() == small().state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("convert", [tdlrt.to_plain, tdlrt.to_dense])
def test_plain_models_have_the_adapters_in_them(convert) -> None:
    model = trained().eval()
    plain = convert(model)
    assert [type(module) for module in plain] == [type(module) for module in small()]
    assert relative_error(plain(X), model(X)) < 1e-6
    assert isinstance(model[0], AdapterLayer)
    assert type(convert(model[0])) is nn.Conv2d


def test_a_copy_is_on_its_own() -> None:
    model = trained().eval()
    twin = copy.deepcopy(model)
    expected = model(X)
    filled(model)
    assert torch.equal(twin(X), expected)


def test_state_dict_goes_into_adapters_of_other_ranks() -> None:
    model, other = trained().eval(), small().eval()
    tdlrt.add_adapters_(other, rank=2, train=HEAD, scale=0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_half_precision_by_autocast() -> None:
    model = small()
    tdlrt.add_adapters_(model, rank=3, train=HEAD)
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=0.01, tau=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), small()(X))
        loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.cross_entropy(model(X), Y) < loss


def test_shared_modules_stay_shared() -> None:
    model = nn.Sequential(shared := nn.Linear(9, 9), nn.ReLU(), shared)
    tdlrt.add_adapters_(model, rank=2, include="*")
    assert model[0] is model[2]
    tdlrt.unload_adapters_(model)
    assert model[0] is model[2] is shared


def test_the_outermost_module_that_matches_is_trained() -> None:
    model = nn.ModuleDict({"body": nn.Linear(9, 9), "head": nn.Sequential(nn.Linear(9, 9))})
    report = tdlrt.add_adapters_(model, rank=2, train=["head*"])
    assert report.trained == ("head",)
    assert isinstance(model["head"], TrainedCopy)
    assert isinstance(model["body"], AdapterLayer)


def test_an_int_leaves_kernels_whole() -> None:
    report = tdlrt.add_adapters_(small(), rank=2)
    assert {row.name: row.ranks for row in report.factorized} == {
        "0": (2, 2, 3, 3),
        "3": (2, 2, 3, 3),
        "5": (2, 2),
    }


def test_a_fraction_is_the_same_share_of_every_layer() -> None:
    """The base hands on all inputs, so the update of the first layer need not keep them."""
    model = nn.Sequential(nn.Conv1d(8, 64, 3), nn.Conv1d(64, 64, 3), nn.Flatten())
    report = tdlrt.add_adapters_(model, rank=0.25)
    assert [row.ranks for row in report.factorized] == [(6, 2, 3), (16, 16, 3)]


def test_the_summary_compares_with_the_merged_network() -> None:
    model = trained()
    found = tdlrt.summary(model, (1, 3, 8, 8))
    merged = copy.deepcopy(model)
    tdlrt.merge_adapters_(merged)
    assert found.network_dense_parameters == sum(p.numel() for p in merged.parameters())
    assert found.network_parameters == sum(p.numel() for p in model.parameters())
    assert set(found.ranks) == {"0.update", "3.update", "5.update"}


# --- files --------------------------------------------------------------------------------------


def test_files_of_adapters_alone(tmp_path: Path) -> None:
    model, path = trained().eval(), tmp_path / "adapters.safetensors"
    tdlrt.save_adapters(model, path)
    other = small().eval()
    tdlrt.add_adapters_(other, rank=1, train=HEAD, scale=0.5)
    core = other[0].update.core
    tdlrt.load_adapters(path, other)
    assert torch.equal(other(X), model(X))
    assert other[0].update.core is core
    base = sum(p.numel() * 4 for p in small().parameters())
    updates = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert updates < path.stat().st_size < updates + base / 2


def test_files_of_adapters_inside_other_modules(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Sequential(trained())).eval(), tmp_path / "a.safetensors"
    tdlrt.save_adapters(model, path)
    other = nn.Sequential(nn.Sequential(small())).eval()
    tdlrt.add_adapters_(other, rank=1, train=f"0.0.{HEAD}")
    tdlrt.load_adapters(path, other)
    assert torch.equal(other(X), model(X))


def test_a_file_of_other_adapters_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    tdlrt.save_adapters(trained(), path)
    for options in ({"exclude": "0"}, {"train": None}):
        other = small()
        tdlrt.add_adapters_(other, **({"rank": 3, "train": HEAD} | options))
        before = copy.deepcopy(other)
        with pytest.raises(CheckpointError, match=r"expected the network that was saved"):
            tdlrt.load_adapters(path, other)
        assert same_state(other, before)


def test_a_file_of_a_model_is_no_file_of_adapters(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "model.safetensors"
    tdlrt.save(model, path)
    with pytest.raises(CheckpointError, match=r"unexpected: 0\.base"):
        tdlrt.load_adapters(path, model)


# --- the optimiser at a zero core ---------------------------------------------------------------

POLICIES = {
    "fixed": tdlrt.FixedRank(),
    "tolerance": tdlrt.RelativeTolerance(0.1),
    "exact": tdlrt.RelativeTolerance(0.0),
    "budget": tdlrt.ParameterBudget(parameters=500),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@each_policy
@INTEGRATORS
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.2), (torch.optim.Adam, 0.02)])
def test_a_zero_core_and_its_bases_learn(policy, integrator, optimizer, lr) -> None:
    model = small()
    tdlrt.add_adapters_(model, rank=2, train=HEAD)
    layers = [module.update for module in model if isinstance(module, AdapterLayer)]
    before = [layer.factors[0].detach().clone() for layer in layers]
    training = tdlrt.TDLRT(model, optimizer, lr=lr, rank_policy=policy, integrator=integrator)

    def closure() -> torch.Tensor:
        training.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(12):
        training.step(closure)
    assert closure().item() < 0.8 * first
    for layer, basis in zip(layers, before, strict=True):
        layer.check_invariants()
        assert layer.core.norm() > 0
        now = layer.factors[0].detach()
        assert (now - basis @ (basis.T @ now)).norm() > 1e-3


@each_policy
def test_adam_takes_no_wild_step_from_a_zero_core(policy) -> None:
    # Its first direction is a matrix of signs, often singular: where bases cannot move yet, their
    # second moment must not count as zero beside a first moment that the core passes on.
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Flatten(), nn.Linear(12 * 9, 40))
    nn.init.zeros_(model[2].weight)
    tdlrt.add_adapters_(model, rank=6, include="*")
    training = tdlrt.TDLRT(model, torch.optim.Adam, lr=1e-3, rank_policy=policy)
    x, y = gaussian((30, 6, 5, 5), 2, torch.float32), torch.arange(30) % 40
    sizes = [0.0]
    for _ in range(10):
        training.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        training.step()
        sizes.append(float(model[2].update.core.detach().norm()))
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    # lr per entry of the core and of the bases' parts, the most that Adam moves at first
    assert max(steps) < 3 * 1e-3 * (6 * 6 + 40 * 6 + 108 * 6) ** 0.5


@pytest.mark.parametrize("policy", [POLICIES["tolerance"], POLICIES["exact"], POLICIES["budget"]])
@INTEGRATORS
def test_without_a_gradient_a_zero_core_keeps_its_ranks(policy, integrator) -> None:
    model = small()
    tdlrt.add_adapters_(model, rank=2, train=HEAD)
    training = tdlrt.TDLRT(
        model, torch.optim.SGD, lr=0.1, rank_policy=policy, integrator=integrator
    )
    ranks = tdlrt.summary(model).ranks

    def closure() -> torch.Tensor:
        training.zero_grad()
        loss = 0 * model(X).sum()
        loss.backward()
        return loss

    for _ in range(3):
        training.step(closure)
    assert tdlrt.summary(model).ranks == ranks
    assert all(not module.update.core.any() for module in model if isinstance(module, AdapterLayer))


def test_a_budget_counts_cores_and_bases_of_the_updates() -> None:
    model = small()
    tdlrt.add_adapters_(model, rank=4, train=HEAD)
    dense = sum(row.dense_parameters for row in tdlrt.summary(model).rows if row.ranks)
    policy = tdlrt.ParameterBudget(0.1)
    training = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, rank_policy=policy)
    for _ in range(3):
        training.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        training.step()
        updates = sum(p.numel() for name, p in model.named_parameters() if ".update." in name)
        assert updates == tdlrt.summary(model).parameters <= 0.1 * dense
    with pytest.raises(tdlrt.RankError, match="smallest possible budget"):
        training.rank_policy = tdlrt.ParameterBudget(parameters=20)


# --- refusals -----------------------------------------------------------------------------------


def test_adding_twice_is_refused() -> None:
    model = trained()
    before = copy.deepcopy(model)
    with pytest.raises(AdapterError, match="expected one without"):
        tdlrt.add_adapters_(model)
    assert same_state(model, before)


@pytest.mark.parametrize(
    "use",
    [
        tdlrt.merge_adapters_,
        tdlrt.unload_adapters_,
        lambda model: tdlrt.save_adapters(model, "nowhere"),
        lambda model: tdlrt.load_adapters("nowhere", model),
    ],
    ids=["merge", "unload", "save", "load"],
)
def test_what_needs_adapters_says_so(use) -> None:
    with pytest.raises(AdapterError, match="add_adapters_"):
        use(small())
    with pytest.raises(AdapterError, match="adapted layer itself"):
        use(trained()[0])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"train": "nothing"}, NothingMatchedError, "train: the pattern 'nothing'"),
        ({"include": "nothing"}, NothingMatchedError, "include: the pattern 'nothing'"),
        ({"train": "*"}, NothingMatchedError, "no layer can be factorised"),
        ({"rank": 0}, tdlrt.RankError, "rank: got 0"),
        ({"modes": "none"}, tdlrt.RankError, "modes: got 'none'"),
        ({"scale": float("nan")}, AdapterError, "scale: got nan"),
        ({"scale": 0}, AdapterError, "scale: got 0, expected a finite number other than 0"),
        ({"scale": 1e-60}, AdapterError, "scale: got 1e-60"),  # zero in float32
        ({"scale": 1e60}, AdapterError, "scale: got 1e\\+60"),
        ({"scale": "two"}, AdapterError, "scale: got 'two', expected a finite number"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_is(options, error, match) -> None:
    model = small()
    with pytest.raises(error, match=match):
        tdlrt.add_adapters_(model, **options)
    assert same_state(model, small())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_of_adapters_are_not_factorised() -> None:
    model = trained()
    with pytest.raises(NothingMatchedError, match="part of an adapter"):
        tdlrt.factorize_(model)


def test_a_head_that_shares_its_weight_is_not_copied() -> None:
    model = nn.Sequential(nn.Embedding(9, 7), nn.Linear(7, 7), nn.Linear(7, 9, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(AdapterError, match=r"2\.weight is shared with another module"):
        tdlrt.add_adapters_(model, rank=1, train="2")
    tdlrt.add_adapters_(model, rank=1, train="[02]")
    assert model[2].trained.weight is not model[2].base.weight


def test_an_update_may_be_a_tensor(tmp_path):
    modes = {"5": ((4, 4), (12, 9))}
    model = trained(reshape=modes)
    update = model[5].update
    assert update.shape == (4, 4, 12, 9)
    assert update.core.abs().max() > 0
    before = model.eval()(X)
    tdlrt.save_adapters(model, tmp_path / "adapters.safetensors")
    other = small().eval()
    tdlrt.add_adapters_(other, rank=1, train=HEAD, reshape=modes)
    tdlrt.load_adapters(tmp_path / "adapters.safetensors", other)
    assert torch.equal(other.eval()(X), before)
    tdlrt.merge_adapters_(model)
    assert type(model[5]) is nn.Linear
    assert relative_error(model(X), before) < 1e-5
