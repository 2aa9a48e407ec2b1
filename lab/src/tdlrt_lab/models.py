"""The networks of the experiments, for any shape of an example and number of classes."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from tdlrt.errors import DataError
from tdlrt.extras import needs_extra
from tdlrt_lab.gpt import GPT
from tdlrt_lab.names import pick

__all__ = ["IMAGE_MODELS", "MODELS", "build_model", "reads_text"]

ImageShape = tuple[int, int, int]


def build_model(name: str, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Build the network `name` with torch's default initialisation.

    Args:
        name: One of `MODELS`.
        input_shape: Channels, height and width of the images, in pixels; or (context,), the
            characters of a window of text.
        classes: Number of classes, the number of outputs.

    Returns:
        A dense network from images (N, channels, height, width) to logits (N, classes), or from
        text (N, context) to logits (N, classes, context).

    Raises:
        UnknownNameError: `name` is not in `MODELS`.
        DataError: The images are too small for the network, or it takes text and not images, or the
            other way round.

    >>> build_model("lenet5", (1, 8, 8), classes=10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    build: Callable[..., nn.Module] = pick("model", name, MODELS)
    if reads_text(name) != (len(input_shape) == 1):
        expected = "(context,) for text" if reads_text(name) else "(channels, height, width)"
        raise DataError(f"input_shape {input_shape}: {name} expects {expected}; choose another one")
    if not reads_text(name) and min(input_shape[1:]) < 4:
        raise DataError(
            f"input_shape {input_shape}: {name} needs images of at least 4x4 pixels; "
            "enlarge the images"
        )
    return build(input_shape, classes)


def reads_text(name: str) -> bool:
    """Whether the network `name` takes text and not images."""
    return name in TEXT_MODELS


def _lenet5(image_shape: ImageShape, classes: int) -> nn.Module:
    """LeNet-5 with 20 and 50 filters; padded for images under 28 pixels."""
    channels, *size = image_shape
    padding = 0 if min(size) >= 28 else 2
    for _ in range(2):
        size = [(n + 2 * padding - 4) // 2 for n in size]
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * math.prod(size), 500),
            relu3=nn.ReLU(),
            head=nn.Linear(500, classes),
        )
    )


def _vgg16(image_shape: ImageShape, classes: int) -> nn.Module:
    """VGG16 in its CIFAR form: 13 convolutions with batch norm and a single linear head."""
    widths = (64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3
    halvings = _halvings(image_shape, smallest=1, most=5)
    channels = image_shape[0]
    net = nn.Sequential()
    for number, block in enumerate(widths, start=1):
        for index, width in enumerate(block, start=1):
            net.add_module(f"conv{number}_{index}", _conv(channels, width, 3))
            net.add_module(f"norm{number}_{index}", nn.BatchNorm2d(width))
            net.add_module(f"relu{number}_{index}", nn.ReLU())
            channels = width
        if number > 5 - halvings:
            net.add_module(f"pool{number}", nn.MaxPool2d(2, ceil_mode=True))
    _add_head(net, channels, classes)
    return net


def _alexnet(image_shape: ImageShape, classes: int) -> nn.Module:
    """AlexNet in its CIFAR form: 3x3 kernels, two hidden layers of 4096 with dropout."""
    halvings = _halvings(image_shape, smallest=2, most=4)
    net, channels = nn.Sequential(), image_shape[0]
    # Max-pools follow layers 5, 2 and 1, in this order of priority; a fourth halving is the stride
    # of the first layer.
    pools = (5, 2, 1)[:halvings]
    for number, width in enumerate((64, 192, 384, 256, 256), start=1):
        stride = 2 if number == 1 and halvings == 4 else 1
        net.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, padding=1))
        net.add_module(f"relu{number}", nn.ReLU())
        channels = width
        if number in pools:
            net.add_module(f"pool{number}", nn.MaxPool2d(2, ceil_mode=True))
    net.add_module("pool", nn.AdaptiveAvgPool2d(2))
    net.add_module("flatten", nn.Flatten())
    features = 4 * channels
    for number in (1, 2):
        net.add_module(f"dropout{number}", nn.Dropout())
        net.add_module(f"fc{number}", nn.Linear(features, 4096))
        net.add_module(f"relu{5 + number}", nn.ReLU())
        features = 4096
    net.add_module("head", nn.Linear(features, classes))
    return net


def _resnet18(image_shape: ImageShape, classes: int) -> nn.Module:
    """ResNet-18 in its CIFAR form: 3x3 stem without max-pool, two blocks per stage."""
    return _residual_network(image_shape, classes, stem=64, stages=(64, 128, 256, 512), depth=2)


def _resnet18_imagenet(image_shape: ImageShape, classes: int) -> nn.Module:
    """ResNet-18 in its ImageNet form: 7x7 stem of stride 2, then a max-pool."""
    stem: list[tuple[str, nn.Module]] = [
        ("stem", nn.Conv2d(image_shape[0], 64, 7, 2, padding=3, bias=False)),
        ("norm", nn.BatchNorm2d(64)),
        ("relu", nn.ReLU()),
        ("stem_pool", nn.MaxPool2d(3, 2, padding=1)),
    ]
    return _residual_stages(
        nn.Sequential(OrderedDict(stem)), classes, 64, (64, 128, 256, 512), depth=2, halvings=3
    )


def _rescnn(image_shape: ImageShape, classes: int) -> nn.Module:
    """Small residual network: one block each of 32, 64, 128 and 256 channels."""
    return _residual_network(image_shape, classes, stem=32, stages=(32, 64, 128, 256), depth=1)


def _residual_network(
    image_shape: ImageShape, classes: int, stem: int, stages: Sequence[int], depth: int
) -> nn.Module:
    halvings = _halvings(image_shape, smallest=4, most=len(stages) - 1)
    net = nn.Sequential(
        OrderedDict(stem=_conv(image_shape[0], stem, 3), norm=nn.BatchNorm2d(stem), relu=nn.ReLU())
    )
    return _residual_stages(net, classes, stem, stages, depth, halvings)


def _residual_stages(
    net: nn.Sequential,
    classes: int,
    channels: int,
    stages: Sequence[int],
    depth: int,
    halvings: int,
) -> nn.Module:
    """Append blocks and a head to a stem; the last `halvings` stages halve the image."""
    for number, width in enumerate(stages, start=1):
        for index in range(1, depth + 1):
            halve = index == 1 and number > len(stages) - halvings
            block = _ResidualBlock(channels, width, stride=2 if halve else 1)
            net.add_module(f"block{number}_{index}" if depth > 1 else f"block{number}", block)
            channels = width
    _add_head(net, channels, classes)
    return net


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; a 1x1 shortcut where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        changes = stride > 1 or channels != width
        self.shortcut = _conv(channels, width, 1, stride) if changes else nn.Identity()
        self.norm3 = nn.BatchNorm2d(width) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.norm3(self.shortcut(x)))


class _KeptConv2d(nn.Conv2d):
    """Stays dense, as only plain torch layers are factorised: ViT reads its weight."""


class _Logits(nn.Module):
    """Adapts a classifier of `transformers` to map images to logits."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pixel_values=images).logits
        return logits


def _hugging_face(name: str, image_shape: ImageShape, classes: int) -> nn.Module:
    """Build a small classifier of `transformers` with random weights.

    The patch size of `vit` is the largest power of two that leaves at least 8 patches per side.
    """
    channels, height, width = image_shape
    with needs_extra("hf", f"model 'hf:{name}'"):
        transformers = import_module("transformers")
    common = {"num_channels": channels, "num_labels": classes}
    small = min(height, width) < 64
    if name == "resnet":
        sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
        config = transformers.ResNetConfig(layer_type="basic", **sizes, **common)
        model = transformers.ResNetForImageClassification(config)
    elif name == "convnext":
        sizes = {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1]}
        patch = 1 if small else 4
        config = transformers.ConvNextConfig(patch_size=patch, **sizes, **common)
        model = transformers.ConvNextForImageClassification(config)
    else:
        patch = max(1, 2 ** math.floor(math.log2(min(height, width) / 8)))
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 256, "image_size": (height, width), "patch_size": patch}
        config = transformers.ViTConfig(**sizes, **common)
        model = transformers.ViTForImageClassification(config)
        model.vit.embeddings.patch_embeddings.projection.__class__ = _KeptConv2d
    return _Logits(model)


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # No bias: each of these convolutions is followed by a batch norm.
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)


def _add_head(net: nn.Sequential, channels: int, classes: int) -> None:
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(channels, classes))


def _halvings(image_shape: ImageShape, smallest: int, most: int) -> int:
    """How many times to halve an image to reach `smallest` pixels, at most `most` times.

    For small images, networks leave out their first halvings, so that the deep layers, which hold
    most of the weights, have feature maps of the usual size.
    """
    return min(most, math.ceil(math.log2(max(1, min(image_shape[1:]) / smallest))))


def _gpt(input_shape: tuple[int], classes: int) -> nn.Module:
    """GPT of 6 layers and width 256."""
    return GPT(classes, *input_shape)


IMAGE_MODELS: dict[str, Callable[[ImageShape, int], nn.Module]] = {
    "lenet5": _lenet5,
    "rescnn": _rescnn,
    "vgg16": _vgg16,
    "alexnet": _alexnet,
    "resnet18": _resnet18,
    "resnet18_imagenet": _resnet18_imagenet,
    **{f"hf:{name}": partial(_hugging_face, name) for name in ("resnet", "convnext", "vit")},
}
TEXT_MODELS: dict[str, Callable[[tuple[int], int], nn.Module]] = {"gpt": _gpt}
MODELS: dict[str, Callable[..., nn.Module]] = IMAGE_MODELS | TEXT_MODELS
