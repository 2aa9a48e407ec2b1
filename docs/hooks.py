"""Hooks of MkDocs: files from beside this folder, and the help of the command line."""

import ast
import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "examples/*.py", "examples/*.ipynb")
HELP = "<!-- help of every command -->"


def on_files(files, config):
    """Take in what documents link to outside this folder, and a list of the examples."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "examples/index.md", content=list_of_examples()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to and from the folder above into links within the site; insert the help."""
    if HELP in markdown:
        markdown = markdown.replace(HELP, command_help())
    if "/" in page.file.src_uri:
        return markdown
    markdown = re.sub(r"\]\(\.\./examples/?\)", "](examples/index.md)", markdown)
    return re.sub(r"\]\((\.\./|docs/)", "](", markdown)


def list_of_examples():
    """A page with name and purpose of every script."""
    lines = ["# Examples", "", "This page says what each of the example scripts shows.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        purpose = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"- [{path.name}]({path.name}): {purpose}")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        lines.append(f"- [{path.name}]({path.name}): a notebook.")
    return "\n".join(lines) + "\n"


def command_help():
    """What `--help` prints for every command, 80 columns wide."""
    from tdlrt_lab.cli.app import run_app
    from tdlrt_lab.cli.commands import COMMANDS

    os.environ["COLUMNS"] = "80"
    parts = []
    for name in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            run_app([name, "--help"])
        lines = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        parts.append(f"## tdlrt {name}\n\n```text\n{lines}\n```")
    return "\n\n".join(parts)
