"""benchmarks/adapters.py: equal sizes, what is trained, what is counted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tdlrt_lab.data import ImageData

BUDGETED = ("tdlrt budget", "tdlrt fixed", "LoRA", "LoHa", "LoKr")

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of peft and what it imports


@pytest.fixture
def adapters(script, tmp_path, monkeypatch):
    module = script("adapters")
    monkeypatch.setattr(module, "RESULT", tmp_path / "adapters.json")
    return module


@pytest.fixture
def task(script):
    return script("adapter_tasks").TASKS["ViT, MNIST"]


def vit(task):
    torch.manual_seed(0)
    return task.build((1, 28, 28), 10)


@pytest.mark.parametrize("method", [*BUDGETED, "AdaLoRA"])
def test_a_method_trains_its_share_of_the_vit_and_the_head(adapters, task, method):
    model, rank = vit(task), 4
    budget = task.lora_parameters(model, rank)
    adapted = adapters.METHODS[method](task, model, budget, 1e-3, 100)
    x, y = torch.randn(8, 1, 28, 28), torch.arange(8)
    before = {name: value.clone() for name, value in adapted.model.named_parameters()}
    for step in range(3):
        adapters.take_step(adapted, x, y, step)
    if method in BUDGETED:
        assert 0.5 * budget < adapted.parameters() <= budget
    moved = {
        name
        for name, value in adapted.model.named_parameters()
        if value.shape != before[name].shape or not value.equal(before[name])
    }
    assert moved <= {
        name for name, value in adapted.model.named_parameters() if value.requires_grad
    }
    places = [name.replace("base_model.model.", "") for name in moved]
    for target in (*task.targets(vit(task)), task.head):
        assert any(place.startswith(f"{target}.") for place in places), target


def test_lora_has_the_budget_exactly(adapters, task):
    model = vit(task)
    budget = task.lora_parameters(model, 4)
    assert budget == 4 * (4 * (4 * 128 + 2 * 192) + 64 + 49)
    assert adapters.METHODS["LoRA"](task, model, budget, 1e-3, 100).parameters() == budget


def test_kept_are_weights_gradients_and_both_moments(adapters):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert adapters.kept_bytes(model.parameters(), optimizer) == 4 * 4 * (3 * 2 + 2)
    assert adapters.kept_bytes([model.bias], optimizer) == 4 * 4 * 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_of_a_fine_tuning(adapters, task):
    case = {"task": "ViT, MNIST", "rank": 4, "shape": [1, 28, 28], "classes": 10}
    measured = adapters.in_process(case | {"method": "LoRA"}, adapters.RETURNING, adapters.__file__)
    head = 64 * 10 + 10
    assert measured["kept"] == 4 * 4 * (task.lora_parameters(vit(task), 4) + head)
    # At least the inputs of the two linear layers and the activation of each MLP, for the backward.
    assert measured["peak"] > 4 * 64 * 17 * 4 * (64 + 128 + 128)


def image_data():
    def part(count):
        images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
        return images, torch.arange(count) % 10

    (images, labels), (test_images, test_labels) = part(400), part(50)
    return ImageData(
        name="mnist",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple("0123456789"),
        mean=(0.1,),
        std=(0.3,),
    )


def test_stages_share_no_image_and_the_test_has_the_new_classes_alone(script, task):
    torch.manual_seed(0)
    tasks = script("adapter_tasks")
    small = dataclasses.replace(task, images=(100, 1), tuning=(80, 1), held_out=60)
    parts = tasks.splits(small, image_data())
    assert [len(parts[name]) for name in ("first", "tune", "held out", "test")] == [100, 80, 60, 25]
    assert set(parts["first"].labels.tolist()) == set(parts["first test"].labels.tolist())
    assert set(parts["first"].labels.tolist()) == set(range(5))
    for name in ("tune", "held out", "test"):
        assert set(parts[name].labels.tolist()) == set(range(5, 10))
    seen = {image.numpy().tobytes() for image in parts["tune"].images}
    assert not any(image.numpy().tobytes() in seen for image in parts["held out"].images)


def test_runs_that_are_there_are_skipped(adapters, task, monkeypatch):
    torch.manual_seed(0)
    name = "ViT, MNIST"
    small = dataclasses.replace(task, images=(64, 1), tuning=(64, 1), held_out=50)
    monkeypatch.setitem(adapters.TASKS, name, small)
    result = {"first_training": {}, "milliseconds_per_step": {}, "bytes": {}, "runs": []}
    first = adapters.Bench(name, image_data(), result).run("LoRA", 4, 1e-3, 0)
    stored = json.loads(adapters.RESULT.read_text())
    assert stored["runs"] == [first]
    assert 0 <= stored["first_training"]["ViT, MNIST, seed 0"] <= 100
    monkeypatch.setattr(adapters, "train", None)
    assert adapters.Bench(name, image_data(), stored).run("LoRA", 4, 1e-3, 0) == first


@pytest.mark.parametrize("best", [1e-3, 3e-3, 1e-2, 3e-2, 1.0])
def test_rates_are_tried_up_or_down_while_they_get_better(adapters, best):
    tried = []

    def score(lr):
        tried.append(lr)
        return -abs(adapters.RATES.index(lr) - adapters.RATES.index(best))

    assert adapters.climbed(score) == best
    low, high = min(best, 1e-2), max(best, 1e-2)
    assert {lr for lr in adapters.RATES if low <= lr <= high} <= set(tried)
    assert len(set(tried)) <= 5


def test_the_rate_is_chosen_on_held_out_images_and_time_is_that_of_lora(adapters):
    def run(lr, seed, held_out, accuracy):
        key = {"task": "ViT, MNIST", "method": "LoHa", "rank": 4, "budget": 5, "parameters": 4}
        return key | {"lr": lr, "seed": seed, "held_out": held_out, "accuracy": accuracy}

    costs = "ViT, MNIST, rank 4"
    result = {
        "runs": [run(0.1, 0, 90, 80), run(0.2, 0, 80, 99), run(0.1, 1, 50, 70)],
        "milliseconds_per_step": {costs: {"LoHa": 6.0, "LoRA": 4.0}},
        "bytes": {costs: {"LoHa": {"kept": 2048, "peak": 3 * 2**20}}},
    }
    assert adapters.table(result, [0, 1])[2:] == [
        "| ViT, MNIST | 5 | LoHa | 4 | 0.1 | 75.00 ± 7.07 | 1.5 | 2 | 3.0 |"
    ]
