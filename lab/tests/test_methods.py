"""Every method: it trains, has the size asked for, counts it alike, and is resumed exactly."""

import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdlrt.errors import ConfigError, MissingExtraError, RankError
from tdlrt.nn import TuckerConv2d
from tdlrt.report import summary
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.methods import METHODS
from tdlrt_lab.methods.cp import CP
from tdlrt_lab.methods.factored import train_cores
from tdlrt_lab.methods.matrix import Matrix
from tdlrt_lab.methods.matrix_dlrt import MatrixConv
from tdlrt_lab.methods.sizes import kept_parameters, largest_share, largest_shares
from tdlrt_lab.methods.tensor_train import TensorTrain
from tdlrt_lab.run.training import Training

BUDGET = 0.1
SIZED = [name for name in METHODS if name != "dense"]
ADAPTIVE = ["tdlrt", "matrix_dlrt"]
AT_ONCE = [name for name in SIZED if not {"dense_until", "tau"} & METHODS[name].options]


def config(method, **options):
    if method == "structured":
        pytest.importorskip("torch_pruning")
    options = {"budget": None if method == "dense" else BUDGET, "optimizer": "adam"} | options
    if method in ADAPTIVE:
        options = {"freeze_at": 0.5, "adapt_every": 1, **options}
    base = {
        "model": "lenet5",
        "data": "digits",
        "epochs": 3,
        "batch_size": 256,
        "augment": "standard",
    }
    return RunConfig(method=method, **{**base, **options})


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def training(config, data):
    torch.manual_seed(config.seed)
    return Training(config, data)


def train(training, until=math.inf):
    return list(training.epochs(lambda: training.step >= until, lambda training: None))


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_to_its_size_and_is_resumed_exactly(method, digits):
    """Stops: before, at and after the step at which dense networks get their size."""
    options = config(method)
    whole = training(options, digits)
    metrics = train(whole)
    assert metrics[-1].loss < metrics[0].loss or "dense_until" in whole.method.options
    size = whole.size
    if method == "dense":
        assert (size.dense_parameters, metrics[-1].compression) == (0, 0.0)
    else:
        assert size.dense_parameters == 125_500  # the weights of conv1, conv2 and fc1
        assert 0.9 * BUDGET <= size.parameters / size.dense_parameters <= BUDGET
    # Three epochs of six steps; "dense_until" falls on step 11.
    late = "dense_until" in whole.method.options
    for stop in (5, 11, 14) if late else (8,):
        first = training(options, digits)
        train(first, until=stop)
        assert first.step == stop
        state = first.state_dict()
        second = training(replace(options), digits)
        torch.rand(5)
        second.load_state_dict(state)
        assert second.size == first.size
        train(second)
        ours, theirs = second.model.state_dict(), whole.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert [replace(m, seconds=0.0) for m in second.history] == [
            replace(m, seconds=0.0) for m in whole.history
        ]


@pytest.mark.parametrize("method", SIZED)
def test_loss_falls_while_it_has_its_size(method, digits):
    options = {"dense_until": 0.15} if "dense_until" in METHODS[method].options else {}
    options |= {"freeze_at": 0.1} if method in ADAPTIVE else {}
    options |= {"epochs": 5, "batch_size": 128, "lr": 0.006, "augment": "none"}
    metrics = train(training(config(method, **options), digits))
    assert metrics[1].compression >= 0.89
    assert metrics[-1].loss < 0.8 * metrics[1].loss


@pytest.mark.parametrize("method", AT_ONCE)
def test_size_is_met_from_the_start(method, digits):
    for budget in (0.05, 0.3):
        size = training(config(method, budget=budget), digits).size
        assert 0.9 * budget <= size.parameters / size.dense_parameters <= budget


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_training_of_one_step_has_its_size(method, digits):
    options = {"epochs": 1, "batch_size": 1437, "freeze_at": 0.01}
    assert train(training(config(method, **options), digits))[-1].compression >= 0.89


def test_bases_of_the_channel_modes_alone(digits):
    model = training(config("tdlrt", modes="channels"), digits).model
    kernels = [layer for layer in model.modules() if isinstance(layer, TuckerConv2d)]
    assert kernels
    assert all(layer.learned_modes == (0, 1) for layer in kernels)


def test_linear_layers_as_tensors(digits):
    reshape = "fc1=20x25:50x2x2"
    metrics = train(run := training(config("tdlrt", reshape=reshape), digits))
    assert run.model.fc1.shape == (20, 25, 50, 2, 2)
    assert metrics[-1].compression >= 0.89
    with pytest.raises(RankError, match=r"reshape\['fc1'\]: got \(20,\), whose product is 20"):
        training(config("tdlrt", reshape="fc1=20:200"), digits)


@pytest.mark.parametrize("method", ["posthoc", "structured"])
@pytest.mark.parametrize("budget", [0.05, 0.5])
def test_size_of_a_network_without_structure_is_met_too(method, budget, digits):
    """Random weights have flat spectra: no tolerance below 1 would cut them that far."""
    run = training(config(method, model="rescnn", budget=budget), digits)
    run.dense_steps = run.step
    run.method.after_step(run)
    size = run.size
    assert 0.9 * budget <= size.parameters / size.dense_parameters <= budget


@pytest.mark.parametrize(
    "method", ["tucker", "cp", "tensor_train", "matrix", "posthoc", "structured"]
)
def test_a_budget_below_rank_one_is_refused(method, digits):
    with pytest.raises(RankError, match=r"budget 0\.0001: the smallest .* give at least 0\.0"):
        training(config(method, budget=1e-4), digits)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].needs_budget])
def test_methods_with_one_measure_of_size_need_it(method):
    with pytest.raises(ConfigError, match=rf"budget None: expected a share .* method '{method}'"):
        config(method, budget=None)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "tucker",
            {"tau": 0.2, "budget": None},
            r"tau 0\.2: not used with method tucker, only with method tdlrt, matrix_dlrt",
        ),
        ("snip", {"rank": 0.2}, r"rank 0\.2: not used with method snip, only"),
        ("cp", {"dense_until": 0.3}, r"dense_until 0\.3: not used with method cp"),
        ("tucker", {"rank": 0.2}, r"rank 0\.2 and budget 0\.1: expected one of them"),
        (
            "matrix_dlrt",
            {"modes": "channels"},
            r"modes 'channels': not used with method",
        ),
        ("tucker", {"reshape": "fc1=500:800"}, r"reshape 'fc1=500:800': not used with method"),
        ("matrix_dlrt", {"rank": {"fc1": 3}}, r"rank .*: expected one rank for all layers"),
    ],
)
def test_options_that_a_method_has_no_use_for(method, options, message):
    with pytest.raises(ConfigError, match=message):
        config(method, **options)


def test_a_network_that_cannot_be_pruned_is_refused_before_the_training(digits):
    pytest.importorskip("transformers")
    options = config("structured", model="hf:vit")
    with pytest.raises(ConfigError, match=r"model 'hf:vit': cannot be pruned by torch-pruning"):
        training(options, digits)


def test_a_dense_run_ignores_how_the_run_beside_it_is_made_small():
    assert config("dense", budget=0.05, ramp="linear").budget == 0.05


@pytest.mark.parametrize("method", METHODS)
def test_stored_options_give_the_same_options_again(method):
    options = config(method)
    assert RunConfig(**options.to_dict()) == options


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"torch_pruning, .*pip install 'tdlrt\[bench\]'"):
        RunConfig(model="lenet5", data="digits", method="structured", budget=0.1)


# Layers and their replacements.

CONVS = {
    "plain": nn.Conv2d(6, 8, 3),
    "all options": nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 4), (1, 2), bias=False),
    "circular": nn.Conv2d(6, 8, 3, padding=(1, 0), padding_mode="circular"),
    "reflect": nn.Conv2d(6, 8, (5, 3), (1, 2), padding=2, padding_mode="reflect"),
    "same": nn.Conv2d(6, 8, (3, 4), padding="same", dilation=2),
    "one dimension": nn.Conv1d(6, 8, 5, 2, 3),
    "three dimensions": nn.Conv3d(6, 8, (3, 2, 1), padding=1),
    "linear": nn.Linear(6, 8),
}


def inputs(layer):
    order = layer.weight.ndim - 2
    return torch.randn(2, 6, *(9, 11, 4)[:order], dtype=torch.float64)


def double(layer):
    torch.manual_seed(0)
    layer = layer.double()
    layer.reset_parameters()
    return layer


@pytest.mark.parametrize("method", [Matrix, TensorTrain])
@pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)
def test_full_rank_is_the_layer_itself(layer, method):
    layer = double(layer)
    shape = layer.weight.shape
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            small = method().replacement(layer, method().ranks(shape, 1.0))
    finally:
        torch.set_default_dtype(torch.float32)
    x = inputs(layer)
    torch.testing.assert_close(small(x), layer(x))
    assert kept_parameters(small, biases=False) == method().size(shape, method().ranks(shape, 1.0))


@pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)
def test_cp_is_the_sum_of_rank_one_kernels_of_the_norm_of_the_layer(layer):
    layer = double(layer)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            small = CP().replacement(layer, (5,))
    finally:
        torch.set_default_dtype(torch.float32)
    first, *taps, last = (stage.weight.detach() for stage in small)
    kernel = torch.zeros_like(layer.weight)
    for r in range(5):
        vectors = [last[:, r].flatten(), first[r].flatten(), *(tap[r].flatten() for tap in taps)]
        term = vectors[0]
        for vector in vectors[1:]:
            term = term[..., None] * vector
        kernel += term
    torch.testing.assert_close(kernel.norm(), layer.weight.detach().norm())
    x = inputs(layer)
    expected = torch.func.functional_call(layer, {"weight": kernel}, (x,))
    torch.testing.assert_close(small(x), expected)
    assert kept_parameters(small, biases=False) == CP().size(layer.weight.shape, (5,))


@pytest.mark.parametrize("layer", [c for c in CONVS.values() if not isinstance(c, nn.Linear)])
def test_matrix_convolution_is_the_convolution_with_its_matrix_as_kernel(layer):
    layer = double(layer)
    small = MatrixConv(layer, rank=3, init_scale=None)
    kernel = small.dense_weight().reshape(layer.weight.shape)
    x = inputs(layer)
    expected = torch.func.functional_call(layer, {"weight": kernel}, (x,))
    torch.testing.assert_close(small(x), expected)
    small.check_invariants()
    assert small.bias is layer.bias
    torch.testing.assert_close(small.to_plain()(x), expected)


def test_multiply_adds_of_a_matrix_convolution():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    small = nn.Sequential(MatrixConv(conv, rank=3, init_scale=None))
    row = summary(small, (1, 6, 8, 8)).rows[0]
    assert row.dense_macs == 16 * 8 * 54
    assert row.macs == 16 * (54 * 3 + 3 * 8)


def test_train_cores_are_the_best_start_and_of_equal_norms():
    torch.manual_seed(0)
    exact = torch.einsum(
        "ia,ajb,bk->ijk", torch.randn(5, 2), torch.randn(2, 4, 3), torch.randn(3, 6)
    )
    cores = train_cores(exact, (2, 3))
    found = torch.einsum("xia,ajb,bky->ijk", *cores)
    torch.testing.assert_close(found, exact)
    norms = torch.stack([core.norm() for core in cores])
    torch.testing.assert_close(norms, norms[:1].expand(3))
    short = torch.einsum("xia,ajb,bky->ijk", *train_cores(torch.randn(5, 4, 6), (1, 1)))
    assert short.norm() > 5  # the norm of the tensor, not of its truncation


# Scores.


def test_snip_keeps_the_largest_products_of_weight_and_gradient(digits):
    run = training(config("snip", augment="none"), digits)
    images, labels = run.sample(100)
    torch.manual_seed(0)
    dense = training(config("dense", augment="none"), digits).model
    F.cross_entropy(dense(images), labels).backward()
    layers = {name: dense.get_submodule(name).weight for name in run.layers}
    scores = torch.cat([(w * w.grad).abs().flatten() for w in layers.values()])
    masks = torch.cat([run.model.get_submodule(n).weight_mask.flatten() for n in layers]) == 1
    assert masks.sum() == 12_550
    assert scores[masks].min() >= scores[~masks].max()


def test_grasp_removes_the_weights_without_which_the_gradient_grows_most(digits):
    """H g by a difference quotient: (g(w + e g) - g(w)) / e."""
    run = training(config("grasp", augment="none", model="lenet5"), digits)
    images, labels = run.sample(100)
    torch.manual_seed(0)
    dense = training(config("dense", augment="none"), digits).model.double()
    weights = {name: dense.get_submodule(name).weight for name in run.layers}

    def gradients():
        loss = F.cross_entropy(dense(images.double()) / 200, labels)
        return torch.autograd.grad(loss, list(weights.values()))

    before = gradients()
    start = [w.detach().clone() for w in weights.values()]
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), before, strict=True):
            weight += 1e-3 * gradient
    after = gradients()
    products = [(b - a) / 1e-3 for a, b in zip(before, after, strict=True)]
    flow = torch.cat([(-w * p).flatten() for w, p in zip(start, products, strict=True)])
    masks = torch.cat([run.model.get_submodule(n).weight_mask.flatten() for n in weights]) == 1
    assert masks.sum() == 12_550
    threshold = flow.sort().values[12_550]
    clear = (flow - threshold).abs() > 1e-3 * flow.std()
    assert torch.equal(masks[clear], flow[clear] < threshold)


def test_begin_leaves_running_statistics_as_they_are(digits):
    run = training(config("snip", model="rescnn", augment="none"), digits)
    assert all(not b.any() for name, b in run.model.named_buffers() if name.endswith("mean"))


def test_magnitude_prunes_in_rounds_and_never_takes_a_weight_back(digits):
    run = training(config("magnitude", epochs=5, dense_until=0.5), digits)  # 15 of 30 steps
    kept, masks = [], []

    def look(run):
        kept.append(run.size.parameters)
        masks.append(
            torch.cat([run.model.get_submodule(n).weight_mask.flatten() for n in run.layers])
            if run.step >= 3
            else torch.ones(125_500)
        )

    list(run.epochs(lambda: False, look))
    assert [kept[k] for k in (1, 2, 5, 8, 11, 14, 29)] == [
        125_500,
        *(round(125_500 * BUDGET ** (k / 5)) for k in (1, 2, 3, 4, 5, 5)),
    ]
    assert all((now <= before).all() for before, now in pairwise(masks))


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_optimiser_of_a_smaller_network_goes_on_with_the_schedule(digits, warmup):
    rates = {"dense": [], "posthoc": []}

    def look(run):
        rates[run.config.method].append(run.optimizer.param_groups[0]["lr"])

    for method in rates:
        run = training(config(method, warmup=warmup, augment="none"), digits)
        list(run.epochs(lambda: False, look))
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in run.model.parameters()}
    assert rates["posthoc"] == pytest.approx(rates["dense"], rel=1e-12)


def test_largest_share_of_all_layers():
    found = largest_share(lambda share: int(100 * share), 0.37, 100)
    assert found == pytest.approx(0.38, abs=1e-4)
    assert int(100 * found) == 37
    assert largest_share(lambda share: 50, 0.5, 100) == 1.0


def test_what_rounding_leaves_over_goes_to_the_layers_in_turn():
    """Room for 37.95: three tenths of both layers are 33, and a has at most twice its share."""
    steps = {"a": 1, "b": 10}
    sizes = {"a": 10, "b": 100}
    shares = largest_shares(lambda name, s: int(10 * s) * steps[name], 0.345, sizes)
    assert {name: int(10 * share) for name, share in shares.items()} == {"a": 7, "b": 3}
