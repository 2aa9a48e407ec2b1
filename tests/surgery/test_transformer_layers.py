"""torch's transformer layers, whose fused operation in evaluation reads weights by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tdlrt
from tdlrt.export import export, load_network
from tdlrt.nn import SplitAttention, TuckerLayer

WIDTH, TOKENS = 16, 5


class Encoder(nn.Module):
    """A transformer encoder with a mask for padding and a head."""

    def __init__(self, norm_first=False, activation="relu", bias=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            *(WIDTH, 2, 32, 0.0, activation),
            batch_first=True,
            norm_first=norm_first,
            bias=bias,
        )
        self.embedding = nn.Embedding(11, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and bias)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids, mask=None):
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=mask).mean(1))


def encoder(**options):
    torch.manual_seed(0)
    return Encoder(**options)


def tokens(batch=2):
    return torch.randint(11, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def mask():
    return torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


OPTIONS = {
    "post": {},
    "pre": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "no bias": {"bias": False},
    "own activation": {"activation": F.silu},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("include", [None, "*self_attn*", "*.linear?", "*.1.self_attn.k_proj"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_modes_agree(options, include):
    model = encoder(**options)
    dense = copy.deepcopy(model)
    tdlrt.factorize_(model, rank="full", include=include)
    small = encoder(**options)
    tdlrt.factorize_(small, rank=3, include=include)
    networks = [(model, dense), (tdlrt.to_dense(model), dense)]
    networks += [(tdlrt.to_plain(small), small), (tdlrt.to_dense(small), small)]
    networks += [(copy.deepcopy(tdlrt.to_plain(small)), small)]
    for one, other in networks:
        for training in (True, False):
            for grad in (True, False):
                for padding in (None, mask()):
                    with torch.set_grad_enabled(grad):
                        got = one.train(training)(tokens(), padding)
                        expected = other.train(training)(tokens(), padding)
                    # torch's fused operation leaves padding at 0, so the means differ there
                    rows = slice(None) if padding is None else slice(0, 1)
                    torch.testing.assert_close(got[rows], expected[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_a_transformer_learns_in_tucker_format(integrator):
    model = encoder()
    report = tdlrt.factorize_(model, rank=0.5)
    assert len(report.factorized) == 12
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=1e-2, tau=0.1, integrator=integrator)
    labels = torch.arange(8) % 3
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens(8)), labels)
        loss.backward()
        return loss

    for _ in range(25):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.3 * losses[0]
    layers = [module for module in model.modules() if isinstance(module, TuckerLayer)]
    for layer in layers:
        layer.check_invariants()
    assert len({layer.ranks for layer in layers}) > 1
    state = optimizer.state_dict()
    other = encoder()
    tdlrt.factorize_(other, rank=2)
    other.load_state_dict(model.state_dict())
    again = tdlrt.TDLRT(other, torch.optim.Adam, lr=1e-2, tau=0.1, integrator=integrator)
    again.load_state_dict(state)
    for one in (model, other):
        one.eval()
    assert torch.equal(model(tokens()), other(tokens()))


def test_a_whole_transformer_with_causal_masks():
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 1, 32, 0.0, batch_first=True)
    dense = copy.deepcopy(model)
    report = tdlrt.factorize_(model, rank="full", include="*")
    assert [name for name in dict(model.named_modules()) if name.endswith("attn.q_proj")] == [
        "encoder.layers.0.self_attn.q_proj",
        "decoder.layers.0.self_attn.q_proj",
        "decoder.layers.0.multihead_attn.q_proj",
    ]
    assert len(report.factorized) == 16
    source, target = torch.randn(2, 4, WIDTH), torch.randn(2, 3, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    for training in (True, False):
        for hint in (True, None):
            got, expected = (
                one.train(training)(source, target, tgt_mask=causal, tgt_is_causal=hint)
                for one in (model, dense)
            )
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def resized(model):
    """The same network at other ranks."""
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, tau=0.5)
    before = tdlrt.summary(model).ranks
    model(tokens()).square().sum().backward()
    optimizer.step()
    assert tdlrt.summary(model).ranks != before
    return model


def test_a_trace_by_fx_follows_changes_of_ranks():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2), "out": nn.Linear(12, 12)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            y, _ = self.parts["attention"](x, x, x, need_weights=False)
            return self.parts["out"](y + x)

    net = Net()
    dense = torch.fx.symbolic_trace(net)
    tdlrt.factorize_(net, rank=5, include="*")
    trace = torch.fx.symbolic_trace(net)
    trace.graph.lint()
    calls = [[node.target for node in one.graph.nodes] for one in (dense, trace)]
    assert calls[0] == calls[1]
    x = torch.randn(4, 2, 12)
    assert torch.equal(trace(x), net(x))
    optimizer = tdlrt.TDLRT(net, torch.optim.SGD, lr=0.1, tau=0.5)
    trace(x).square().sum().backward()
    optimizer.step()
    assert net.parts["attention"].q_proj.ranks != (5, 5)
    assert torch.equal(trace(x), net(x))
    with pytest.raises(tdlrt.UnsupportedLayerError, match="Proxy inside a SplitAttention"):
        torch.fx.symbolic_trace(net.parts["attention"])


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_before_and_after_a_change_of_ranks(strict):
    model = encoder(norm_first=True)
    tdlrt.factorize_(model, rank=4)
    shapes = ({0: torch.export.Dim("batch")},)
    for change in (False, True):
        if change:
            resized(model)
        model.eval()
        program = torch.export.export(model, (tokens(),), dynamic_shapes=shapes, strict=strict)
        assert set(program.state_dict) == set(model.state_dict())
        got = program.module()(tokens(3))
        torch.testing.assert_close(got, model(tokens(3)), atol=1e-5, rtol=1e-4)


def test_compile_of_a_model_with_attention():
    model = encoder(norm_first=True)
    tdlrt.factorize_(model, rank=4)
    for training in (True, False):
        torch.compiler.reset()
        compiled = torch.compile(model.train(training), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens()), model(tokens()), atol=1e-5, rtol=1e-4)
        compiled(tokens()).sum().backward()
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prefer", ["size", "speed"])
@pytest.mark.parametrize("format", ["plain", "pt2", "onnx"])
def test_export(tmp_path, format, prefer):
    model = encoder(norm_first=True)
    tdlrt.factorize_(model, rank=3)
    path = tmp_path / "network"
    report = export(model, path, tokens(), format=format, prefer=prefer)
    assert report.parity < 1e-5
    if prefer == "size":
        assert report.parameters <= report.model_parameters
    network = load_network(path, format, encoder(norm_first=True).eval())
    with torch.no_grad():
        got, expected = network(tokens(3)), model.eval()(tokens(3))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    if format == "plain":
        assert not any("tdlrt" in type(one).__module__ for one in network.modules())


def test_a_graph_holds_projections_as_two_factors(tmp_path):
    model = encoder(norm_first=True).eval()
    tdlrt.factorize_(model, rank=3)
    export(model, tmp_path / "network.pt2", tokens(), format="pt2")
    weights = torch.export.load(tmp_path / "network.pt2").state_dict
    assert weights["encoder.layers.0.self_attn.q_proj.0.weight"].shape == (3, WIDTH)


def test_the_summary_counts_attention():
    model = encoder(norm_first=True)
    dense = tdlrt.summary(model, example_inputs=tokens())
    products = 2 * 2 * 2 * TOKENS * TOKENS * WIDTH  # layers, sequences, QK^T and AV
    packed = 2 * 2 * TOKENS * 4 * WIDTH * WIDTH  # W_q, W_k, W_v and W_o outside of any layer
    assert dense.macs_outside == products + packed
    tdlrt.factorize_(model, rank=3)
    small = tdlrt.summary(model, example_inputs=tokens())
    assert small.macs_outside == products
    assert small.dense_macs == dense.macs == dense.dense_macs
    assert f"outside of layers, as in attention: {products:,}" in str(small)
    assert tdlrt.summary(model).macs_outside is None
    compiled = torch.compile(model, backend="eager")
    assert tdlrt.summary(compiled, example_inputs=tokens()).macs == small.macs


def test_recurrent_layers_are_said_not_to_be_counted():
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 8), "cell": nn.GRUCell(8, 8)})
    model.forward = lambda x: model["cell"](model["lstm"](x)[0][0])
    report = tdlrt.summary(model, (4, 2, 6))
    assert report.macs == 0
    assert str(report).endswith("not in the MACs: lstm, cell")


def test_user_code_that_looks_at_the_weights_of_attention():
    model = encoder()
    tdlrt.factorize_(model, rank=3)
    attention = model.encoder.layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    assert isinstance(attention, SplitAttention)
    assert attention.in_proj_weight is None
    assert attention.q_proj_weight.shape == (WIDTH, WIDTH)
    with pytest.raises(tdlrt.UnsupportedLayerError, match="weight: got a write"):
        attention._reset_parameters()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("back", ["to_dense", "unload"])
def test_torchs_fused_encoder_is_used_again_once_all_is_dense(back, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, 5, 16), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padded)
        model = copy.deepcopy(encoder)
        if back == "to_dense":
            tdlrt.factorize_(model, rank="full", include="*")
            model = tdlrt.to_dense(model)
        else:
            tdlrt.add_adapters_(model, rank=2)
            tdlrt.unload_adapters_(model)
        actual = model(x, src_key_padding_mask=padded)
    assert (expected[padded] == 0).all()  # as the fused operation alone leaves them
    torch.testing.assert_close(actual, expected)


def test_an_encoder_that_torch_does_not_fuse_stays_so():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=nn.Tanh())
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tdlrt.factorize_(encoder, rank="full", include="*")
    dense = tdlrt.to_dense(encoder)
    assert not dense.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 0 for layer in dense.layers)
