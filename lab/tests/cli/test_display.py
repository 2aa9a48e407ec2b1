import io
import re

import pytest
from rich.console import Console

from tdlrt_lab.cli.display import RunDisplay
from tdlrt_lab.cli.screens import LiveScreen
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.runner import run


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=30)


def test_terminal_shows_lines_ranks_and_progress(terminal, tmp_path):
    config = RunConfig(
        model="lenet5", data="digits", epochs=2, batch_size=256, tau=0.5, init_scale=1.0
    )
    with LiveScreen(terminal) as screen:
        run(config, tmp_path / "run", observer=RunDisplay(screen, "there"), baseline=True)
    written = terminal.file.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "conv1 9x1x5x5" in text  # the ranks at the start
    assert re.search(r"epoch 1/2  loss +\d\.\d+  accuracy +\d+\.\d\d %  compression", text)
    assert re.search(r"tdlrt  epoch [12]/2.*━.*\d+/12", text)
    assert re.search(r"dense  epoch [12]/2.*━.*\d+/12", text)
    assert "accuracy" in text.splitlines()[-2]
    assert text.splitlines()[-1] == "results, plots and checkpoints in there"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is back


def test_terminal_is_left_in_order_after_an_error(terminal):
    with pytest.raises(RuntimeError), LiveScreen(terminal) as screen:
        RunDisplay(screen, "there").loading("train", 1000, 60_000)
        raise RuntimeError
    written = terminal.file.getvalue()
    assert "reading train images" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
