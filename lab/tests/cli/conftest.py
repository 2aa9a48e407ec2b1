import sys

import pytest

from tdlrt_lab.cli import main


@pytest.fixture
def tdlrt(monkeypatch, capsys):
    """Run a command line in this process; gives exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tdlrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "80")
    return call
