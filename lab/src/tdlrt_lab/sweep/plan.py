"""A sweep: shared options, rows that may be grids, and seeds; and the runs that they define."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tdlrt.errors import TdlrtError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.names import pick
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.yaml_files import read_yaml

__all__ = [
    "DESCRIPTION",
    "Sweep",
    "SweepError",
    "SweepRun",
    "read_sweep",
]

Options = Mapping[str, Any]

KEYS = ("title", "note", "options", "rows", "seeds")
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.,+_-]{0,99}")
MAX_NAME_LENGTH = 200
DESCRIPTION = "sweep.json"
REPORT = "report"
"""The folder, beside those of the rows, that `tdlrt report` writes."""


class SweepError(TdlrtError, ValueError):
    """The description of a sweep is not valid."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        row: Name of its row, with the values of this point of the grid.
        config: Its options.
        out: Directory of the sweep.
    """

    row: str
    config: RunConfig
    out: Path

    @property
    def name(self) -> str:
        """Row and seed: "ROW/seedN"."""
        return f"{self.row}/seed{self.config.seed}"

    @property
    def directory(self) -> RunDirectory:
        """The run directory."""
        return RunDirectory(self.out / self.row / f"seed{self.config.seed}")

    @property
    def lock(self) -> Path:
        """The lock file, held by the process that does the run."""
        return self.directory.path.with_suffix(".lock")

    @property
    def failure(self) -> Path:
        """The file that says why the last attempt failed."""
        return self.directory.path.with_suffix(".error.json")

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.directory.summary.exists()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every row with every seed, and options that all rows share.

    Attributes:
        options: Options of `RunConfig` that all rows share.
        rows: Options of each row by name; they override the shared ones.
        seeds: Seeds of each row.
        title: Heading of the report.
        note: A remark for the report.
        source: Where the sweep was defined, for error messages.

    If an option, shared or of a row, is a list, the row stands for one row per value, and with
    several lists for one row per combination.

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
        """All runs, ordered by seed, then by row. Every option is checked.

        Raises:
            SweepError: An option is unknown, of the wrong type or out of range, or two rows are
                the same; the message names the place.
        """
        self._check_rows()
        runs = [
            SweepRun(row=row, config=self._config(place, options, seed), out=Path(out))
            for seed in self.seeds
            for place, name in ((f"rows.{name}", name) for name in self.rows)
            for row, options in _grid(name, {**self.options, **self.rows[name]}, self._at(place))
        ]
        seen: dict[str, str] = {}
        for run in runs:
            if len(run.row) > MAX_NAME_LENGTH:
                raise SweepError(
                    f"{self.source}: the name {run.row} has {len(run.row)} characters, expected at "
                    f"most {MAX_NAME_LENGTH}, because it is the name of a directory"
                )
            first = seen.setdefault(json.dumps(run.config.to_dict()), run.name)
            if first != run.name:
                raise SweepError(
                    f"{self.source}: {run.name} is the same run as {first}; leave out one of them"
                )
        return runs

    def _check_rows(self) -> None:
        if not self.rows:
            raise SweepError(f"{self._at('rows')}: expected at least one row")
        _check_options(self._at("options"), self.options)
        for name, options in self.rows.items():
            _check_row_name(self._at("rows"), name)
            _check_options(self._at(f"rows.{name}"), options)
            for option in _REQUIRED - self.options.keys() - options.keys():
                raise SweepError(
                    f"{self._at(f'rows.{name}')}: no {option}; add it there or under 'options'"
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
            raise SweepError(f"{place}.seed: a seed cannot be an option; write 'seeds: [0, 1]'")
        _check_name(place, "option", name, _HINTS)


def _check_name(place: str, kind: str, name: object, table: Mapping[str, Any]) -> None:
    try:
        pick(kind, str(name), table)
    except TdlrtError as error:
        raise SweepError(f"{place}: {error}") from error


def _grid(row: str, options: Options, place: str) -> Iterator[tuple[str, Options]]:
    """The name and options of one row per combination of the options that are lists."""
    lists = {name: values for name, values in options.items() if isinstance(values, list)}
    for name, values in lists.items():
        if not values:
            raise SweepError(f"{place}.{name} []: expected at least one value")
    for point in itertools.product(*(enumerate(values) for values in lists.values())):
        chosen = dict(zip(lists, point, strict=True))
        suffix = "".join(f"_{name}={_text(v, number)}" for name, (number, v) in chosen.items())
        yield row + suffix, {**options, **{name: v for name, (_, v) in chosen.items()}}


def _text(value: Any, number: int) -> str:
    """A value as part of a directory name; its number if its text has other characters."""
    text = format_rank(value) if isinstance(value, dict) else str(value)
    return text if ROW_NAME.fullmatch(text) else f"choice{number + 1}"


_HINTS: dict[str, Any] = get_type_hints(RunConfig)
_OPTIONAL = {field.name for field in fields(RunConfig) if field.default is None}
_REQUIRED = {field.name for field in fields(RunConfig) if field.default is MISSING}


def _typed(place: str, name: str, value: Any) -> Any:
    """The value of an option, after a check of its type; "1e-3", a string in YAML, as a number."""
    kinds = set(_kinds(_HINTS[name]))
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits and not (value is None and name in _OPTIONAL):
        names = " or ".join(sorted(kind.__name__ for kind in kinds if kind is not type(None)))
        raise SweepError(f"{place}.{name} {value!r}: expected {names}")
    return value


def _kinds(hint: Any) -> Iterator[type]:
    """The classes that a type annotation allows."""
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
        path: The file, with the keys `options`, `rows`, `seeds`, `title` and `note`.
        overrides: Options that replace the shared options of the file; may contain `seeds`.

    Raises:
        SweepError: The file cannot be read or is not valid; the message names the place.
    """
    source = str(path)
    try:
        content = read_yaml(Path(path))
    except ValueError as error:
        raise SweepError(f"{source}: {error}") from error
    content = _mapping(source, content)
    for key in content:
        _check_name(source, "key", key, dict.fromkeys(KEYS))
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
        raise SweepError(f"{place}: got {value!r}, expected a mapping of names to values")
    return value


def _check_row_name(place: str, name: object) -> None:
    if not isinstance(name, str) or not ROW_NAME.fullmatch(name) or name == REPORT:
        raise SweepError(
            f"{place}: got the name {name!r}; expected at most 100 letters, digits and . , + - _, "
            f"the first a letter or digit, and not '{REPORT}'; it is the name of a directory"
        )


def _seeds(place: str, seeds: Any) -> tuple[int, ...]:
    fits = isinstance(seeds, list | tuple) and seeds and all(type(seed) is int for seed in seeds)
    if not fits or len(set(seeds)) < len(seeds):
        raise SweepError(f"{place} {seeds!r}: expected a list of different integers")
    return tuple(seeds)
