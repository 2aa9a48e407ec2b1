"""The package as such: its surface, and what importing it costs."""

import subprocess
import sys

import tdlrt


def test_the_public_surface():
    assert set(tdlrt.__all__) == {
        "AdapterError",
        "CheckpointError",
        "CubicSchedule",
        "FixedRank",
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
import logging, random, sys, torch
before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), logging.root.handlers
loaded = set(sys.modules)
import tdlrt
extras = {"typer", "rich", "yaml", "matplotlib", "sklearn", "datasets", "pyarrow", "PIL"}
extras |= {"lightning", "transformers", "accelerate", "tensorboard"}
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert not new & extras, new & extras
after = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), logging.root.handlers
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


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
