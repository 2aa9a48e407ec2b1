"""Checkpoints that stand for more than they hold, or for a place where no run can be."""

import io
import tarfile
import zipfile

import pytest
import torch

from tdlrt_lab.run.stored_state import check_position, read_state

CPU = torch.device("cpu")


def itself():
    state = {}
    state["state"] = state
    return state


STATES = {
    "no memory": (lambda: {"a": [torch.zeros(1).expand(10**12)]}, r"shape \(1000000000000,\)"),
    "meta": (lambda: {"a": torch.empty(10**12, device="meta")}, "without that many values"),
    "sparse": (lambda: {"a": torch.zeros(2, 2).to_sparse()}, "without that many values"),
    "itself": (itself, "more than 2,000,000 values"),
}


# What torch 2.15 says of every sparse tensor that it loads.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(("make", "message"), STATES.values(), ids=STATES)
def test_a_state_is_no_larger_than_its_file(tmp_path, make, message):
    torch.save(make(), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "last.pt", CPU)


def test_what_torch_saves_is_read(tmp_path):
    base = torch.arange(6.0)
    state = {"a": base[2:4], "b": base.view(2, 3).T, "c": [1, None, "x", (2.0, {3})]}
    torch.save(state, tmp_path / "last.pt")
    found = read_state(tmp_path / "last.pt", CPU)
    assert torch.equal(found["a"], state["a"]) and torch.equal(found["b"], state["b"])
    assert found["c"] == state["c"]


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        with zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in stored.namelist():
                archive.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="its contents are larger than the file"):
        read_state(tmp_path / "last.pt", CPU)


def test_older_formats_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "pickle.pt", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    for name in ("pickle.pt", "tar.pt"):
        with pytest.raises(ValueError, match=r"not an archive of torch\.save"):
            read_state(tmp_path / name, CPU)


METRICS = {
    **dict.fromkeys(("loss", "train_accuracy", "compression", "network_compression"), 0.5),
    **{"epoch": 1, "parameters": 10, "lr": 0.1, "seconds": 1.0, "test_accuracy": None},
    "validation_accuracy": 50.0,
    "ranks": {"conv1": [2, 1, 3, 3]},
}
STATE = {"model": {}, "epoch": 1, "batch": 2, "history": [METRICS], "lr": 0.1, "seconds": 1.0}
STATE |= {"loss_sum": torch.zeros(()), "correct": torch.zeros((), dtype=torch.int64)}
A = {"a": [1]}
WRONG_CHANGES = {
    "no list": ({"rank_changes": {"1": A}}, "rank_changes {'1': .*: expected a list"),
    "null": ({"rank_changes": None}, "rank_changes None: expected a list"),
    "short": ({"rank_changes": [[1]]}, r"rank_changes: \[1\]: expected a step"),
    "long": ({"rank_changes": [[1, A, A]]}, "expected a step"),
    "true": ({"rank_changes": [[True, A]]}, r"\[True, .*: expected a step"),
    "fraction": ({"rank_changes": [[1.5, A]]}, "expected a step"),
    "negative": ({"rank_changes": [[-1, A]]}, "expected a step"),
    "twice": ({"rank_changes": [[1, A], [1, A]]}, "expected a step after the one before"),
    "after the epoch": ({"rank_changes": [[6, A]]}, "expected a step .* at most 5"),
    "far": ({"rank_changes": [[10**400, A]]}, "expected a step"),
    "ranks": ({"rank_changes": [[1, {"a": [0.5]}]]}, "list of integers for each layer"),
    "names": ({"rank_changes": [[1, {1: [2]}]]}, "list of integers for each layer"),
    "no steps": ({"rank_changes": [[0, A]], "steps": 0}, "ends after step 0: expected an epoch"),
    "half epoch": ({"rank_changes": [[0, A]], "epoch": 1.5}, "rank_changes of epoch 1.5"),
    "epoch 0": ({"rank_changes": [[0, A]], "epoch": 0}, "rank_changes of epoch 0"),
    "negative steps": ({"steps": -1}, "steps -1: expected an integer from 0"),
    "fractional steps": ({"steps": 2.0}, r"steps 2\.0: expected an integer from 0"),
}
WRONG = {
    "far epoch": (
        {"epoch": 10**9},
        "epoch 1000000000, batch 2: expected integers from 0 to 3 and 5",
    ),
    "negative epoch": ({"epoch": -1}, "epoch -1"),
    "fractional epoch": ({"epoch": 1.0}, r"epoch 1\.0"),
    "true": ({"epoch": True}, "epoch True"),
    "far batch": ({"batch": 6}, "batch 6"),
    "beyond the end": ({"epoch": 3}, "epoch 3, batch 2"),
    "short history": ({"history": []}, "history: expected one entry per finished epoch"),
    "no history": ({"history": None}, "history: expected one entry"),
    "texts": ({"history": [METRICS | {"loss": "x"}]}, "got .*'x'.*expected numbers"),
    "both": (
        {"history": [METRICS | {"test_accuracy": 50.0, "validation_accuracy": "x"}]},
        "'validation_accuracy': 'x'.*expected numbers",
    ),
    "no loss": ({"history": [METRICS | {"loss": None}]}, "'loss': None.*expected numbers"),
    "no accuracy": (
        {"history": [METRICS | {"validation_accuracy": None}]},
        "'validation_accuracy': None.*expected numbers",
    ),
    "ranks": (
        {"history": [METRICS | {"ranks": {"a": [0.5]}}]},
        "ranks .*: expected a list of integers",
    ),
    **{
        f"metrics: {name}": ({"history": [METRICS | {"steps": 5, **change}]}, message)
        for name, (change, message) in WRONG_CHANGES.items()
    },
    "change before the epoch": (
        {"rank_changes": [[4, {}]]},
        r"\[4, {}\]: expected a step",
    ),
    "change after the state": ({"rank_changes": [[8, {}]]}, "expected a step .* at most 7"),
    "other metrics": ({"history": [METRICS | {"more": 1}]}, "not the metrics of an epoch"),
    "rate": ({"lr": float("nan")}, "lr nan: expected a finite number"),
    "time": ({"seconds": None}, "seconds None: expected"),
    "seen": ({"seen": -1}, "seen -1: expected an integer from 0"),
    "skipped": ({"skipped_steps": 0.5}, "skipped_steps 0.5: expected an integer"),
    "sum": ({"loss_sum": 0.5}, "loss_sum 0.5: expected a tensor of one number"),
    "counts": ({"correct": torch.zeros(2)}, "correct .*: expected a tensor of one number"),
    "weights": ({"model": [1]}, "model: expected tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_run_cannot_be_elsewhere(change, message):
    check_position(STATE, epochs=3, steps_per_epoch=5)
    known = {"history": [METRICS | {"steps": 5, "rank_changes": [[0, A], [5, A]]}]}
    check_position(STATE | known | {"rank_changes": [[6, A], [7, A]]}, epochs=3, steps_per_epoch=5)
    with pytest.raises(ValueError, match=message):
        check_position(STATE | change, epochs=3, steps_per_epoch=5)
