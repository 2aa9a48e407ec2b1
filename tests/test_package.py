"""The package as such: its surface, and what importing it costs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tdlrt

ROOT = Path(__file__).parents[1]


def test_the_public_surface():
    assert set(tdlrt.__all__) == {
        "AdapterError",
        "BudgetRecipe",
        "CheckpointError",
        "CubicSchedule",
        "FixedRank",
        "GraphedStep",
        "IntegratorStateError",
        "LinearSchedule",
        "MissingExtraError",
        "NonFiniteError",
        "NothingMatchedError",
        "ParameterBudget",
        "PathError",
        "RankError",
        "RelativeTolerance",
        "SetupError",
        "StateDictError",
        "TDLRT",
        "TdlrtError",
        "UnsupportedLayerError",
        "UnsupportedOptimizerError",
        "add_adapters_",
        "autotune_",
        "factorize_",
        "flattened_modes",
        "input_covariances",
        "load",
        "load_adapters",
        "merge_adapters_",
        "metrics",
        "nn",
        "save",
        "save_adapters",
        "spectral_penalty",
        "summary",
        "to_dense",
        "to_plain",
        "unload_adapters_",
    }
    assert all(hasattr(tdlrt, name) for name in tdlrt.__all__)


def test_importing_it_loads_no_extra_and_changes_no_global_state():
    script = """
import logging, os, random, sys, threading, warnings, torch, safetensors.torch

def state():
    yield from (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())
    yield from (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled())
    yield from (torch.get_rng_state().tolist(), random.getstate(), list(logging.root.handlers))
    yield from (list(warnings.filters), dict(os.environ), threading.active_count(), os.listdir())

before, loaded = list(state()), set(sys.modules)
import tdlrt
assert list(state()) == before
new = {name.split(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names)
assert new == {"tdlrt"}, new
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_module_says_where_the_command_line_is():
    done = subprocess.run([sys.executable, "-m", "tdlrt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'tdlrt[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    lab = (ROOT / "lab/pyproject.toml").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f'\nversion = "{tdlrt.__version__}"\n' in project
    assert f'\nversion = "{tdlrt.__version__}"\n' in lab
    assert f'"tdlrt=={tdlrt.__version__}"' in lab
    assert f"\nversion: {tdlrt.__version__}\n" in citation
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == tdlrt.__version__


@pytest.mark.parametrize("folder", [".", "lab"])
def test_the_metadata_name_the_supported_pythons(folder):
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: 3\.(\d+)", " ".join(project["classifiers"]))
    assert project["requires-python"] == f">=3.{named[0]}"
    assert f"Python 3.{named[0]} and newer" in (ROOT / "README.md").read_text()
    assert f"Python 3.{named[0]} or newer" in (ROOT / "docs/install.md").read_text()


def test_errors_are_the_library_s_and_the_matching_builtin():
    expected = {
        "UnsupportedLayerError": TypeError,
        "UnsupportedOptimizerError": TypeError,
        "CheckpointError": ValueError,
        "AdapterError": RuntimeError,
        "PathError": ValueError,
        "RankError": ValueError,
        "NothingMatchedError": ValueError,
        "SetupError": ValueError,
        "MissingExtraError": ImportError,
        "IntegratorStateError": RuntimeError,
        "StateDictError": RuntimeError,
        "NonFiniteError": ArithmeticError,
    }
    for name, builtin in expected.items():
        assert issubclass(getattr(tdlrt, name), tdlrt.TdlrtError)
        assert issubclass(getattr(tdlrt, name), builtin)
