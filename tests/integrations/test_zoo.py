"""Small networks of transformers and torch: what is in their reports, and their ties."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import tdlrt

WORDS, WIDTH = 40, 24


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.head(self.hidden(self.norm(self.lstm(self.embedding(ids))[0][:, -1])))


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 48, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.transformer(x, x))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2))


def bert():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
        )
    )


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=3,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=12, d_ff=48, num_layers=1, num_heads=2)
    )


IDS = torch.randint(WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
ZOO = {
    "GPT-2": (gpt2, {"input_ids": IDS}),
    "BERT": (bert, {"input_ids": IDS}),
    "Llama": (llama, {"input_ids": IDS}),
    "ViT": (vit, {"pixel_values": torch.ones(2, 3, 8, 8)}),
    "T5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "torch's Transformer": (Torch, IDS),
    "LSTM": (Classifier, IDS),
}
TIED = ("GPT-2", "BERT", "Llama", "T5", "torch's Transformer")
# These networks read the weight of a layer, which as plain layers has two.
READ = {"ViT": "*.projection", "T5": "*.wo"}
ALL = pytest.mark.parametrize("name", ZOO)


def made(name):
    torch.manual_seed(0)
    return ZOO[name][0]().eval()


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def ties(model):
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


@ALL
def test_every_parameter_is_in_the_report(name):
    model, inputs = made(name), ZOO[name][1]
    dense_size = sum(parameter.numel() for parameter in model.parameters())
    report = tdlrt.factorize_(model, rank=3, exclude=READ.get(name))
    assert len(report.factorized) >= 1
    assert all(row.note for row in (*report.skipped, *report.vectors))
    rows = {row.name: row for row in (*report.rows, *report.vectors)}
    for path, module in model.named_modules():
        own = [one for one in module._parameters.values() if one is not None]
        if own and not path.endswith(".factors"):
            assert (path or "(model)") in rows
    summary = tdlrt.summary(model, example_inputs=inputs)
    assert summary.network_parameters == sum(one.numel() for one in model.parameters())
    assert summary.network_dense_parameters == dense_size
    matrices = {one for one in model.parameters() if one.ndim > 1}
    assert summary.vector_parameters == summary.network_parameters - sum(
        one.numel() for one in matrices
    )
    assert summary.macs_outside > 0 or name == "LSTM"
    assert summary.dense_macs == tdlrt.summary(made(name), example_inputs=inputs).macs


@ALL
def test_the_same_outputs_in_every_form(name, tmp_path):
    model, inputs = made(name), ZOO[name][1]
    dense = output(model, inputs)
    full = copy.deepcopy(model)
    tdlrt.factorize_(full, rank="full")
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(output(full, inputs), dense, **tolerance)
    before = ties(model)
    assert bool(before) == (name in TIED)
    tdlrt.factorize_(model, rank=3, exclude=READ.get(name))
    expected = output(model, inputs)
    tdlrt.save(model, tmp_path / "model.safetensors")
    loaded = made(name)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    tdlrt.load(tmp_path / "model.safetensors", loaded)
    plain = tdlrt.to_plain(model, example_inputs=inputs)
    for other in (plain, tdlrt.to_dense(model), loaded, copy.deepcopy(model)):
        torch.testing.assert_close(output(other, inputs), expected, **tolerance)
        assert ties(other) == before
    assert not any(type(one).__module__.startswith("tdlrt") for one in plain.modules())
    assert sum(p.numel() for p in plain.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_not_factorised_even_if_it_is_named(name):
    model = made(name)
    (first, *_) = ties(model)
    layers = [one.removesuffix(".weight") for one in first]
    include = [one for one in layers if isinstance(model.get_submodule(one), nn.Linear)]
    report = tdlrt.factorize_(model, rank=3, include=["*"])
    notes = {row.name: row.note for row in report.skipped}
    assert include
    assert all(notes[one] == "weight tied to another parameter" for one in include)
    assert ties(model)[0] == first


@ALL
def test_it_trains(name):
    model, inputs = made(name).train(), ZOO[name][1]
    tdlrt.factorize_(model, rank=0.5)
    optimizer = tdlrt.TDLRT(model, torch.optim.AdamW, lr=1e-3, tau=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
        optimizer.step()
    assert all(one.isfinite().all() for one in model.parameters())
