"""What `fuzz.py` feeds: every function that reads a file, with right files to start from."""

import io
import json
import os
import random
import reprlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from kinds import changed, fields
from mutations import ODD_VALUES, mutate_bytes, mutate_tree, nested
from PIL import Image
from rich.console import Console
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

import tdlrt
from tdlrt.errors import RunError
from tdlrt.export.plain_files import load_plain
from tdlrt.export.writing import export
from tdlrt.serialization.header import Header, checksum
from tdlrt_lab.cli.terminal_tables import closing_line, layer_table
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.write import read_description
from tdlrt_lab.run.checkpoint import load_checkpoint, save_checkpoint
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.plan import read_sweep
from tdlrt_lab.sweep.recorded import read_results

DEEP_VALUES = (*ODD_VALUES, nested(15), nested(500))
"""Values in the place of a field."""

TYPES = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2)


class FaultError(Exception):
    """A loader did something that it must not do."""


class Loader(ABC):
    """A function that reads a file.

    Attributes:
        samples: Files that it reads.
        path: Where it looks for the file.
    """

    samples: Sequence[bytes]
    path: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "file"

    def content(self, rng: random.Random) -> bytes:
        """A file with something wrong, most often."""
        sample = rng.choice(self.samples)
        if rng.random() < 0.5:
            try:
                return self.changed(sample, rng)
            except Exception:  # it cannot be written either
                pass
        return mutate_bytes(sample, self.samples, rng)

    @abstractmethod
    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        """A file that is well-formed, but says something else."""

    def fields(self) -> Iterator[tuple[str, bytes]]:
        """Files in which one field in turn is another or missing, each with its name."""
        return iter(())

    @abstractmethod
    def load(self) -> None:
        """Read the file, and see that the result is one.

        Raises:
            TdlrtError: Where the file is wrong.
            FaultError: Where something is wrong with the loader.
        """


class _Model(Loader):
    """`tdlrt.load`, into a dense network and one in Tucker format."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        samples = []
        for modes in ("all", "channels"):
            model = network()
            tdlrt.factorize_(model, rank=0.5, modes=modes)
            tdlrt.save(model, self.path, metadata={"tau": "0.1"})
            samples.append(self.path.read_bytes())
        self.samples = samples
        self.models = [self._model(number) for number in range(2)]
        self.turn = 0

    def _model(self, number: int) -> nn.Module:
        model = network()
        if number:
            tdlrt.factorize_(model, rank=0.3)
        return model

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(sample[:8], "little")
        tensors, body = json.loads(sample[8 : 8 + length]), sample[8 + length :]
        fields = json.loads(tensors.pop("__metadata__")["tdlrt"])
        kind = rng.randrange(4)
        if kind == 0:
            return safetensors(mutate_tree(tensors, rng), json.dumps(fields), body)
        found = read_tensors(sample)
        if kind == 1:
            fields = mutate_tree(fields, rng)
        elif kind == 2:
            found = changed_tensors(found, rng)
        else:
            layer = rng.choice([*fields["layers"].values()])
            layer["ranks"] = [rng.choice((1, rank, rank + 1)) for rank in layer["ranks"]]
            fields["metadata"] = {"tau": "0.2"}
        # With its own checksum, so that what comes after that is reached.
        header, _ = Header.from_json(json.dumps(fields))
        fields["checksum"] = checksum(header, found)
        return write_tensors(found, {"tdlrt": json.dumps(fields)})

    def load(self) -> None:
        self.turn = 1 - self.turn
        model = self.models[self.turn]
        before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        try:
            tdlrt.load(self.path, model)
        except tdlrt.TdlrtError:
            after = model.state_dict(keep_vars=True)
            check(after.keys() == before.keys(), "the model was changed")
            for name, (number, value) in before.items():
                same = id(after[name]) == number and torch.equal(after[name], value)
                check(same or value.isnan().any(), f"{name} was changed")
            raise
        self.models[self.turn] = self._model(self.turn)
        check(model(torch.zeros(1, 3, 6, 6)).shape == (1, 4))


class _Checkpoint(Loader):
    """The checkpoint of a run that is resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data = load_data("digits", train_images=64)
        samples = []
        for method in ("tdlrt", "dense"):
            config = RunConfig(model="lenet5", data="digits", epochs=2, method=method, rank=0.1)
            training = Training(config, self.data)
            training.epochs(lambda: False, lambda _: None).__next__()
            save_checkpoint(training, self.path)
            samples.append(self.path.read_bytes())
            if method == "tdlrt":
                self.training = training
        self.samples = samples

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        state = torch.load(io.BytesIO(sample), weights_only=True)
        odd: list[Any] = [
            *ODD_VALUES,
            torch.zeros(3),
            torch.tensor(torch.nan),
            torch.zeros(1).expand(20, 10**9),
            torch.zeros(1).expand(10**12),
            torch.zeros(2, 2).to_sparse(),
            torch.empty(10**12, device="meta"),
            torch.zeros(5, dtype=torch.complex64),
        ]
        plain = dict(state, model=dict(state["model"]))
        buffer = io.BytesIO()
        torch.save(mutate_tree(plain, rng, odd), buffer)
        return buffer.getvalue()

    def load(self) -> None:
        load_checkpoint(self.training, self.path)
        check(0 <= self.training.step <= self.training.steps)


class _Sweep(Loader):
    """The description of a sweep, and the directories of its runs."""

    samples = (
        b"title: a\noptions: &o\n  model: lenet5\n  data: digits\n  epochs: 2\nseeds: [0, 1]\n"
        b"rows:\n  dense: {method: dense, lr: 1.0e-2}\n  tdlrt:\n    tau: [0.1, 0.2]\n"
        b"    rank: {conv1: [2, 1, 3, 3], '*': 0.5}\n",
        b"options: {model: lenet5, data: digits, validation: 0.2, seed: 3}\nrows: {a: {}}\n",
        b"a: &a [x, x]\nb: &b [*a, *a]\nrows: {<<: {a: {tau: 0.1}}, b: {method: dense}}\n"
        b"options: {model: lenet5, data: digits, init_scale: auto, device: cpu}\n",
    )

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        return yaml.safe_dump(mutate_tree(yaml.safe_load(sample), rng)).encode()

    def fields(self) -> Iterator[tuple[str, bytes]]:
        tree = yaml.safe_load(self.samples[0])
        for path in fields(tree):
            for value in ((), *((odd,) for odd in (*ODD_VALUES, nested(15), nested(50)))):
                name = f"{path} as {reprlib.repr(value)}"
                yield name, yaml.safe_dump(changed(tree, path, *value)).encode()

    def load(self) -> None:
        out = self.folder / "out"
        for run in read_sweep(self.path).runs(out):
            for path in (run.directory.path, run.lock, run.failure):
                check(path.resolve().is_relative_to(out.resolve()), f"{path} is outside")
                check(path.name.isprintable())


class _Config(Loader):
    """The options stored with a run that is resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = RunConfig(model="lenet5", data="digits", rank={"conv1": [2, 1, 3, 3]})
        self.run = RunDirectory(folder / "run")
        self.path = self.run.config
        self.run.write_config(self.config)
        self.samples = [self.path.read_bytes()]

    changed = _Sweep.changed
    fields = _Sweep.fields

    def load(self) -> None:
        self.run.check_resume(self.config)


SUMMARY = {
    **{"model": "lenet5", "data": "digits", "method": "dense", "seed": 0, "accuracy": 99.1},
    **{"compression": 0.5, "network_compression": 0.4, "seconds": 1.5, "parameters": 10},
    **{"network_parameters": 20, "network_dense_parameters": 30, "tau": 0.1},
    **{"macs": 100, "dense_macs": 200},
    "ranks": {"conv1": [2, 1, 3, 3]},
    "layers": [
        {"name": "conv1", "shape": [20, 1, 5, 5], "ranks": [2, 1, 3, 3], "parameters": 10}
        | {"macs": 5, "compression": 0.5}
    ],
    "versions": {"tdlrt": "0.1.0"},
}
METRICS = {
    **{"epoch": 1, "loss": 0.5, "train_accuracy": 90.0, "test_accuracy": 91.0, "lr": 0.05},
    **{"compression": 0.9, "network_compression": 0.8, "parameters": 10, "seconds": 1.0},
    "ranks": {"conv1": [2, 1, 3, 3]},
    **{"steps": 6, "rank_changes": [[0, {"conv1": [4, 1, 5, 5]}], [2, {"conv1": [2, 1, 3, 3]}]]},
}


class _Json(Loader):
    """A file of JSON."""

    example: ClassVar[dict[str, Any]]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.samples = [json.dumps(self.example).encode()]
        self.run = RunDirectory(folder / "run")
        self.run.path.mkdir()

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        return json.dumps(mutate_tree(json.loads(sample), rng)).encode()

    def fields(self) -> Iterator[tuple[str, bytes]]:
        for path in fields(self.example):
            for value in ((), *((odd,) for odd in DEEP_VALUES)):
                name = f"{path} as {reprlib.repr(value)}"
                yield name, json.dumps(changed(self.example, path, *value)).encode()


class _Summary(_Json):
    """The result of a finished run, and what is shown of it."""

    example = SUMMARY

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = self.run.summary

    def load(self) -> None:
        summary = self.run.read_summary()
        Console(file=io.StringIO()).print(layer_table(summary))
        closing_line(summary)


class _Metrics(_Json):
    """The metrics of the epochs of a run."""

    example = METRICS

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = self.run.metrics

    def load(self) -> None:
        try:
            found = self.run.read_metrics()
        except (OSError, ValueError) as error:  # those that the method promises
            raise RunError(str(error)) from error
        check(all(metrics.epoch is not None for metrics in found))


class _Data(_Json):
    """The record of the data of a run that is resumed."""

    example: ClassVar[dict[str, Any]] = {
        part: {"images": 3, "sha256": "a" * 64} for part in ("training", "test")
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = self.run.data
        self.run.summary.write_text("{}")

    def load(self) -> None:
        if not self.path.exists():
            raise RunError("earlier versions made no record")
        self.run.check_data(self.example)


class _Failure(_Json):
    """Why a run of a sweep failed."""

    example: ClassVar[dict[str, Any]] = {
        "error": "no data",
        "traceback": "",
        "versions": {},
        "config": {},
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "run.error.json"

    def load(self) -> None:
        _, problems = collect(self.folder)
        if not problems[0].text.startswith("left out: failed: "):
            raise RunError(problems[0].text)


class _Results(_Json):
    """The recorded results of an experiment."""

    example: ClassVar[dict[str, Any]] = {"row": "a", **SUMMARY}

    def load(self) -> None:
        if not os.path.lexists(self.path):
            raise RunError("no results")
        check(all(isinstance(result["row"], str) for result in read_results(self.path)))


class _Description(_Json):
    """Title and note of a sweep, which its report shows."""

    example: ClassVar[dict[str, Any]] = {"title": "a title", "note": "a note"}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "sweep.json"

    def load(self) -> None:
        found = read_description(self.folder)
        check(isinstance(found["title"], str) and isinstance(found["note"], str))
        if found["title"].startswith("Runs in"):
            raise RunError("no description")


class _Plain(Loader):
    """An exported network in format plain."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = network()
        trained = network()
        tdlrt.factorize_(trained, rank=0.3)
        export(trained, self.path, format="plain", inputs=torch.zeros(1, 3, 6, 6), overwrite=True)
        self.samples = [self.path.read_bytes()]

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(sample[:8], "little")
        header = json.loads(sample[8 : 8 + length])
        layers = json.loads(header["__metadata__"]["layers"])
        if rng.random() < 0.7:
            header["__metadata__"]["layers"] = json.dumps(mutate_tree(layers, rng))
        else:
            header = mutate_tree(header, rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + sample[8 + length :]

    def fields(self) -> Iterator[tuple[str, bytes]]:
        sample = self.samples[0]
        length = int.from_bytes(sample[:8], "little")
        header = json.loads(sample[8 : 8 + length])
        layers = json.loads(header["__metadata__"]["layers"])
        places = [path for path in fields(layers) if path[:1] == (next(iter(layers)),)]
        for path in places:
            for value in ((), *((odd,) for odd in DEEP_VALUES)):
                header["__metadata__"]["layers"] = json.dumps(changed(layers, path, *value))
                text = json.dumps(header).encode()
                name = f"{path} as {reprlib.repr(value)}"
                yield name, len(text).to_bytes(8, "little") + text + sample[8 + length :]

    def load(self) -> None:
        load_plain(self.path, self.model)


class _Parquet(Loader):
    """A data set of two parquet files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "mnist" / "train.parquet"
        self.path.parent.mkdir()
        self.images = images()
        names = {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}
        self.samples = [table_bytes(self.images[:4], ["zstd", names]), table_bytes(self.images[:1])]
        (folder / "mnist" / "test.parquet").write_bytes(self.samples[1])

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        cells: list[Any] = [rng.choice(self.images) for _ in range(rng.choice((0, 1, 3, 2000)))]
        cells = [mutate_bytes(c, self.images, rng) if rng.random() < 0.1 else c for c in cells[:50]]
        cells += cells[:1] * rng.choice((0, 0, 2000))
        labels: Any = mutate_tree([n % 3 for n in range(len(cells))], rng, [*ODD_VALUES, 10**12])
        names = mutate_tree({"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}, rng)
        codec = rng.choice(("none", "snappy", "zstd", "gzip"))
        return table_bytes(cells, [codec, names], labels[: len(cells)], rng.choice((1, 7, 10**6)))

    def load(self) -> None:
        data = load_data("mnist", self.folder)
        check(len(data.train_images) == len(data.train_labels))
        check(
            0 <= data.train_labels.min() <= data.train_labels.max() < len(data.classes),
            "the result is wrong",
        )


class _Folder(Loader):
    """A folder of image files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.samples = images()
        for part in ("train", "test"):
            (folder / part / "a").mkdir(parents=True)
            (folder / part / "a" / "1.png").write_bytes(self.samples[0])
        self.path = folder / "train" / "a" / "1.png"

    def changed(self, sample: bytes, rng: random.Random) -> bytes:
        """A PNG file with another size in its header, and the right checksum."""
        png = next(s for s in self.samples if s.startswith(b"\x89PNG"))
        size = b"".join(rng.choice((0, 1, 8, 5000, 60000, 2**31)).to_bytes(4) for _ in range(2))
        chunk = b"IHDR" + size + bytes(rng.choice((0, 1, 2, 3, 6, 8, 16)) for _ in range(2))
        chunk += png[26:29]
        return png[:12] + chunk + zlib.crc32(chunk).to_bytes(4) + png[33:]

    def load(self) -> None:
        data = load_data("imagefolder", self.folder, image_size=8)
        check(data.train_images.shape == (1, 3, 8, 8))


LOADERS: dict[str, type[Loader]] = {
    "model": _Model,
    "checkpoint": _Checkpoint,
    "plain": _Plain,
    "sweep": _Sweep,
    "config": _Config,
    "metrics": _Metrics,
    "summary": _Summary,
    "data": _Data,
    "failure": _Failure,
    "results": _Results,
    "description": _Description,
    "parquet": _Parquet,
    "imagefolder": _Folder,
}


def check(holds: object, text: str = "the result is wrong") -> None:
    if not holds:
        raise FaultError(text)


def network() -> nn.Module:
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)
        )
        .extend([nn.Flatten(), nn.Linear(128, 12), nn.Linear(12, 4)])
        .eval()
    )


def changed_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """The same names, for the most part, with other values, types or shapes."""
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor = tensors[name]
    changes = (
        lambda: tensors.pop(name),
        lambda: tensors.update({name: tensors[other].clone()}),
        lambda: tensors.update({rng.choice(("a", "../a", "")): tensors.pop(name)}),
        lambda: tensors.update({name: torch.full_like(tensor.float(), torch.nan)}),
        lambda: tensors.update({name: tensor.to(rng.choice(TYPES))}),
        lambda: tensors.update({name: tensor.flatten()[: rng.randrange(4)].clone()}),
        lambda: tensors.update({name: tensor[None].clone()}),
    )
    for change in rng.sample(changes, rng.choice((1, 1, 2))):
        if name in tensors:
            change()
    return tensors


def safetensors(tensors: dict[str, Any], text: str, body: bytes) -> bytes:
    header = json.dumps({"__metadata__": {"tdlrt": text}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + body


def images() -> list[bytes]:
    """The same few pixels in every format that is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    files = []
    for mode in ("L", "RGB", "P"):
        for format in ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"):
            if (mode, format) not in (("P", "JPEG"), ("P", "PPM"), ("P", "WEBP")):
                buffer = io.BytesIO()
                Image.fromarray(pixels).convert(mode).save(buffer, format=format)
                files.append(buffer.getvalue())
    return files


def table_bytes(
    cells: Sequence[bytes],
    extra: Sequence[Any] = ("none", {}),
    labels: Sequence[Any] | None = None,
    rows: int = 10**6,
) -> bytes:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows_of = [{"bytes": cell, "path": None} for cell in cells]
    labels = [number % 3 for number in range(len(cells))] if labels is None else labels
    table = pa.table({"image": pa.array(rows_of, kind), "label": pa.array(labels)})
    table = table.replace_schema_metadata({"huggingface": json.dumps(extra[1])})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=extra[0], row_group_size=rows)
    return buffer.getvalue()
