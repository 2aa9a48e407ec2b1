"""Layers that stay dense, each with a reason, and what a start does to the others."""

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.nn import TuckerConv2d, TuckerLinear


def notes(report):
    return {row.name: row.note for row in report.skipped}


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(30, 30, **options) for _ in range(3)), nn.Linear(30, 2))


class Quantised(torch.Tensor):
    """Refuses all arithmetic, as a quantised tensor does that lacks an operator."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "get" in func.__name__ or func.__name__ in ("numel", "data_ptr", "__set__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(func.__name__)


def quantise(layer):
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Quantised)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


def test_frozen_layers_are_left_alone_unless_they_are_named():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    assert notes(tdlrt.factorize_(model))["0"] == "frozen; name it in include"
    assert torch.equal(model[0].weight, before)
    tdlrt.factorize_(model, include="0")
    assert isinstance(model[0], TuckerLinear)
    assert not model[0].core.requires_grad


def test_a_frozen_model_is_factorised():
    model = network().requires_grad_(False)
    assert tdlrt.factorize_(model).factorized
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_beside_frozen_layers():
    model = network().requires_grad_(False)
    assert len(tdlrt.add_adapters_(model, rank=2).factorized) == 3


TIES = {
    "a bare parameter": lambda model: setattr(model, "table", model[0].weight),
    "another layer": lambda model: setattr(model[1], "weight", model[0].weight),
    "another name of the same layer": lambda model: setattr(model[0], "same", model[0].weight),
    "an embedding": lambda model: model.append(nn.Embedding(30, 30)).__setattr__(
        "4", setattr(model[4], "weight", model[0].weight) or model[4]
    ),
    "a list": lambda model: model.append(nn.ParameterList([model[0].weight])),
    "a buffer": lambda model: model.register_buffer("table", model[0].weight.detach()),
    "the transposed weight": lambda model: setattr(
        model[1], "weight", nn.Parameter(model[0].weight.detach().T)
    ),
    "a parametrised weight": lambda model: (
        nn.utils.parametrizations.weight_norm(model[1]),
        setattr(model[1].parametrizations.weight, "original1", model[0].weight),
    ),
}


@pytest.mark.parametrize("tie", TIES.values(), ids=TIES)
def test_a_tie_is_never_cut(tie):
    model = network()
    weight = model[0].weight
    tie(model)
    report = tdlrt.factorize_(model, include="*", exclude="3")
    assert notes(report)["0"] == "weight tied to another parameter"
    assert model[0].weight is weight


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_types_without_a_tucker_format(dtype):
    model = network()
    layer = model[0]
    layer.weight = nn.Parameter(torch.zeros(30, 30, dtype=dtype), requires_grad=False)
    reason = f"weight of type {str(dtype).removeprefix('torch.')}"
    assert notes(tdlrt.factorize_(model, include=["0", "1"]))["0"] == reason
    assert model[0] is layer
    assert notes(tdlrt.add_adapters_(model, include="*"))["0"] == reason
    with pytest.raises(tdlrt.UnsupportedLayerError, match=f"Linear: got one that .*{reason}"):
        TuckerLinear.from_linear(layer)


def test_complex_layers_cannot_be_built():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="weight of type complex64"):
        TuckerConv2d(4, 5, 3, dtype=torch.complex64)


@pytest.mark.parametrize("call", [tdlrt.factorize_, tdlrt.add_adapters_])
def test_quantised_weights(call):
    model = network()
    quantise(model[0])
    assert notes(call(model, include="*"))["0"] == "weight is a special tensor (Quantised)"
    with pytest.raises(tdlrt.UnsupportedLayerError, match="special tensor"):
        TuckerLinear.from_linear(getattr(model[0], "base", model[0]))
    assert tdlrt.summary(model).rows[0].shape == (30, 30)


def lazy():
    return nn.Sequential(nn.LazyConv2d(16, 3), nn.Flatten(), nn.LazyLinear(64), *network()[:3])


@pytest.mark.parametrize("call", [tdlrt.factorize_, tdlrt.add_adapters_])
def test_layers_without_a_shape_yet(call):
    model = lazy()
    reason = "has no shape yet; run a batch first"
    assert notes(call(model, include="*")) == {"0": reason, "2": reason}


def test_the_summary_of_layers_without_a_shape_yet():
    model = lazy()
    row = tdlrt.summary(model).rows[0]
    assert (row.shape, row.parameters, row.compression) == ((), 0, 0.0)
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"0\.weight has no shape yet.*batch"):
        tdlrt.summary(model, (1, 3, 8, 8))
    assert nn.parameter.is_lazy(model[0].weight)


@pytest.mark.parametrize("rank", [0.5, 3, "full", (20, 2, 3, 3), tdlrt.RelativeTolerance(0.0)])
@pytest.mark.parametrize("modes", ["all", "channels"])
def test_ranks_on_the_meta_device_are_those_of_a_network_with_values(rank, modes):
    def model():
        return nn.Sequential(nn.Conv2d(4, 20, 3), nn.Conv2d(20, 2, 3))

    with torch.device("meta"):
        empty = model()
    full = model()
    rank = {"0": rank, "1": 0.5}
    expected = tdlrt.factorize_(full, rank=rank, modes=modes, include="*")
    report = tdlrt.factorize_(empty, rank=rank, modes=modes, include="*")
    assert [row.ranks for row in report.rows] == [row.ranks for row in expected.rows]
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(empty(x), full(x))


def test_a_skeleton_on_the_meta_device_takes_a_state_dict_of_other_ranks():
    full = network()
    tdlrt.factorize_(full, rank=3)
    with torch.device("meta"):
        empty = network()
    report = tdlrt.factorize_(empty, rank=0.5)
    assert report.rows[0].change is None
    assert "changed by" not in str(report)
    empty.to_empty(device="cpu").load_state_dict(full.state_dict())
    assert torch.equal(empty(torch.ones(2, 30)), full(torch.ones(2, 30)))


def test_a_tolerance_needs_values():
    with torch.device("meta"):
        model = network()
    with pytest.raises(tdlrt.RankError, match="on the meta device, which has no values"):
        tdlrt.factorize_(model, rank=tdlrt.RelativeTolerance(0.1))
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("rank", [0.5, 2, "full", tdlrt.RelativeTolerance(0.3)])
def test_the_report_says_what_the_start_did(rank):
    model = network()
    before = [model[i].weight.detach().clone() for i in range(3)]
    planned = tdlrt.factorize_(model, rank=rank, dry_run=True)
    report = tdlrt.factorize_(model, rank=rank)
    assert planned == report
    for i, weight in enumerate(before):
        change = (model[i].dense_weight() - weight).norm() / weight.norm()
        assert report.rows[i].change == pytest.approx(change.item(), abs=1e-6)
    assert report.rows[3].change is None
    assert ("to keep a trained network" in str(report)) == (rank != "full")


def test_a_zero_weight_is_not_changed():
    model = network()
    nn.init.zeros_(model[0].weight)
    assert tdlrt.factorize_(model).rows[0].change == 0.0


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_not_lost(hook):
    model = network()
    getattr(model[0].weight, hook)(lambda grad: None)
    assert "hooks" in notes(tdlrt.factorize_(model))["0"]


def test_backward_pre_hooks_are_not_lost():
    model = network()
    model[0].register_full_backward_pre_hook(lambda module, grads: None)
    assert "hooks" in notes(tdlrt.factorize_(model))["0"]


class OwnAttention(nn.MultiheadAttention):
    """A subclass, which may do anything."""


OTHERS = {
    "attention of the user's": (OwnAttention(8, 2), "projections packed in one parameter"),
    "LSTM": (nn.LSTM(4, 5), "recurrent layer"),
    "GRU cell": (nn.GRUCell(4, 5), "recurrent layer"),
    "embedding": (nn.Embedding(7, 3), "embedding, a table of rows"),
    "bag": (nn.EmbeddingBag(7, 3), "embedding, a table of rows"),
    "bilinear": (nn.Bilinear(3, 4, 5), "Bilinear is not a plain torch layer"),
    "own": (Cell(), "Cell is not a plain torch layer"),
}


@pytest.mark.parametrize(("module", "reason"), OTHERS.values(), ids=OTHERS)
def test_every_module_with_weights_has_a_reason(module, reason):
    model = nn.ModuleDict({"other": module, "layer": nn.Linear(30, 30), "head": nn.Linear(30, 2)})
    report = tdlrt.factorize_(model, dry_run=True)
    assert notes(report)["other"] == reason
    assert notes(report)["head"] == "output head"
    summary = tdlrt.summary(model)
    (row,) = (row for row in summary.rows if row.name == "other")
    assert row.note == reason
    assert f"other ({reason})" in str(summary)
    own = [p for p in module.parameters(recurse=False) if p is not None and p.ndim > 1]
    assert row.parameters == sum(weight.numel() for weight in own)
    assert row.shape in [tuple(weight.shape) for weight in own]


def test_the_output_of_attention_and_bare_parameters_have_a_reason():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    model.self_attn = OwnAttention(8, 2)
    model.table = nn.Parameter(torch.zeros(2, 3))
    found = notes(tdlrt.factorize_(model))
    assert found["self_attn.out_proj"] == "attention reads its weight itself"
    assert found["(model)"] == "parameters beside its layers"


def test_every_weight_of_a_model_is_in_a_row():
    model = nn.Sequential(
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.LSTM(8, 8), nn.Embedding(5, 8)
    )
    report = tdlrt.factorize_(model)
    rows = report.rows
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(row.parameters for row in rows) == weights
    summary = tdlrt.summary(model)
    assert sum(row.parameters for row in summary.rows) == weights
    assert all(row.note for row in rows if row.ranks is None)
    assert summary.vector_parameters == summary.network_parameters - weights
    norms = [name for name, one in model.named_modules() if isinstance(one, nn.LayerNorm)]
    assert {row.name for row in report.vectors} >= set(norms)
    assert "vectors stay as they are: 3 SplitAttention (72 parameters), 7 LayerNorm" in str(report)
