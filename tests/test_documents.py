"""Code blocks of the documents run, their commands parse, their links lead somewhere."""

import codeop
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import tdlrt
from tdlrt_lab.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
}
SLOW = ("docs/training-stacks.md", "docs/tutorial.md")
TORCHRUN = "docs/distributed.md"  # tests/integrations/test_launchers.py starts it
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks_of(text, *languages):
    return [block for block in BLOCK.finditer(text) if block[1] in languages]


def parameters(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What the documents do not define: a network, data, paths."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield {
            "checkpoint": tmp_path / "checkpoint.pt",
            "folder": tmp_path / "sweep",
            "model": torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 5)),
            "loader": [(torch.randn(8, 32), torch.randint(5, (8,)))],
            "criterion": torch.nn.CrossEntropyLoss(),
        }


@pytest.mark.parametrize(
    "name", parameters(n for n, t in DOCUMENTS.items() if "```python" in t and n != TORCHRUN)
)
# Lightning uses a class of torch's pytree that torch has deprecated, and advises more workers.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_python_blocks_run(name, namespace):
    text = DOCUMENTS[name]
    blocks = blocks_of(text, "python")
    assert len(blocks) == text.count("```python")
    for block in blocks:
        line = text[: block.start(2)].count("\n")
        code = compile("\n" * line + block[2], str(ROOT / name), "exec")
        exec(code, namespace)
    if name == "README.md":  # its network learns
        assert namespace["accuracy"] > 0.85
        assert tdlrt.summary(namespace["model"]).compression >= 0.9


def test_blocks_of_the_first_pages_can_be_pasted_at_a_prompt():
    """There, an indented block ends at an empty line, and nowhere else."""
    for name in ("README.md", "docs/index.md", "docs/tutorial.md", "docs/how-to/from-scratch.md"):
        for block in blocks_of(DOCUMENTS[name], "python"):
            statement = []
            for line in [*block[2].splitlines(), ""]:
                statement.append(line)
                if codeop.compile_command("\n".join(statement), name, "single"):
                    statement.clear()
            assert statement == [], name


@pytest.mark.parametrize("name", [n for n, t in DOCUMENTS.items() if "\ntdlrt " in t])
def test_commands_parse(name):
    commands = typer.main.get_command(app)
    for block in blocks_of(DOCUMENTS[name], "", "sh"):
        for line in block[2].replace("\\\n", " ").splitlines():
            if line.startswith("tdlrt "):
                command, *arguments = shlex.split(line, comments=True)[1:]
                commands.get_command(None, command).make_context(command, arguments)


def anchors_of(text):
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", DOCUMENTS[name])):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert target.exists(), link
            if anchor:
                assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


MODULES = ["tdlrt", "tdlrt.export", "tdlrt.linalg", "tdlrt.nn"]
MODULES += [
    f"tdlrt.integrations.{name}" for name in ("distributed", "hub", "lightning", "transformers")
]


def public_objects():
    for path in MODULES:
        module = importlib.import_module(path)
        yield from ((f"{path}.{name}", getattr(module, name)) for name in module.__all__)


def test_the_reference_shows_every_public_name():
    shown = []
    for path in re.findall(r"^::: (\S+)$", DOCUMENTS["docs/api.md"], re.MULTILINE):
        thing = pkgutil.resolve_name(path)
        shown.append(thing)
        shown += [getattr(thing, name) for name in getattr(thing, "__all__", ())]
    missing = [name for name, thing in public_objects() if not any(thing is it for it in shown)]
    assert missing == []


def test_every_public_name_has_a_docstring():
    silent = []
    for name, thing in public_objects():
        if inspect.isclass(thing) or inspect.isfunction(thing):
            members = {name: thing}
            if inspect.isclass(thing):
                members |= {f"{name}.{k}": v for k, v in vars(thing).items() if k[0] != "_"}
            silent += [
                where
                for where, member in members.items()
                if (inspect.isroutine(member) or isinstance(member, type | property))
                and not inspect.getdoc(member)
            ]
    assert silent == []
