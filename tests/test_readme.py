"""Everything README.md and CONTRIBUTING.md show works: Python blocks run, shell commands run or are checked.

A ``python`` block is run as a script in an empty folder. Put ``<!-- not run: why -->`` on the line before a block that
needs a network or a GPU; it is then only compiled. Every line of a ``bash`` block has to be of a kind known here.
"""

import ast
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
BLOCK = re.compile(r"(?P<note><!-- not run: [^>]+ -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SHORTER = {"demo": ["--short"]}  # arguments added to `python -m zoo.tools.NAME ...` so that it takes seconds
SETUP_COMMANDS = ("git", "cd")


def blocks(language: str) -> list:
    """(text, whether to run it) of every fenced block in that language, named by document and line."""
    found = []
    for document in DOCUMENTS:
        content = (ROOT / document).read_text()
        for match in BLOCK.finditer(content):
            if match["language"] == language:
                line = content.count("\n", 0, match.start("text")) + 1
                found.append(pytest.param(match["text"], match["note"] is None, id=f"{document}:{line}"))
    return found


def commands() -> list:
    """Words of every shell command and whether to run it."""
    found = []
    for block in blocks("bash"):
        text, run = block.values
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(pytest.param(words, run, id=shlex.join(words)))
    return found


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text, runs", blocks("python"))
def test_python_block(text, runs, tmp_path):
    """In a process of its own, as some blocks register what no other test knows of."""
    ast.parse(text)
    if runs:
        run([sys.executable, "-c", text], tmp_path)


@pytest.mark.parametrize("words, runs", commands())
def test_command(words, runs, tmp_path, pytestconfig):
    settings = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *arguments = [word for word in words if word not in settings] if words[0] in settings else words
    if program == "make":
        run(["make", "--dry-run", *arguments], ROOT)
    elif program == "pip":
        check_pip(arguments)
    elif Path(program).name == "python" and arguments[:1] == ["-m"]:
        check_tool(arguments[1], arguments[2:], runs, tmp_path)
    elif program.startswith(".venv/bin/"):
        check_developer_tool(Path(program).name, arguments, pytestconfig.getini("markers"))
    else:
        assert program in SETUP_COMMANDS, f"{DOCUMENTS} show a command this test does not know: {shlex.join(words)}"


def check_pip(arguments: list[str]) -> None:
    """Installs only this package, with extras that exist."""
    assert arguments[0] == "install"
    target = arguments[-1]
    name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", target).groups()
    assert name in (".", "vision-ssm-zoo")
    namespace = ast.parse((ROOT / "setup.py").read_text())
    known = {node.value for node in ast.walk(namespace) if isinstance(node, ast.Constant)}
    assert set((extras or "train").split(",")) <= known


def check_tool(module: str, arguments: list[str], runs: bool, folder: Path) -> None:
    """Runs a tool in an empty folder, shortened; one that is not run must at least exist."""
    name = module.removeprefix("zoo.tools.")
    assert (ROOT / "tools" / f"{name}.py").is_file(), f"there is no tool {module}"
    if runs:
        run([sys.executable, "-m", module, *arguments, *SHORTER.get(name, [])], folder)


def check_developer_tool(name: str, arguments: list[str], markers: list[str]) -> None:
    """Files and markers a pytest command names exist; the other tools are in the ``dev`` extra."""
    if name != "pytest":
        assert name in (ROOT / "setup.py").read_text()
        return
    for previous, argument in pairwise(["", *arguments]):
        assert not argument.startswith("tests/") or (ROOT / argument).is_file(), argument
        assert previous != "-m" or argument in [marker.partition(":")[0] for marker in markers], argument


def test_the_readme_starts_with_two_commands():
    shown = [parameter.values[0] for parameter in commands()]
    assert ["make", "demo"] in shown and ["make", "test"] in shown


def test_makefile_runs_tools_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    tools = re.findall(r"-m zoo\.tools\.(\w+)", makefile)
    assert tools
    assert [name for name in tools if not (ROOT / "tools" / f"{name}.py").is_file()] == []


def test_links_inside_the_repository_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), f"{document} links to {target}"
