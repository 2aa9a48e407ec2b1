"""Files that cannot be saved or loaded: one clear error each, and nothing is changed."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdlrt
from serialization.networks import dense, tucker

# --- saving ---------------------------------------------------------------------------------------


def holding(value):
    module = nn.Module()
    module.register_buffer("odd", value)
    return module


class WithExtraState(nn.Module):
    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        raise AssertionError


UNSTORABLE = {
    "meta": (holding(torch.empty(2, device="meta")), r"odd: got a tensor without memory \(device"),
    "sparse": (holding(torch.zeros(2).to_sparse()), r"odd: got a torch\.sparse_coo tensor in the"),
    "extra state": (WithExtraState(), "_extra_state: got a dict in the model's state_dict, expect"),
    "type": (
        holding(torch.zeros(2, dtype=torch.complex128)),
        r"safetensors cannot store its state",
    ),
}


@pytest.mark.parametrize(("model", "message"), UNSTORABLE.values(), ids=UNSTORABLE.keys())
def test_a_state_that_cannot_be_stored_leaves_the_file(tmp_path, model, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(tdlrt.CheckpointError, match=message):
        tdlrt.save(model, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_model_and_the_path_in_the_other_order(path, model):
    with pytest.raises(tdlrt.UnsupportedLayerError, match="model: got str"):
        tdlrt.load(model, str(path))
    with pytest.raises(tdlrt.UnsupportedLayerError, match="model: got str"):
        tdlrt.save(str(path), model)


def test_a_folder_is_no_file_to_save_to(tmp_path):
    with pytest.raises(
        tdlrt.CheckpointError,
        match=r"cannot be written \(is a folder\); expected",
    ):
        tdlrt.save(dense(), tmp_path)


@pytest.mark.parametrize("metadata", [{"tau": 0.1}, {1: "one"}])
def test_metadata_are_texts(tmp_path, metadata):
    with pytest.raises(tdlrt.CheckpointError, match=r"metadata: got \{.*\}, expected strings"):
        tdlrt.save(dense(), tmp_path / "model.safetensors", metadata=metadata)


# --- loading: whatever is wrong, the model is as before -------------------------------------------


def snapshot(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return str(model), {name: (id(value), value.detach().clone()) for name, value in named}


def assert_refused(path, model, message):
    text, before = snapshot(model)
    with pytest.raises(tdlrt.CheckpointError, match=message) as caught:
        tdlrt.load(path, model)
    assert str(caught.value).startswith(f"{path}: ")
    now, after = snapshot(model)
    assert now == text
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


@pytest.fixture(params=["dense", "tucker"])
def model(request):
    return dense(1) if request.param == "dense" else tucker(1, dict.fromkeys(("conv",), 3) | REST)


REST = {"channels": (2, 2, 3, 3), "linear": 2}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    tdlrt.save(tucker(), path, metadata={"tau": "0.1"})
    return path


def test_no_such_file(tmp_path, model):
    assert_refused(tmp_path / "other.safetensors", model, "there is no such file")


def test_a_folder_in_place_of_a_file(tmp_path, model):
    assert_refused(tmp_path, model, "is a folder, expected a file that tdlrt.save wrote")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_file(tmp_path, model):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", model, r"cannot be read .*is not a regular file")
    with pytest.raises(tdlrt.CheckpointError, match=r"pipe: cannot be written \(is not a reg"):
        tdlrt.save(model, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_header_that_would_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(tdlrt.CheckpointError, match=r"metadata: .* header takes 4,19\d,\d+ bytes"):
        tdlrt.save(dense(), path, metadata={"note": "a" * 2**22})
    assert not path.exists()
    tdlrt.save(dense(), path, metadata={"note": "a" * (2**22 - 10_000)})
    assert len(tdlrt.load(path, dense())["note"]) == 2**22 - 10_000


def test_an_unreadable_file(path, model, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert_refused(path, model, r"cannot be read \(\[Errno 13\] Permission denied\)")


def test_an_empty_file(path, model):
    path.write_bytes(b"")
    assert_refused(path, model, "is empty, expected a file that tdlrt.save wrote")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_a_truncated_file(path, model, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(
        path, model, "is damaged or not a safetensors file; use another copy of the file"
    )


def test_a_file_of_another_kind(path, model):
    path.write_text("Once upon a time there was a tensor.")
    assert_refused(path, model, "is damaged or not a safetensors file")


def test_a_safetensors_file_of_another_origin(path, model):
    save_file({"conv.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert_refused(path, model, r"tdlrt\.save did not write it; use safetensors\.torch\.load_mod")


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise AssertionError('code of a file was run')",))


def test_a_pickle_is_not_read(path, model):
    torch.save({"weights": RunsCode()}, path)
    assert_refused(path, model, "pickles are not read here")


def test_a_changed_number_is_noticed(path, model):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    assert_refused(path, model, r"is damaged \(its checksum differs\)")


# --- headers that say something else --------------------------------------------------------------


def rewrite(path, change):
    """Change the header of safetensors, `tensors`, and the one of ours, `fields`, in a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    fields = json.loads(tensors["__metadata__"]["tdlrt"])
    fields = change(tensors, fields) or fields
    tensors["__metadata__"] = {"tdlrt": fields if type(fields) is str else json.dumps(fields)}
    header = json.dumps(tensors).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def layer(name="conv", **changes):
    return lambda tensors, fields: fields["layers"][name].update(changes)


def field(**changes):
    return lambda tensors, fields: fields.update(changes)


def tensor(name, **changes):
    return lambda tensors, fields: tensors[name].update(changes)


def renamed(old, new):
    return lambda tensors, fields: tensors.update({new: tensors.pop(old)})


DAMAGED = "has a damaged header; use another copy of the file"
UNFIT = r"layer 'conv': ranks .* do not fit the model's weight of shape \(4, 2, 3, 3\)"
NO_FILE = "is damaged or not a safetensors file"
HEADERS = {
    "newer": (field(version=2), "has format 2, expected at most 1; upgrade tdlrt"),
    "version 0": (field(version=0), DAMAGED),
    "version true": (field(version=True), DAMAGED),
    "version text": (field(version="1"), DAMAGED),
    "no json": (lambda *_: "{", DAMAGED),
    "a list": (lambda *_: "[1]", DAMAGED),
    "deep": (lambda *_: "[" * 100_000, DAMAGED),
    "long number": (lambda *_: '{"version": ' + "9" * 10_000 + "}", DAMAGED),
    "no layers": (field(layers=None), DAMAGED),
    "layers in a list": (field(layers=["conv"]), DAMAGED),
    "layer without ranks": (field(layers={"conv": {}}), DAMAGED),
    "layer that is none": (field(layers={"conv": None}), DAMAGED),
    "checksum text": (field(checksum="1"), DAMAGED),
    "other checksum": (field(checksum=1), "its checksum differs"),
    "aliases to numbers": (field(aliases={"a": 1}), DAMAGED),
    "metadata of numbers": (field(metadata={"tau": 0.1}), DAMAGED),
    "other metadata": (field(metadata={"tau": "0.2"}), "its checksum differs"),
    "alias of nothing": (field(aliases={"twin.weight": "no"}), NO_FILE),
    "huge rank": (layer(ranks=[2**60, 2, 3, 2]), UNFIT),
    "negative rank": (layer(ranks=[-1, 2, 3, 2]), UNFIT),
    "no rank": (layer(ranks=[0, 2, 3, 2]), UNFIT),
    "fractional rank": (layer(ranks=[2.0, 2, 3, 2]), DAMAGED),
    "rank true": (layer(ranks=[True, 2, 3, 2]), DAMAGED),
    "more ranks": (layer(ranks=[2, 2, 3, 2, 1]), UNFIT),
    "fewer ranks": (layer(ranks=[2, 2]), UNFIT),
    "other rank": (layer(ranks=[2, 1, 3, 2]), r"conv\.core: got shape \(2, 2, 3, 2\), expected \("),
    "odd modes": (layer(learned=[0, 2, 3]), UNFIT),
    "cut mode that is not learned": (layer(learned=[0, 1]), UNFIT),
    "layer of no module": (
        field(layers={"nowhere": {"ranks": [1], "learned": [0]}}),
        "layer '(nowhere': not in the model|conv': dense in the file)",
    ),
    "layer of another kind": (
        lambda t, f: f["layers"].update(norm=f["layers"]["linear"]),
        "layer 'norm': in Tucker format in the file, but the model's layer cannot be replaced "
        "by a Tucker layer: BatchNorm2d is not a plain torch layer",
    ),
    "missing": (
        renamed("norm.bias", "norm.bisa"),
        r"\(missing: norm.bias; unexpected: norm.bisa\)",
    ),
    "shape": (tensor("norm.bias", shape=[2, 2]), r"norm.bias: got shape \(2, 2\), expected \(4,\)"),
    "core of another shape": (tensor("conv.core", shape=[24]), r"conv\.core: got shape \(24,\)"),
    "type": (
        tensor("norm.bias", dtype="I32"),
        r"norm\.bias: got type torch\.int32, expected torch\.float32",
    ),
    "unknown type": (tensor("norm.bias", dtype="F99"), NO_FILE),
    "huge shape": (tensor("norm.bias", shape=[2**62, 4]), NO_FILE),
    "negative shape": (tensor("norm.bias", shape=[-4]), NO_FILE),
    "overlap": (
        lambda t, f: t["norm.bias"].update(data_offsets=t["norm.weight"]["data_offsets"]),
        NO_FILE,
    ),
    "beyond the end": (tensor("norm.bias", data_offsets=[2**40, 2**40 + 16]), NO_FILE),
    "backwards": (tensor("norm.bias", data_offsets=[16, 0]), NO_FILE),
    "metadata that are no texts": (lambda t, f: t.update(extra={"a": 1}), NO_FILE),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_a_crafted_header(path, model, change, message):
    rewrite(path, change)
    assert_refused(path, model, message)


@pytest.mark.parametrize("length", [0, 1, 2**20, 100_000_000, 2**63, 2**64 - 1])
def test_a_header_of_another_length(path, model, length):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert_refused(path, model, NO_FILE)
    if length > 2**22:
        assert_refused(path, model, rf"header of {length:,} bytes, expected at most 4,194,304")


def test_a_huge_tensor_is_refused_before_it_is_read(path, model):
    def enlarge(tensors, fields):
        core, end = tensors["conv.core"], 0
        core["shape"] = [2**29]
        for entry in (value for name, value in tensors.items() if name != "__metadata__"):
            begin, stop = entry["data_offsets"]
            begin, end = end, end + (2**31 if entry is core else stop - begin)
            entry["data_offsets"] = [begin, end]

    rewrite(path, enlarge)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**31 - 4 * 24)  # a hole: no disk is taken
    assert_refused(path, model, r"conv\.core: got shape \(536870912,\), expected \(2, 2, 3, 2\)")


# --- models that do not fit -----------------------------------------------------------------------


def hooked():
    model = dense()
    model.linear.register_forward_hook(lambda *_: None)
    return model


def tied():
    model = dense(width=20)
    model.linear.weight = model.head.weight
    return model


def without_head():
    model = dense()
    del model.head
    return model


def grouped():
    model = dense()
    model.conv = nn.Conv2d(2, 4, 3, groups=2)
    return model


def other_modes():
    model = dense()
    tdlrt.factorize_(model, include="channels")
    return model


def in_integers():
    model = dense()
    model.norm.running_mean = torch.zeros(4, dtype=torch.int64)
    return model


MODELS = {
    "wider": (lambda: dense(width=7), r"linear.bias: got shape \(6,\), expected \(7,\)"),
    "another": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        "layer 'channels': not in the model; expected",
    ),
    "fewer layers": (without_head, r"\(missing: none; unexpected: head.bias, head.weight\)"),
    "other modes": (
        other_modes,
        r"the modes \(0, 1\) are learned in the file and \(0, 1, 2, 3\) in",
    ),
    "hooks": (hooked, "layer 'linear': in Tucker format .* has hooks, which would be lost"),
    "grouped": (grouped, r"layer 'conv': in Tucker format .* grouped \(2 groups\)"),
    "meta": (lambda: dense().to("meta"), r"got a tensor without memory \(device meta\)"),
    "integers": (in_integers, r"running_mean: got type torch\.float32, expected torch\.int64"),
}


@pytest.mark.parametrize(("build", "message"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_does_not_fit(path, build, message):
    model = build()
    if message.startswith("got a tensor without"):
        with pytest.raises(tdlrt.CheckpointError, match=message):
            tdlrt.load(path, model)
    else:
        assert_refused(path, model, message)


def test_a_layer_that_is_the_model_cannot_be_replaced(tmp_path):
    path = tmp_path / "layer.safetensors"
    tdlrt.save(tdlrt.nn.TuckerLinear(6, 5, rank=2), path)
    assert_refused(path, nn.Linear(6, 5), "it is the model; wrap it in torch.nn.Sequential")


def test_a_dense_file_for_a_tucker_model(path):
    tdlrt.save(dense(), path)
    assert_refused(path, tucker(), "layer 'conv': dense in the file, in Tucker format in the model")


def test_weights_that_the_model_ties_and_the_file_does_not(path):
    source = tucker()
    source.twin.weight = nn.Parameter(source.twin.weight + 1)
    tdlrt.save(source, path)
    assert_refused(
        path, dense(), r"twin.weight: differs from head.weight, which is the same tensor"
    )


def test_tied_layers_that_the_file_has_in_tucker_format(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))

    source, other = model(), model()
    tdlrt.factorize_(source, rank=2)
    tdlrt.save(source, tmp_path / "model.safetensors")
    other[1].weight = other[0].weight
    assert_refused(tmp_path / "model.safetensors", other, "weight tied to another parameter")


# --- anything -------------------------------------------------------------------------------------


def corrupted(content, rng):
    """A file with some bytes changed, cut out, doubled, or cut off."""
    header = 8 + int.from_bytes(content[:8], "little")
    content = bytearray(content)
    end = rng.choice((8, header, len(content)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(end)
        width = rng.choice((1, 1, 4, 16))
        match rng.randrange(5):
            case 0:
                content[place] ^= 1 << rng.randrange(8)
            case 1:
                content[place : place + width] = rng.randbytes(width)
            case 2:
                del content[place : place + width]
            case 3:
                content[place:place] = content[place : place + width]
            case 4:
                content[place] = rng.choice(b'0123456789-"{}[],: \\')
        end = min(end, len(content))
    return bytes(content)


@pytest.mark.parametrize("kind", ["dense", "tucker"])
def test_no_corruption_gets_through(path, kind):
    """Each of hundreds is refused and changes nothing; a few are no corruption: blanks, say."""
    rng, content = random.Random(0), path.read_bytes()
    model = dense(1) if kind == "dense" else tucker(1, REST | {"conv": 1})
    text, before = snapshot(model)
    refused = 0
    for _ in range(500):
        path.write_bytes(corrupted(content, rng))
        try:
            texts = tdlrt.load(path, model)
        except tdlrt.CheckpointError:
            refused += 1
        else:
            assert texts == {"tau": "0.1"}
            state = model.state_dict()
            for name, value in tucker().state_dict().items():
                assert torch.equal(state[name], value)
            model = dense(1) if kind == "dense" else tucker(1, REST | {"conv": 1})
            text, before = snapshot(model)
    now, after = snapshot(model)
    assert now == text
    assert all(identity == before[name][0] for name, (identity, _) in after.items())
    assert all(torch.equal(value, before[name][1]) for name, (_, value) in after.items())
    assert refused > 450
