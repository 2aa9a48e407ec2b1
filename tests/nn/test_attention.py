"""torch's attention and transformer layers with projections in Tucker format."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.nn import SplitAttention, TuckerLinear
from tdlrt.nn.packed import inner_sizes, packed

L, S, N, E, H = 3, 5, 2, 12, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def generator():
    return torch.Generator().manual_seed(0)


def attention(**options):
    """torch's attention with no parameter at zero, in a network in which it can be replaced."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nn.ModuleDict({"attention": module})


def factorized(model, **options):
    tdlrt.factorize_(model, **{"rank": "full", **options})
    return model


def inputs(batch_first=False, batched=True, kdim=None, vdim=None):
    g = generator()
    shape = {True: (N, L, S), False: (1, L, S)}[batched]
    made = [
        torch.randn(shape[0], length, width or E, generator=g)
        for length, width in ((L, None), (S, kdim), (S, vdim))
    ]
    if not batched:
        return [one[0] for one in made]
    return made if batch_first else [one.transpose(0, 1) for one in made]


def padding(kind):
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[0, -2:] = True
    return mask if kind is bool else torch.zeros(N, S).masked_fill(mask, float("-inf"))


def window(kind, dims=2):
    mask = torch.ones(L, S, dtype=torch.bool).triu(2)
    mask = mask if dims == 2 else mask.expand(N * H, -1, -1).clone()
    if dims == 3:
        mask[1, 0, 0] = True
    return mask if kind is bool else torch.zeros(mask.shape).masked_fill(mask, -1.5)


OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 9},
    "one other width": {"vdim": 9, "batch_first": True},
    "added keys": {"add_bias_kv": True},
    "added zeros": {"add_zero_attn": True, "batch_first": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.4},
}
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding(bool)},
    "padding in numbers": {"key_padding_mask": padding(float)},
    "window": {"attn_mask": window(bool)},
    "window in numbers": {"attn_mask": window(float)},
    "window of each head": {"attn_mask": window(float, 3)},
    "both": {"attn_mask": window(bool, 3), "key_padding_mask": padding(bool)},
    "hint": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
}


def assert_same(got, expected, **tolerance):
    torch.testing.assert_close(got[0], expected[0], **tolerance)
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(got[1], expected[1], **tolerance)


@pytest.mark.parametrize("weights", [{}, {"average_attn_weights": False}, {"need_weights": False}])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_equals_the_attention_of_torch(options, masks, weights):
    model = attention(**options).eval()
    given = inputs(options.get("batch_first"), True, options.get("kdim"), options.get("vdim"))
    expected = model["attention"](*given, **masks, **weights)
    split = factorized(model)["attention"]
    assert isinstance(split, SplitAttention)
    assert all(isinstance(one, TuckerLinear) for one in split.projections().values())
    assert_same(split(*given, **masks, **weights), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", [{}, {"need_weights": False}])
@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": padding(bool)[0]}])
def test_one_sequence_without_a_batch(masks, weights):
    model = attention().eval()
    given = inputs(batched=False)
    expected = model["attention"](*given, **masks, **weights)
    got = factorized(model)["attention"](*given, **masks, **weights)
    assert_same(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", [{}, {"need_weights": False}])
def test_dropout_falls_on_the_same_entries(weights):
    model = attention(dropout=0.5, batch_first=True)
    given = inputs(batch_first=True)
    torch.manual_seed(1)
    expected = model["attention"](*given, **weights)
    factorized(model)
    torch.manual_seed(1)
    assert_same(model["attention"](*given, **weights), expected, atol=1e-5, rtol=1e-4)
    torch.manual_seed(2)
    assert not torch.allclose(model["attention"](*given, **weights)[0], expected[0])


def test_gradients_are_those_of_the_dense_weights():
    model = attention(dtype=torch.float64).double()
    given = [one.double() for one in inputs()]
    dense = copy.deepcopy(model["attention"])
    split = factorized(model)["attention"]
    for module in (dense, split):
        module(*given, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(split.in_proj_bias.grad, dense.in_proj_bias.grad)
    torch.testing.assert_close(split.out_proj.bias.grad, dense.out_proj.bias.grad)
    wanted = [*dense.in_proj_weight.grad.chunk(3), dense.out_proj.weight.grad]
    for layer, gradient in zip(split.projections().values(), wanted, strict=True):
        first, second = layer.factors
        torch.testing.assert_close(layer.core.grad, first.T @ gradient @ second)


def test_biases_stay_and_the_report_names_the_projections():
    model = attention(add_bias_kv=True)
    kept = {name: one for name, one in model.named_parameters() if "weight" not in name}
    report = tdlrt.factorize_(model, rank=3)
    assert [row.name for row in report.factorized] == [f"attention.{one}" for one in PROJECTIONS]
    now = dict(model.named_parameters())
    assert all(now[name] is one for name, one in kept.items())
    (other,) = report.skipped
    assert (other.name, other.note) == ("attention", "added to keys and values, one vector each")


def test_what_is_not_named_stays_dense():
    model = attention()
    before = model["attention"].in_proj_weight.detach().clone()
    report = tdlrt.factorize_(model, rank=3, include=["*.q_proj", "*.out_proj"])
    split = model["attention"]
    kinds = [type(one) for one in split.projections().values()]
    assert kinds == [TuckerLinear, nn.Linear, nn.Linear, TuckerLinear]
    assert torch.equal(split.k_proj.weight, before[E : 2 * E])
    assert {row.name: row.note for row in report.skipped} == {
        "attention.k_proj": "not included",
        "attention.v_proj": "not included",
    }
    storages = [one.weight.untyped_storage() for one in (split.k_proj, split.v_proj)]
    assert all(one.nbytes() == 4 * E * E for one in storages)


@pytest.mark.parametrize("options", [{"exclude": "*_proj"}, {"dry_run": True}])
def test_attention_stays_torch_s_own_if_nothing_in_it_is_factorised(options):
    model = nn.Sequential(nn.Linear(30, 30), attention(), nn.Linear(30, 3))
    before = dict(model.named_modules())
    tdlrt.factorize_(model, rank=3, **options)
    after = dict(model.named_modules())
    assert all(after[name] is one for name, one in before.items() if name.startswith("1"))


def tie(model):
    model.table = nn.Parameter(torch.zeros(1))
    model.table = model["attention"].in_proj_weight


OBSTACLES = {
    "a hook": (lambda m: m["attention"].register_forward_hook(lambda *_: None), "has hooks"),
    "a hook of a weight": (
        lambda m: m["attention"].in_proj_weight.register_hook(lambda g: None),
        "has hooks",
    ),
    "a tie": (tie, "weight tied to another parameter"),
    "an output layer of the user's": (
        lambda m: setattr(m["attention"], "out_proj", nn.Linear(E, E)),
        "its output projection is a Linear",
    ),
    "a type": (
        lambda m: (
            setattr(m["attention"], "in_proj_weight", None)
            or setattr(
                m["attention"],
                "in_proj_weight",
                nn.Parameter(torch.zeros(3 * E, E, dtype=torch.complex64)),
            )
        ),
        "weight of type complex64",
    ),
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_attention_that_cannot_be_split_says_why(change, reason):
    model = attention()
    model["layer"] = nn.Linear(30, 30)
    model["head"] = nn.Linear(30, 3)
    change(model)
    report = tdlrt.factorize_(model, rank=3)
    notes = {row.name: row.note for row in report.skipped}
    assert notes["attention"].startswith(f"projections packed in one parameter; {reason}")
    assert type(model["attention"]) is nn.MultiheadAttention


def test_a_model_that_is_attention_cannot_be_replaced_in_place():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="got a single MultiheadAttention"):
        tdlrt.factorize_(nn.MultiheadAttention(E, H))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_to_dense_gives_torch_s_attention_with_equal_weights(options):
    model = attention(**options).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factorized(model)
    dense = tdlrt.to_dense(model)
    assert type(dense["attention"]) is nn.MultiheadAttention
    assert dense.state_dict().keys() == before.keys()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)
    given = inputs(options.get("batch_first"), True, options.get("kdim"), options.get("vdim"))
    assert_same(dense["attention"](*given), model["attention"](*given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("include", ["*_proj", "*.q_proj", "*.out_proj"])
@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 9, "batch_first": True}])
def test_to_plain_has_no_more_parameters_and_no_class_of_ours(options, include):
    model = attention(**options).eval()
    factorized(model, rank=2, include=include)
    plain = tdlrt.to_plain(model)
    assert not any("tdlrt" in type(one).__module__ for one in plain.modules())
    assert isinstance(plain["attention"], nn.MultiheadAttention)
    count = [sum(one.numel() for one in m.parameters()) for m in (plain, model)]
    assert count[0] <= count[1]
    given = inputs(options.get("batch_first"), True, options.get("kdim"), options.get("vdim"))
    for other in (plain, copy.deepcopy(plain)):
        assert_same(other["attention"](*given), model["attention"](*given), atol=1e-5, rtol=1e-4)


def test_to_plain_for_speed_is_torch_s_dense_attention():
    model = attention(batch_first=True).eval()
    factorized(model, rank=10)
    plain = tdlrt.to_plain(model, prefer="speed", example_inputs=None)
    given = inputs(batch_first=True)
    assert_same(plain["attention"](*given), model["attention"](*given), atol=1e-5, rtol=1e-4)


def test_a_product_of_three_matrices():
    model = attention().eval()
    factorized(model, rank=3)
    for layer in model["attention"].projections().values():
        layer.path = "three_stage"
    plain = tdlrt.to_plain(model)
    sizes = inner_sizes(plain["attention"])
    assert sizes == {name: [3, 3] for name in ("q", "k", "v", "out")}
    assert_same(plain["attention"](*inputs()), model["attention"](*inputs()), atol=1e-5, rtol=1e-4)


def test_what_is_frozen_stays_frozen():
    model = attention()
    model["attention"].in_proj_weight.requires_grad_(False)
    factorized(model, rank=3, include="*")
    split = model["attention"]
    assert not split.q_proj.core.requires_grad
    assert split.out_proj.core.requires_grad
    for convert in (tdlrt.to_plain, tdlrt.to_dense):
        frozen = [n for n, p in convert(model).named_parameters() if not p.requires_grad]
        assert len(frozen) == (6 if convert is tdlrt.to_plain else 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_save_and_load(tmp_path, options):
    model = attention(**options).eval()
    factorized(model, rank=3, include=["*.q_proj", "*.v_proj"])
    tdlrt.save(model, tmp_path / "model.safetensors")
    dense = attention(**options).eval()
    bias = dense["attention"].in_proj_bias
    other = factorized(attention(**options).eval(), rank=2, include=["*.q_proj", "*.v_proj"])
    for fresh in (dense, other):
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        tdlrt.load(tmp_path / "model.safetensors", fresh)
        given = inputs(options.get("batch_first"), True, options.get("kdim"), options.get("vdim"))
        assert_same(fresh["attention"](*given), model["attention"](*given), atol=0, rtol=0)
    assert dense["attention"].in_proj_bias is bias


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    model = factorized(attention(), rank=3)
    tdlrt.save(model, tmp_path / "model.safetensors")
    other = attention(kdim=7)
    before = other["attention"]
    with pytest.raises(tdlrt.CheckpointError, match="k_proj"):
        tdlrt.load(tmp_path / "model.safetensors", other)
    assert other["attention"] is before


def test_the_state_of_torch_s_attention_is_refused_with_a_reason():
    state = attention().state_dict()
    model = factorized(attention(), rank=3)
    with pytest.raises(tdlrt.StateDictError, match="in_proj_weight: got the projections of"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"is_causal": True}, ValueError, "attn_mask: got None with is_causal=True"),
        ({"attn_mask": torch.zeros(L, L)}, ValueError, r"attn_mask: got shape \(3, 3\), exp.*5"),
        ({"key_padding_mask": torch.zeros(N, L)}, ValueError, "key_padding_mask: got shape"),
        ({"attn_mask": torch.zeros(L, S, dtype=int)}, TypeError, "attn_mask: got a mask of type"),
    ],
)
def test_bad_masks(masks, error, message):
    with pytest.raises(error, match=message):
        factorized(attention())["attention"](*inputs(), **masks)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, k, v: (q[..., 1:], k, v), r"query: got shape .* size embed_dim=12"),
        (lambda q, k, v: (q, v, v), r"key: got shape \(\d, \d, 9\), expected 3 .* size kdim=7"),
        (lambda q, k, v: (q, k, k), r"value: got shape \(\d, \d, 7\), expected 3 .* vdim=9"),
        (lambda q, k, v: (q[0], k, v), "key: got shape .* expected 2 dimensions"),
        (lambda q, k, v: (q[None], k, v), "query: got shape .* expected 3 dimensions"),
    ],
)
def test_inputs_of_other_widths(spoil, message, batch_first):
    model = factorized(attention(kdim=7, vdim=9, batch_first=batch_first))
    given = inputs(batch_first, kdim=7, vdim=9)
    with pytest.raises(ValueError, match=message):
        model["attention"](*spoil(*given))


def test_inputs_of_other_batches_and_lengths():
    model = factorized(attention(batch_first=True))["attention"]
    query, key, value = inputs(batch_first=True)
    with pytest.raises(ValueError, match=r"key: got shape \(1, 5, 12\), expected the batch of"):
        model(query, key[:1], value[:1])
    with pytest.raises(ValueError, match=r"value: got shape \(2, 4, 12\), expected as many pos"):
        model(query, key, value[:, 1:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_are_merged_and_removed(options):
    given = inputs(options.get("batch_first"), True, options.get("kdim"), options.get("vdim"))
    model = attention(**options).eval()
    before = copy.deepcopy(model.state_dict())
    expected = model["attention"](*given)
    report = tdlrt.add_adapters_(model, rank=2, exclude="*.k_proj")
    assert [row.name for row in report.factorized] == [
        f"attention.{name}" for name in PROJECTIONS if name != "k_proj"
    ]
    assert_same(model["attention"](*given), expected, atol=1e-5, rtol=1e-4)
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(trained) == 9
    assert all(".update." in name for name in trained)
    removed = copy.deepcopy(model)
    tdlrt.unload_adapters_(removed)
    assert type(removed["attention"]) is nn.MultiheadAttention
    assert removed.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in removed.state_dict().items())
    for name, one in model.named_parameters():
        if name.endswith("update.core"):
            nn.init.normal_(one)
    changed = model["attention"](*given)
    assert not torch.allclose(changed[0], expected[0], atol=1e-2)
    plain = tdlrt.to_plain(model)
    tdlrt.merge_adapters_(model)
    for one in (model, plain):
        assert type(one["attention"]) is nn.MultiheadAttention
        assert not any(parameter.requires_grad for parameter in one.parameters())
        assert_same(one["attention"](*given), changed, atol=1e-4, rtol=1e-4)


def test_attention_that_is_trained_in_full_gets_no_adapter():
    model = attention()
    model["layer"], model["head"] = nn.Linear(30, 30), nn.Linear(30, 3)
    report = tdlrt.add_adapters_(model, rank=2, train="attention")
    assert {row.name: row.note for row in report.skipped}["attention"] == "trained in full"
    assert type(model["attention"].trained) is nn.MultiheadAttention


def test_packed_is_the_inverse_of_splitting():
    for options in OPTIONS.values():
        dense = attention(**options)["attention"]
        again = packed(SplitAttention(dense))
        assert all(torch.equal(again.state_dict()[k], v) for k, v in dense.state_dict().items())
        assert again.state_dict().keys() == dense.state_dict().keys()
