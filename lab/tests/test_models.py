import sys

import pytest
import torch
from torch import nn

from tdlrt.errors import DataError, MissingExtraError, UnknownNameError
from tdlrt.nn.models import tucker_layers
from tdlrt.surgery import factorize_
from tdlrt_lab.models import IMAGE_MODELS, build_model

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 36)]


OWN = [name for name in IMAGE_MODELS if not name.startswith("hf:")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_logits_and_gradients_on_every_image_size(name, shape):
    model = build_model(name, shape, classes=7)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Counted by hand; 431,080, 11,173,962 and, with a bias less per convolution, 14,724,042 are the
# figures the literature gives for these networks.
@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("lenet5", (1, 28, 28), 431_080),
        ("lenet5", (1, 8, 8), 131_080),
        ("rescnn", (3, 32, 32), 1_228_970),
        ("vgg16", (3, 32, 32), 14_724_042),
        ("alexnet", (3, 32, 32), 23_272_266),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet18", (3, 64, 64), 11_173_962),
        ("resnet18_imagenet", (3, 64, 64), 11_181_642),
        ("resnet18_imagenet", (3, 224, 224), 11_181_642),
    ],
)
def test_number_of_parameters(name, shape, parameters):
    assert sum(p.numel() for p in build_model(name, shape, 10).parameters()) == parameters


@pytest.mark.parametrize(("size", "last"), [(8, 2), (28, 2), (32, 2), (64, 4)])
def test_last_convolutions_of_vgg16_see_more_than_one_pixel(size, last):
    model = build_model("vgg16", (3, size, size), 10)
    seen = []
    model.conv5_3.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    model.eval()(torch.zeros(1, 3, size, size))
    assert seen == [last]


def test_same_seed_same_network():
    one, two = (_seeded("rescnn") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _seeded(name):
    torch.manual_seed(0)
    return list(build_model(name, (1, 8, 8), 10).parameters())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'resnet'; did you mean .*resnet18.* Known: "):
        build_model("resnet", (3, 32, 32), 10)
    with pytest.raises(UnknownNameError, match=r"unknown model 'qq'\. Known: lenet5, rescnn"):
        build_model("qq", (3, 32, 32), 10)


def test_too_small_images_are_refused():
    with pytest.raises(DataError, match=r"\(1, 3, 8\): vgg16 needs images of at least 4x4"):
        build_model("vgg16", (1, 3, 8), 10)


def test_head_is_the_last_layer():
    for name in OWN:
        head = list(build_model(name, (1, 8, 8), 10).modules())[-1]
        assert isinstance(head, nn.Linear)
        assert head.out_features == 10


@pytest.mark.parametrize(("name", "maps"), [("resnet18", 8), ("resnet18_imagenet", 2)])
def test_last_maps_of_the_two_forms_of_resnet18(name, maps):
    """The CIFAR form halves three times, the ImageNet form five times."""
    model = build_model(name, (3, 64, 64), 10).eval()
    seen = []
    model.block4_2.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    model(torch.zeros(1, 3, 64, 64))
    assert seen == [maps]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("name", ["hf:resnet", "hf:convnext", "hf:vit"])
def test_classifiers_of_transformers_train_in_tucker_format(name, shape):
    pytest.importorskip("transformers")
    model = build_model(name, shape, classes=7)
    report = factorize_(model, rank=0.5)
    assert len(report.factorized) > 5
    assert "output head" in [row.note for row in report.skipped if row.shape[0] == 7]
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(layer.core.grad.isfinite().all() for layer in tucker_layers(model).values())


def test_missing_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"hf:vit' .*transformers, .*pip install 'tdlrt\[hf\]'"
    ):
        build_model("hf:vit", (3, 32, 32), 10)
