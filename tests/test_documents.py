"""The python blocks of the documents run, one after the other."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "name",
    [
        "adapters.md",
        "checkpoints.md",
        "compare.md",
        "export.md",
        "methods.md",
        "training-loops.md",
        pytest.param("training-stacks.md", marks=pytest.mark.slow),
    ],
)
# Lightning uses a class of torch's pytree that torch has deprecated, and advises more workers.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    namespace = {"checkpoint": tmp_path / "checkpoint.pt", "folder": tmp_path / "sweep"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block[1], str(DOCS / name), "exec")
        exec(code, namespace)
