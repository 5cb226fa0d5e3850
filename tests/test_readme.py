"""The README and the pages of docs/: their code runs, their commands parse, their figures are the committed ones.

Python blocks run as they stand, page by page, each block in a fresh namespace. A block whose first line is a comment
with a file name is saved under that name instead, for the blocks after it to import; the shell commands of such a page
run too. ``<!-- skip: reason -->`` in the line before a block leaves it out.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import sentences  # noqa: E402

BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<skip>[^\n]+) -->\n)?```(?P<kind>python|bash)\n(?P<text>.*?)^```", re.DOTALL | re.M
)
# Runs the blocks of a page, given as pairs of line and code, so that a traceback names the page's own lines.
RUNNER = """
import sys
page, *blocks = sys.argv[1:]
for line, code in zip(blocks[::2], blocks[1::2]):
    exec(compile("\\n" * int(line) + code, page, "exec"), {"__name__": "__main__"})
"""
# Commands that would install something, or run these tests in themselves.
ELSEWHERE = ("pip install", "python -m pytest", "pytest benchmarks/")
TRAIN = re.compile(r"^(?:torchrun .*?|python )(?:python/train\.py|-m udi_trainer)(?= |$)|^udi-train(?= |$)")


@dataclass
class Block:
    kind: str
    text: str
    line: int  # of its first line of code, from 1
    skip: str | None

    @property
    def file(self) -> str | None:
        name = re.match(r"# (\w+\.py)\n", self.text)
        return name[1] if name else None

    @property
    def commands(self) -> list[str]:
        lines = (line.split(" #")[0] for line in self.text.splitlines())
        return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def blocks(page: Path, kind: str) -> list[Block]:
    text = page.read_text()
    found = [
        Block(m["kind"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["skip"]) for m in BLOCK.finditer(text)
    ]
    return [block for block in found if block.kind == kind]


PAGES = [page for page in sentences.pages() if page.name != "CONTRIBUTING.md"]
README = ROOT / "README.md"
COMMANDS = [command for block in blocks(README, "bash") for command in block.commands]
SHELL = [page for page in PAGES if page != README and blocks(page, "bash")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(*command, cwd):
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    end = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert end.returncode == 0, end.stderr
    return end.stdout


def saved(page: Path, folder: Path) -> list[Block]:
    """Saves the page's files in the folder; the other Python blocks, without the skipped ones."""
    chosen = [block for block in blocks(page, "python") if not block.skip]
    for block in chosen:
        if block.file:
            (folder / block.file).write_text(block.text)
    return [block for block in chosen if not block.file]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python(page, tmp_path):
    pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
    arguments = [x for block in saved(page, tmp_path) for x in (str(block.line - 1), block.text)]
    run(sys.executable, "-c", RUNNER, str(page), *arguments, cwd=tmp_path)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ELSEWHERE)])
def test_command(command, tmp_path):
    program, script, *options = shlex.split(command)
    assert program == "python"
    path = ROOT / script
    run(sys.executable, str(path) if path.exists() else script, *options, cwd=tmp_path)


@pytest.mark.parametrize("page", SHELL, ids=name)
def test_options_of_commands(page, tmp_path):
    """Commands that train have options that exist; where the page defines what they train, they run."""
    command = pytest.importorskip("udi_trainer.command")
    saved(page, tmp_path)
    for line in (c for block in blocks(page, "bash") if not block.skip for c in block.commands):
        options = shlex.split(TRAIN.sub("", line)) if TRAIN.match(line) else None
        if options is None or options[:1] in (["manifest"], ["predict"]):
            continue
        if any(file.stem + ":" in line for file in tmp_path.glob("*.py")):
            run(sys.executable, "-m", "udi_trainer", *options, cwd=tmp_path)
        else:
            command.parse(options)


def test_all_commands_are_known():
    assert len(COMMANDS) >= 3 and any(c.startswith("python python/train.py") for c in COMMANDS)


def test_readme_is_short():
    assert README.read_text().count("\n") < 160


@pytest.mark.parametrize("what", ["A method", "A dataset", "An encoder", "An op"])
def test_extending_is_short(what):
    """An example and the code that uses it have under 30 lines of code together."""
    _, *sections = re.split(r"^## (.*)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.M)
    section = dict(zip(sections[::2], sections[1::2], strict=True))[what]
    code = "".join(m["text"] for m in BLOCK.finditer(section) if m["kind"] == "python")
    assert 0 < len([line for line in code.splitlines() if line.strip()]) < 30


@pytest.mark.parametrize("page", sentences.pages(), ids=name)
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not target.startswith("http")]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", sentences.pages(), ids=name)
def test_sentences_are_short(page, capsys):
    assert sentences.main([page]) == 0, capsys.readouterr().out


def test_sentences_are_counted():
    page = "# Title\n\n**Head.** One two `x = 3` four. Five\nsix!\n\n```python\nnot prose\n```\n\n| a | b |\n\n"
    page += "- seven [eight](u.md)\n- nine\n\n    a = b + c\n\nTen: 0.5\neleven."
    assert list(map(len, sentences.sentences(page))) == [4, 2, 2, 1, 3]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "trainer.md", ROOT / "docs" / "studies.md"], ids=name)
def test_accuracies_are_committed(page):
    """Each mean ± deviation stands in the table of a study."""
    tables = "".join(path.read_text() for path in (ROOT / "python" / "results").glob("*/table.md"))
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+", page.read_text())
    assert figures and not [figure for figure in figures if figure not in tables]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "speed.md"], ids=name)
def test_times_are_committed(page):
    """Each row of an op has the times and the speedup of the committed run."""
    table = (ROOT / "benchmarks" / "results" / "cpu-2-threads-avx512" / "table.md").read_text()
    row = r"\| ([\d.]+ [mµ]s)(?: \(plan\))? \| ([\d.]+ [mµ]s) [^|]*\| ([\d.]+×) \|"
    rows, committed = re.findall(row, page.read_text()), re.findall(row, table)
    assert len(rows) >= 6 and set(rows) <= set(committed)
