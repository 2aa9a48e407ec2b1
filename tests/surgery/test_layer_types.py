"""Layer types that are no part of the library, and the registry of them."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.nn import TuckerConv2d, TuckerLinear
from tdlrt.surgery import register_layer


class ScaledLinear(nn.Linear):
    """y = g (W x + b) with a fixed gain g."""

    def __init__(self, *args, gain=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = gain

    def forward(self, x):
        return self.gain * super().forward(x)


class TuckerScaledLinear(TuckerLinear):
    @classmethod
    def from_scaled(cls, dense, *, rank, modes="all", init_scale=None):
        linear = nn.Linear(dense.in_features, dense.out_features, device="meta")
        linear.weight, linear.bias = dense.weight, dense.bias
        linear.train(dense.training)
        layer = cls.from_linear(linear, rank=rank, modes=modes, init_scale=init_scale)
        layer.gain = dense.gain
        return layer

    def forward(self, x):
        return self.gain * super().forward(x)

    def to_dense(self):
        linear = super().to_dense()
        dense = ScaledLinear(*linear.weight.T.shape, device="meta", gain=self.gain)
        dense.weight, dense.bias = linear.weight, linear.bias
        return dense.train(self.training)

    @torch.no_grad()
    def to_plain(self, path="auto"):
        plain = super().to_plain(path)
        last = plain[-1] if isinstance(plain, nn.Sequential) else plain
        for parameter in last.parameters():
            parameter.mul_(self.gain)
        return plain


class Conv1D(nn.Module):
    """y = x W + b, with W stored as inputs x outputs."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def from_conv1d(dense, *, rank, modes="all", init_scale=None):
    linear = nn.Linear(*dense.weight.shape, device="meta").train(dense.training)
    linear.weight = nn.Parameter(dense.weight.detach().T, dense.weight.requires_grad)
    linear.bias = dense.bias
    return TuckerLinear.from_linear(linear, rank=rank, modes=modes, init_scale=init_scale)


register_layer(ScaledLinear, TuckerScaledLinear.from_scaled)
register_layer(Conv1D, from_conv1d, weight=lambda dense: dense.weight.T)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        ScaledLinear(20, 30), nn.ReLU(), Conv1D(40, 30), nn.ReLU(), nn.Linear(40, 5)
    ).eval()


def inputs():
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1))


def test_registered_types_are_factorised():
    model = network()
    biases = [model[0].bias, model[2].bias]
    expected = model(inputs())
    report = tdlrt.factorize_(model, rank="full")
    assert [(row.kind, row.shape) for row in report.rows] == [
        ("ScaledLinear", (30, 20)),
        ("Conv1D", (40, 30)),
        ("Linear", (5, 40)),
    ]
    assert report.skipped[0].note == "output head"
    assert type(model[0]) is TuckerScaledLinear
    assert type(model[2]) is TuckerLinear
    assert model[0].bias is biases[0] and model[2].bias is biases[1]
    assert not model[0].training
    assert torch.allclose(model(inputs()), expected, atol=1e-5)


@pytest.mark.parametrize("convert", [tdlrt.to_dense, tdlrt.to_plain])
def test_and_converted_back(convert):
    model = network()
    tdlrt.factorize_(model, rank=6)
    converted = convert(model)
    assert torch.allclose(converted(inputs()), model(inputs()), atol=1e-5)
    assert not any(isinstance(module, tdlrt.nn.TuckerLayer) for module in converted.modules())
    assert (type(converted[0]) is ScaledLinear) == (convert is tdlrt.to_dense)


def test_and_trained():
    model = network()
    tdlrt.factorize_(model, rank=8)
    before = copy.deepcopy(model.state_dict())
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, tau=0.3)
    model(inputs()).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(after[k].shape != v.shape or not after[k].equal(v) for k, v in before.items())
    model[0].check_invariants()


def test_and_stored(tmp_path):
    model = network()
    tdlrt.factorize_(model, rank=6)
    tdlrt.save(model, tmp_path / "network.safetensors")
    dense = network()
    tdlrt.load(tmp_path / "network.safetensors", dense)
    assert type(dense[0]) is TuckerScaledLinear
    assert torch.equal(dense(inputs()), model(inputs()))
    tdlrt.load(tmp_path / "network.safetensors", model)


def test_an_adapter_needs_a_weight_in_the_usual_order():
    model = network()
    expected = model(inputs())
    report = tdlrt.add_adapters_(model, rank=2)
    notes = {row.name: row.note for row in report.rows}
    assert notes == {"0": "", "2": "stores its weight in another order", "4": "output head"}
    assert torch.equal(model(inputs()), expected)
    nn.init.normal_(model[0].update.core)
    changed = model(inputs())
    assert not torch.allclose(changed, expected)
    tdlrt.merge_adapters_(model)
    assert type(model[0]) is ScaledLinear
    assert torch.allclose(model(inputs()), changed, atol=1e-5)


class Stored(Conv1D):
    """Registered with the way back into the order in which the weight is stored."""


class Named(Conv1D):
    """Registered by its full name alone."""


register_layer(
    Stored, from_conv1d, weight=lambda dense: dense.weight.T, store=lambda weight: weight.T
)
register_layer(f"{__name__}.Named", from_conv1d, weight=lambda dense: dense.weight.T)


def test_an_adapter_of_a_layer_whose_order_is_known_both_ways():
    model = nn.Sequential(Stored(40, 20), nn.ReLU(), nn.Linear(40, 5))
    expected = model(inputs())
    assert tdlrt.add_adapters_(model, rank=30).factorized[0].shape == (40, 20)
    assert torch.equal(model(inputs()), expected)
    nn.init.normal_(model[0].update.core, std=0.1)
    changed = model(inputs())
    assert not torch.allclose(changed, expected, atol=1e-2)
    tdlrt.merge_adapters_(model)
    assert type(model[0]) is Stored
    assert torch.allclose(model(inputs()), changed, atol=1e-4)


def test_a_type_that_is_registered_by_its_name(tmp_path):
    model = nn.Sequential(Named(40, 20), nn.ReLU(), nn.Linear(40, 5))
    assert tdlrt.factorize_(model, rank=3).factorized[0].kind == "Named"
    tdlrt.save(model, tmp_path / "network.safetensors")
    fresh = nn.Sequential(Named(40, 20), nn.ReLU(), nn.Linear(40, 5))
    tdlrt.load(tmp_path / "network.safetensors", fresh)
    assert torch.equal(fresh(inputs()), model(inputs()))


def test_which_layers_may_be_reshaped():
    model = nn.Sequential(Named(40, 20), nn.Linear(40, 5))
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"0 is a Named, expected .*reshape"):
        tdlrt.factorize_(model, reshape={"0": ((4, 10), (20,))})


def test_input_covariances_belong_to_the_inputs():
    model = nn.Sequential(Conv1D(30, 30), nn.Linear(30, 5))
    rows = torch.randn(50, 3) @ torch.randn(3, 30)  # inputs in three directions only
    dense = model(rows)
    covariance = (rows.T @ rows / len(rows)).double()
    tdlrt.factorize_(model, rank=3, covariances={"0": covariance})
    assert model[0].ranks == (3, 3)
    assert torch.allclose(model(rows), dense, atol=0.05 * float(dense.detach().std()))


def test_a_registered_linear_that_comes_last_is_the_output_head():
    model = nn.Sequential(nn.Linear(30, 30), ScaledLinear(30, 20))
    assert tdlrt.factorize_(model).skipped[0].note == "output head"


def test_a_single_registered_layer_cannot_be_replaced_in_place():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="got a single Conv1D"):
        tdlrt.factorize_(Conv1D(30, 30))


def test_subclasses_are_registered_by_themselves():
    class Other(ScaledLinear):
        """What the Tucker layer knows nothing of."""

    model = nn.Sequential(Other(30, 30), nn.Linear(30, 30), nn.Linear(30, 5))
    skipped = {row.name: row.note for row in tdlrt.factorize_(model, dry_run=True).skipped}
    assert skipped["0"] == "Other is not a plain torch layer"
    register_layer(Other, TuckerScaledLinear.from_scaled)
    assert [row.name for row in tdlrt.factorize_(model).factorized] == ["0", "1"]


def test_what_a_registered_function_returns_is_checked():
    class Transposed(Conv1D):
        """Registered without its order of modes, then with a function that returns nothing."""

    model = nn.Sequential(Transposed(40, 30), nn.Linear(40, 5))
    register_layer(Transposed, from_conv1d)
    message = r"registered for Transposed returned one of shape \(40, 30\), expected .*\(30, 40\)"
    with pytest.raises(tdlrt.UnsupportedLayerError, match=message):
        tdlrt.factorize_(model)
    register_layer(Transposed, lambda dense, **options: None)
    with pytest.raises(tdlrt.UnsupportedLayerError, match="Transposed returned None, expected a"):
        tdlrt.factorize_(model)
    assert type(model[0]) is Transposed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Linear", from_conv1d), "dense_type: got 'Linear', expected a subclass of torch.nn.Mod"),
        (("my layers.Linear", from_conv1d), "dense_type: got 'my layers.Linear', expected a sub"),
        ((int, from_conv1d), "dense_type: got <class 'int'>"),
        ((TuckerConv2d, from_conv1d), "dense_type: got TuckerConv2d, which is in Tucker format"),
        ((ScaledLinear, 3), "build: got 3, expected a function of a layer"),
        ((ScaledLinear, None), "build: got None, expected a function of a layer"),
    ],
)
def test_bad_registrations(arguments, message):
    with pytest.raises(tdlrt.UnsupportedLayerError, match=message):
        register_layer(*arguments)


def test_a_bad_weight_function():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="weight: got 'T', expected a function"):
        register_layer(ScaledLinear, TuckerScaledLinear.from_scaled, weight="T")


def test_a_bad_store_function():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="store: got 'T', expected a function of"):
        register_layer(ScaledLinear, TuckerScaledLinear.from_scaled, store="T")
