"""What a sweep is: shared options, rows that may be grids, seeds; and the runs it stands for."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tdlrt.errors import RunError, TdlrtError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.names import pick
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.yaml_files import read_yaml

__all__ = [
    "DESCRIPTION",
    "Sweep",
    "SweepError",
    "SweepRun",
    "check_data",
    "check_directories",
    "describe",
    "read_sweep",
]

Options = Mapping[str, Any]

KEYS = ("title", "note", "options", "rows", "seeds")
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.,+_-]{0,99}")
LONGEST_NAME = 200
DESCRIPTION = "sweep.json"
REPORT = "report"
"""Name of the folder beside the rows that `tdlrt report` writes."""


class SweepError(TdlrtError, ValueError):
    """The description of a sweep is not understood, or an option in it is out of range."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        row: Name of its row, with the values that the row's grid takes here.
        config: Its options.
        out: Directory of the sweep.
    """

    row: str
    config: RunConfig
    out: Path

    @property
    def name(self) -> str:
        """Row and seed."""
        return f"{self.row}/seed{self.config.seed}"

    @property
    def directory(self) -> RunDirectory:
        """Where it writes."""
        return RunDirectory(self.out / self.row / f"seed{self.config.seed}")

    @property
    def lock(self) -> Path:
        """Held by the process that does the run."""
        return self.directory.path.with_suffix(".lock")

    @property
    def failure(self) -> Path:
        """Why it failed when it was last tried."""
        return self.directory.path.with_suffix(".error.json")

    @property
    def done(self) -> bool:
        """Whether it was finished before."""
        return self.directory.summary.exists()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Shared options x rows x seeds.

    Attributes:
        options: Options of `RunConfig` that all rows share.
        rows: Options of each row by name; they go before the shared ones.
        seeds: Seeds of each row.
        title: Heading of the report.
        note: What a reader must know beside the numbers.
        source: Where it was written, for error messages.

    An option, shared or of a row, may be a list: the row then stands for one row per value, and
    for all combinations of several lists.

    >>> sweep = Sweep(
    ...     options={"model": "lenet5", "data": "digits"},
    ...     rows={"dense": {"method": "dense"}, "tdlrt": {"budget": [0.1, 0.2]}},
    ... )
    >>> [run.name for run in sweep.runs("runs")]
    ['dense/seed0', 'tdlrt_budget=0.1/seed0', 'tdlrt_budget=0.2/seed0']
    """

    options: Options
    rows: Mapping[str, Options]
    seeds: tuple[int, ...] = (0,)
    title: str = ""
    note: str = ""
    source: str = "the sweep"

    def runs(self, out: str | Path) -> list[SweepRun]:
        """All runs, those of a seed before those of the next; every option is checked.

        Raises:
            SweepError: An option is unknown, of another type or out of range, or two rows are the
                same; the message names the place.
        """
        self._check_names()
        runs = [
            SweepRun(row=row, config=self._config(place, options, seed), out=Path(out))
            for seed in self.seeds
            for place, name in ((f"rows.{name}", name) for name in self.rows)
            for row, options in _grid(name, {**self.options, **self.rows[name]}, self._at(place))
        ]
        seen: dict[str, str] = {}
        for run in runs:
            if len(run.row) > LONGEST_NAME:
                raise SweepError(
                    f"{self.source}: the name {run.row} has {len(run.row)} characters, expected at "
                    f"most {LONGEST_NAME}; it becomes a directory"
                )
            first = seen.setdefault(json.dumps(run.config.to_dict()), run.name)
            if first != run.name:
                raise SweepError(
                    f"{self.source}: {run.name} is the same run as {first}; leave out one of them"
                )
        return runs

    def _check_names(self) -> None:
        if not self.rows:
            raise SweepError(f"{self._at('rows')}: expected at least one row")
        _check_options(self._at("options"), self.options)
        for name, options in self.rows.items():
            _check_row_name(self._at("rows"), name)
            _check_options(self._at(f"rows.{name}"), options)
            for option in _REQUIRED - self.options.keys() - options.keys():
                raise SweepError(
                    f"{self._at(f'rows.{name}')}: no {option}; state it there or under 'options'"
                )

    def _at(self, place: str) -> str:
        return f"{self.source}: {place}"

    def _config(self, place: str, options: Options, seed: int) -> RunConfig:
        typed = {name: _typed(self._at(place), name, value) for name, value in options.items()}
        try:
            return RunConfig(**{**typed, "seed": seed})
        except TdlrtError as error:
            raise SweepError(f"{self._at(place)}: {error}") from error


def _check_options(place: str, options: Options) -> None:
    for name in options:
        if name == "seed":
            raise SweepError(f"{place}.seed: seeds belong to the sweep; write 'seeds: [0, 1]'")
        _known(place, "option", name, _HINTS)


def _known(place: str, kind: str, name: object, table: Mapping[str, Any]) -> None:
    try:
        pick(kind, str(name), table)
    except TdlrtError as error:
        raise SweepError(f"{place}: {error}") from error


def _grid(row: str, options: Options, place: str) -> Iterator[tuple[str, Options]]:
    """One row per combination of the values that are lists."""
    lists = {name: values for name, values in options.items() if isinstance(values, list)}
    for name, values in lists.items():
        if not values:
            raise SweepError(f"{place}.{name} []: expected at least one value")
    for point in itertools.product(*(enumerate(values) for values in lists.values())):
        chosen = dict(zip(lists, point, strict=True))
        words = [f"_{name}={_text(value, number)}" for name, (number, value) in chosen.items()]
        yield row + "".join(words), {**options, **{name: v for name, (_, v) in chosen.items()}}


def _text(value: Any, number: int) -> str:
    """A value in the name of a directory; one that is no single word has its number instead."""
    text = format_rank(value) if isinstance(value, dict) else str(value)
    return text if ROW_NAME.fullmatch(text) else f"choice{number + 1}"


_HINTS: dict[str, Any] = get_type_hints(RunConfig)
_OPEN = {field.name for field in fields(RunConfig) if field.default is None}
_REQUIRED = {field.name for field in fields(RunConfig) if field.default is MISSING}


def _typed(place: str, name: str, value: Any) -> Any:
    """The value, if its type is the option's; a number in words ("1e-3" in YAML) as a number."""
    kinds = set(_kinds(_HINTS[name]))
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits and not (value is None and name in _OPEN):
        names = " or ".join(sorted(kind.__name__ for kind in kinds if kind is not type(None)))
        raise SweepError(f"{place}.{name} {value!r}: expected {names}")
    return value


def _kinds(hint: Any) -> Iterator[type]:
    """The classes that values of a type annotation have."""
    if isinstance(hint, type) and get_origin(hint) is None:
        yield hint
    elif isinstance(get_origin(hint), type) and get_origin(hint) in (dict, list):
        yield get_origin(hint)
    else:
        for part in get_args(hint):
            yield from _kinds(part) if not isinstance(part, str) else (str,)


def read_sweep(path: str | Path, overrides: Options | None = None) -> Sweep:
    """Read a sweep from a YAML file.

    Args:
        path: The file; its keys are `options`, `rows`, `seeds`, `title` and `note`.
        overrides: Shared options that go before those of the file, and `seeds`.

    Raises:
        SweepError: The file cannot be read or holds something else; the message names the place.
    """
    source = str(path)
    try:
        content = read_yaml(Path(path))
    except ValueError as error:
        raise SweepError(f"{source}: {error}") from error
    content = _mapping(source, content)
    for key in content:
        _known(source, "key", key, dict.fromkeys(KEYS))
    rows = _mapping(f"{source}: rows", content.get("rows"))
    overrides = dict(overrides or {})
    seeds = overrides.pop("seeds", content.get("seeds", [0]))
    return Sweep(
        options=_mapping(f"{source}: options", content.get("options", {})) | overrides,
        rows={name: _mapping(f"{source}: rows.{name}", rows[name] or {}) for name in rows},
        seeds=_seeds(f"{source}: seeds", seeds),
        title=str(content.get("title", Path(path).stem)),
        note=str(content.get("note", "")),
        source=source,
    )


def _mapping(place: str, value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise SweepError(f"{place}: got {value!r}, expected names and their values")
    return value


def _check_row_name(place: str, name: object) -> None:
    if not isinstance(name, str) or not ROW_NAME.fullmatch(name) or name == REPORT:
        raise SweepError(
            f"{place}: got the name {name!r}; expected a word of letters, digits and . , + - _, at "
            f"most 100 of them, other than '{REPORT}'; it becomes a directory"
        )


def _seeds(place: str, seeds: Any) -> tuple[int, ...]:
    fits = isinstance(seeds, list | tuple) and seeds and all(type(seed) is int for seed in seeds)
    if not fits or len(set(seeds)) < len(seeds):
        raise SweepError(f"{place} {seeds!r}: expected a list of different integers")
    return tuple(seeds)


def check_directories(runs: Sequence[SweepRun]) -> None:
    """Refuse, before anything runs, directories that hold something else than these runs.

    Raises:
        RunError: A directory holds other files, a run with other options, or one that another
            version of tdlrt finished.
    """
    for run in runs:
        directory = run.directory
        if not directory.config.exists():
            directory.check_new(overwrite=False)
            continue
        directory.check_resume(run.config)
        if run.done:
            found = directory.read_summary().get("versions", {}).get("tdlrt")
            if found != versions()["tdlrt"]:
                raise RunError(
                    f"{directory.path}: made by tdlrt {found}, this is {versions()['tdlrt']}; "
                    "choose another directory with --out"
                )


def describe(sweep: Sweep, out: Path) -> None:
    """Store title and note where the report finds them."""
    text = json.dumps({"title": sweep.title, "note": sweep.note}, indent=2) + "\n"
    write_atomically(out / DESCRIPTION, lambda file: file.write(text.encode()))


def check_data(runs: Sequence[SweepRun]) -> None:
    """Read every data set that a run which is not done needs, once.

    Raises:
        DataError: One of them cannot be read.
    """
    configs = [run.config for run in runs if not run.done]
    for name, folder, images, size in {
        (c.data, c.data_dir, c.train_images, c.image_size) for c in configs
    }:
        load_data(name, folder, train_images=images, image_size=size)
