import copy
import io

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tdlrt
from serialization.networks import FORMAT_1, RANKS, dense, set_values, tucker

OTHER_RANKS = {
    "smaller": dict.fromkeys(RANKS, 1) | {"channels": (1, 1, 3, 3)},
    "larger": {"conv": (4, 2, 3, 3), "channels": (5, 4, 3, 3), "linear": (6, 6)},
    "equal": RANKS,
}
TARGETS = {"dense": dense, **{name: None for name in OTHER_RANKS}}


def target(name):
    return dense(1) if name == "dense" else tucker(1, OTHER_RANKS[name])


def ranks(model):
    return tdlrt.summary(model).ranks


def images():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("training", [True, False])
def test_a_file_brings_ranks_and_weights_into_any_network_of_its_kind(tmp_path, name, training):
    source, model = tucker().eval(), target(name).train(training)
    tdlrt.save(source, tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    assert ranks(model) == RANKS
    assert model.channels.learned_modes == (0, 1)
    assert_same_state(model, source)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model.eval()(images()), source(images()))


@pytest.mark.parametrize("name", OTHER_RANKS)
def test_parameters_of_a_tucker_model_stay_the_same_objects(tmp_path, name):
    model = target(name)
    before = dict(model.named_parameters())
    tdlrt.save(tucker(), tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    assert all(before[key] is value for key, value in model.named_parameters())


def test_in_a_dense_model_all_but_the_replaced_weights_stay_the_same_objects(tmp_path):
    model = dense(1)
    model.linear.weight.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False))
    tdlrt.save(tucker(), tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    after = dict(model.named_parameters(remove_duplicate=False))
    gone = {f"{name}.weight" for name in RANKS}
    assert before.keys() - after.keys() == gone
    assert all(after[name] is value for name, value in before.items() if name not in gone)
    assert model.twin.weight is model.head.weight
    frozen = {name for name, parameter in after.items() if not parameter.requires_grad}
    assert frozen == {"linear.core", "linear.factors.0", "linear.factors.1"}


@pytest.mark.parametrize("model", [dense(), nn.Sequential(nn.ReLU())])
def test_a_model_without_tucker_layers(tmp_path, model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    tdlrt.save(model, tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", other)
    assert_same_state(other, model)


def test_a_single_layer(tmp_path):
    layer, other = (tdlrt.nn.TuckerLinear(6, 5, rank=rank) for rank in (2, 4))
    tdlrt.save(layer, tmp_path / "layer.safetensors")
    tdlrt.load(tmp_path / "layer.safetensors", other)
    assert_same_state(other, layer)


def test_texts_come_back(tmp_path):
    path = tmp_path / "model.safetensors"
    tdlrt.save(tucker(), path, metadata={"tau": "0.1", "note": 'ü "\n'})
    assert tdlrt.load(path, dense()) == {"tau": "0.1", "note": 'ü "\n'}
    tdlrt.save(tucker(), path)
    assert tdlrt.load(path, dense()) == {}


def test_a_file_in_the_way_is_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    for seed in range(2):
        tdlrt.save(tucker(seed), str(path))
    model = dense(5)
    tdlrt.load(str(path), model)
    assert_same_state(model, tucker(1))
    assert list(path.parent.iterdir()) == [path]


def test_equal_models_give_equal_files(tmp_path):
    for name in ("a", "b"):
        tdlrt.save(tucker(), tmp_path / name, metadata={"a": "1", "b": "2", "c": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        # safetensors writes more than one entry in random order
        assert len(file.metadata()) == 1


def test_a_file_is_as_large_as_its_parameters(tmp_path):
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(512, 512))
    tdlrt.factorize_(model, rank=0.3, include="*")
    tdlrt.save(model, tmp_path / "model.safetensors")
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size < (tmp_path / "model.safetensors").stat().st_size < 1.05 * size


def test_loaded_weights_do_not_alias_the_file(tmp_path):
    path, model = tmp_path / "model.safetensors", dense()
    tdlrt.save(tucker(), path)
    content = path.read_bytes()
    tdlrt.load(path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert path.read_bytes() == content


# --- shared tensors -------------------------------------------------------------------------------


def test_a_shared_layer_is_stored_once_and_stays_shared(tmp_path):
    def model(seed):
        torch.manual_seed(seed)
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))

    source = model(0)
    tdlrt.factorize_(source, rank=3)
    tdlrt.save(source, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(name.startswith("2.") for name in file.keys())
    other = model(1)
    tdlrt.load(tmp_path / "model.safetensors", other)
    assert other[0] is other[2]
    assert_same_state(other, source)


def test_tied_weights_load_into_a_model_that_does_not_tie_them(tmp_path):
    model = dense(1)
    model.twin.weight = nn.Parameter(torch.zeros_like(model.twin.weight))
    tdlrt.save(tucker(), tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    assert model.twin.weight is not model.head.weight
    assert_same_state(model, tucker())


def test_overlapping_tensors_are_stored(tmp_path):
    def model(value):
        module, memory = nn.Module(), torch.full((6,), value)
        module.register_buffer("whole", memory)
        module.register_buffer("part", memory[2:5])
        module.register_buffer("expanded", memory[:1].expand(4))
        return module

    other = nn.Module()
    for name, size in (("whole", 6), ("part", 3), ("expanded", 4)):
        other.register_buffer(name, torch.zeros(size))
    tdlrt.save(model(3.0), tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", other)
    assert_same_state(other, model(3.0))


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_take_the_floating_point_type_of_the_model(tmp_path, dtype):
    source, model = tucker(), dense(1).to(dtype)
    tdlrt.save(source, tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.norm.num_batches_tracked.dtype == torch.int64
    assert_same_state(model, source.to(dtype))


def test_scalars_empty_tensors_and_values_that_are_not_finite(tmp_path):
    def model(value):
        module = nn.Module()
        for name, shape in (("scalar", ()), ("empty", (0, 3)), ("mask", (2,))):
            module.register_buffer(name, torch.full(shape, value))
        module.register_buffer("flag", torch.tensor(value > 0))
        return module

    tdlrt.save(model(torch.inf), tmp_path / "model.safetensors")
    other = model(0.0)
    tdlrt.load(tmp_path / "model.safetensors", other)
    assert_same_state(other, model(torch.inf))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_on_another_device(tmp_path):
    source, model = tucker().cuda(), dense(1).cuda()
    tdlrt.save(source, tmp_path / "model.safetensors")
    tdlrt.load(tmp_path / "model.safetensors", model)
    assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
    assert_same_state(model, source)


# --- going on -------------------------------------------------------------------------------------


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        model(images().add(step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_save_load_continue_equals_continue(tmp_path, name, integrator):
    def optimizer(model):
        options = {"lr": 0.05, "momentum": 0.9, "tau": 0.5, "integrator": integrator}
        return tdlrt.TDLRT(model, torch.optim.SGD, **options)

    path, states = tmp_path / "model.safetensors", io.BytesIO()
    source, other = tucker(), target(name)
    first = optimizer(source)
    train(source, first, 5)  # with `bug` in the middle of a step
    assert ranks(source) != RANKS
    tdlrt.save(source, path)
    torch.save(first.state_dict(), states)
    tdlrt.load(path, other)
    second = optimizer(other)
    states.seek(0)
    second.load_state_dict(torch.load(states, weights_only=True))
    for model, own in ((source, first), (other, second)):
        train(model, own, 4)
    assert_same_state(other, source)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_format_1_keeps_loading(name):
    model = target(name)
    assert tdlrt.load(FORMAT_1, model) == {"tau": "0.1"}
    assert ranks(model) == RANKS
    expected = set_values(tucker()).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-4)
