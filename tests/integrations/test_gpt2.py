"""GPT-2 of transformers, whose layers (Conv1D) store their weights as inputs x outputs."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tdlrt
from tdlrt.export import export, load_network, load_plain
from tdlrt.nn import TuckerLinear, TuckerTransposedLinear

CONFIG = GPT2Config(
    vocab_size=40,
    n_positions=16,
    n_embd=24,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    # Without a cache the outputs are tensors alone, which can be traced.
    use_cache=False,
)
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG).eval()


def tokens(batch=2):
    return torch.randint(40, (batch, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


class Logits(nn.Module):
    """One tensor in, one tensor out, as `export` needs it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


def test_its_layers_are_factorised_at_full_rank_without_a_change():
    model = gpt2()
    expected = logits(model)
    biases = {name: one for name, one in model.named_parameters() if name.endswith("bias")}
    report = tdlrt.factorize_(model, rank="full")
    names = [f"transformer.h.{block}.{layer}" for block in range(2) for layer in LAYERS]
    assert [row.name for row in report.factorized] == names
    assert {row.kind for row in report.factorized} == {"Conv1D"}
    assert report.factorized[0].shape == (72, 24)
    assert {row.name: row.note for row in report.skipped} == {
        "lm_head": "output head",
        "transformer.wte": "embedding, a table of rows",
        "transformer.wpe": "embedding, a table of rows",
    }
    assert all(dict(model.named_parameters())[name] is one for name, one in biases.items())
    assert torch.allclose(logits(model), expected, atol=1e-5)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (24, 72)
    assert torch.allclose(layer.weight, layer.dense_weight().T)
    with pytest.raises(tdlrt.UnsupportedLayerError, match="weight: got a write"):
        nn.init.normal_(layer.weight)


def test_the_dense_network_has_its_layers_back():
    model, before = gpt2(), gpt2()
    tdlrt.factorize_(model, rank="full")
    dense = tdlrt.to_dense(model)
    assert type(dense.transformer.h[0].mlp.c_fc) is Conv1D
    assert dense.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.allclose(dense.state_dict()[name], value, atol=1e-5)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    before.load_state_dict(dense.state_dict())
    assert torch.equal(logits(before), logits(dense))


def test_the_plain_network_has_linear_layers():
    model = gpt2()
    tdlrt.factorize_(model, rank=3)
    plain = tdlrt.to_plain(model, example_inputs=tokens())
    layer = plain.transformer.h[1].mlp.c_proj
    assert [type(stage) for stage in layer] == [nn.Linear, nn.Linear]
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    assert plain.num_parameters() <= model.num_parameters()


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_it_learns_and_generates(integrator):
    model = gpt2().train()
    tdlrt.factorize_(model, rank=0.5)
    optimizer = tdlrt.TDLRT(model, torch.optim.AdamW, lr=1e-2, tau=0.2, integrator=integrator)
    ids = torch.arange(10).repeat(2, 1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    for _ in range(25):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.2 * losses[0]
    for layer in model.modules():
        if isinstance(layer, TuckerTransposedLinear):
            layer.check_invariants()
    ranks = tdlrt.summary(model).ranks.values()
    assert any(rank != (12, 12) for rank in ranks)
    model.eval()
    said = [
        one.generate(ids[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
        for one in (model, tdlrt.to_plain(model), tdlrt.to_dense(model))
    ]
    assert said[0].tolist() == said[1].tolist() == said[2].tolist()
    assert said[0][0, 4:8].tolist() == [4, 5, 6, 7]


def test_save_and_load(tmp_path):
    model = gpt2()
    tdlrt.factorize_(model, rank=3, exclude="*.1.*")
    tdlrt.save(model, tmp_path / "model.safetensors")
    dense, other = gpt2(), gpt2()
    tdlrt.factorize_(other, rank=5, exclude="*.1.*")
    for fresh in (dense, other):
        nn.init.zeros_(fresh.transformer.wte.weight)
        tdlrt.load(tmp_path / "model.safetensors", fresh)
        assert torch.equal(logits(fresh), logits(model))
        assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert type(dense.transformer.h[0].attn.c_attn) is TuckerTransposedLinear
    assert type(tdlrt.to_dense(dense).transformer.h[0].attn.c_attn) is Conv1D
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(copy.deepcopy(other)), logits(model))


def test_the_weight_starts_anew_as_that_of_the_class():
    model = gpt2()
    tdlrt.factorize_(model, rank="full")
    layer = model.transformer.h[0].mlp.c_fc
    before = layer.weight.clone()
    core = layer.core
    layer.reset_parameters()
    assert not torch.allclose(layer.weight, before)
    assert layer.core is core
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.bias.any()


def test_adapters():
    model = gpt2()
    expected = logits(model)
    report = tdlrt.add_adapters_(model, rank=30)
    assert len(report.factorized) == 8
    assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        if name.endswith("update.core"):
            nn.init.normal_(parameter, std=0.1)
    changed = logits(model)
    assert not torch.allclose(changed, expected, atol=1e-3)
    adapter = model.transformer.h[0].attn.c_attn
    assert adapter.weight.shape == (24, 72)
    for merged in (tdlrt.to_plain(model), tdlrt.to_dense(model)):
        assert torch.allclose(logits(merged), changed, atol=1e-4)
    tdlrt.merge_adapters_(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.allclose(logits(model), changed, atol=1e-4)


def test_queries_keys_and_values_as_a_mode_of_their_own(tmp_path):
    model = gpt2()
    expected = logits(model)
    modes = {"*.c_attn": ((3, 24), (24,))}
    report = tdlrt.factorize_(model, rank="full", reshape=modes)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.shape == (3, 24, 24)
    assert report.factorized[0].shape == (3, 24, 24)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    layer.resize_(
        layer.core[:, :6, :8].clone(),
        [layer.factors[0]] + [layer.factors[i][:, :rank].clone() for i, rank in ((1, 6), (2, 8))],
    )
    for converted in (tdlrt.to_plain(model, example_inputs=tokens()), tdlrt.to_dense(model)):
        assert torch.allclose(logits(converted), logits(model), atol=1e-5)
    tdlrt.save(model, tmp_path / "model.safetensors")
    fresh = gpt2()
    tdlrt.load(tmp_path / "model.safetensors", fresh)
    assert torch.equal(logits(fresh), logits(model))
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, tau=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    layer.check_invariants()


def test_covariances_of_its_inputs():
    model = gpt2()
    found = tdlrt.input_covariances(model, [{"input_ids": tokens()}])
    assert found["transformer.h.0.mlp.c_proj"].shape == (96, 96)
    expected = logits(model)
    tdlrt.factorize_(model, rank=tdlrt.RelativeTolerance(1e-3), covariances=found)
    assert torch.allclose(logits(model), expected, atol=1e-2)


def test_the_summary_counts_its_layers():
    dense = tdlrt.summary(gpt2(), example_inputs=tokens())
    by_name = {row.name: row for row in dense.rows}
    row = by_name["transformer.h.0.attn.c_attn"]
    assert (row.shape, row.parameters, row.macs) == ((72, 24), 72 * 24, 2 * 9 * 72 * 24)
    model = gpt2()
    tdlrt.factorize_(model, rank=3)
    for layer in model.modules():
        if isinstance(layer, TuckerTransposedLinear):
            layer.path = "three_stage"
    small = tdlrt.summary(model, example_inputs={"input_ids": tokens()})
    assert small.dense_macs == dense.macs > small.macs
    assert small.network_parameters == model.num_parameters()
    assert small.network_dense_parameters == gpt2().num_parameters()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("format", ["plain", "pt2", "onnx"])
def test_export(tmp_path, format):
    model = Logits(gpt2())
    tdlrt.factorize_(model, rank=3)
    path = tmp_path / f"model.{format}"
    report = export(model, path, tokens(), format=format)
    assert report.parity < 1e-5
    with torch.no_grad():
        got = load_network(path, format, Logits(gpt2()))(tokens(3))
        assert torch.allclose(got, model(tokens(3)), atol=1e-5)
    if format == "plain":
        plain = load_plain(path, Logits(gpt2()))
        assert plain.model.lm_head.weight is plain.model.transformer.wte.weight


def test_a_class_of_the_same_name_elsewhere_is_another_class():
    class Conv1D(nn.Linear):
        """Not of transformers."""

    model = nn.Sequential(Conv1D(30, 30), nn.Linear(30, 30), nn.Linear(30, 3))
    assert tdlrt.factorize_(model).skipped[0].note == "Conv1D is not a plain torch layer"
    assert isinstance(model[1], TuckerLinear)
