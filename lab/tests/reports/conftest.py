import functools

import pytest

from report_page.runs import write_directory, write_full_sweep, write_sweep


@pytest.fixture
def write_run(tmp_path):
    """Write a run directory below `tmp_path`, as a run would have; any number can be replaced."""
    return functools.partial(write_directory, tmp_path)


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


@pytest.fixture(scope="session")
def shared_sweep(tmp_path_factory):
    """A sweep with a description, a failure with markup in it, and ranks that vary."""
    return write_full_sweep(tmp_path_factory.mktemp("sweep"))
