import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tdlrt_lab.cli import doctor

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_it_prints_versions_devices_and_extras(tdlrt):
    code, out, err = tdlrt("doctor")
    assert (code, err) == (0, "")
    assert f"torch {metadata.version('torch')}" in out
    assert out.endswith(f"torch threads: {torch.get_num_threads()}\n")
    assert re.search(r"^ cpu .* works *$", out, re.MULTILINE)
    assert re.search(r"^ cli .* installed *$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_json(tdlrt):
    code, out, _ = tdlrt("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["devices"][0]["name"] == "cpu"
    assert found["devices"][0]["error"] is None
    packages = {extra["name"]: extra["packages"] for extra in found["extras"]}
    assert packages["data"]["pillow"] == metadata.version("pillow")


def test_what_is_missing_and_what_is_too_old(tdlrt, monkeypatch):
    def version(package, installed=metadata.version):
        if package == "datasets":
            raise metadata.PackageNotFoundError(package)
        return {"pillow": "9.5.1"}.get(package) or installed(package)

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = tdlrt("doctor")
    assert code == 0  # an extra is a choice, not a fault
    row = re.search(r"^ data .*?(?=^ \w)", out, re.MULTILINE | re.DOTALL)
    assert "datasets," in row[0]
    assert "pillow>=10" in row[0]
    assert "\nto install what is missing: pip install 'tdlrt[data]'\n" in out


def test_a_broken_device_fails(tdlrt, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr("tdlrt.TDLRT", broken)
    code, out, err = tdlrt("doctor")
    assert code == 1
    assert "no kernel image" in out
    assert err == "error: a training step failed on cpu\n"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", [2, 13]), ("0.1.5.post2022", [0, 1, 5]), ("10", [10]), (None, [])],
)
def test_releases(version, numbers):
    assert doctor._release(version) == numbers


def test_every_extra_of_the_project_is_explained():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert set(doctor.ENABLES) == set(extras) - {"dev", "docs"}
