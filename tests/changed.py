"""Test files that import what changed: ``bash scripts/test.sh --changed`` runs them.

    python -m tests.changed [REVISION]

Prints the test files that reach a file which differs from REVISION (default: where the
branch left ``origin/main``, or ``main``), one a line. A file reaches what it imports or
names in a string as a dotted module, its ``conftest.py`` and packages, and what those
reach. vLLM loads the plugin: whatever imports vLLM reaches ``vllm_sink``. A file that
is read or run (a table of the docs, a script) is reached by its name in a string.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import deque
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders in which a dotted name is looked up.
ROOTS = [ROOT, ROOT / "kernels"]
# What vLLM loads by itself, where it is imported.
PLUGIN = "vllm_sink"
# These read sources as texts.
READERS = ["tests/policy/test_mutants.py", "tests/policy/test_rooms.py"]
NAMELESS = {"__init__.py", "conftest.py", "README.md", "config.json"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def strings(path: Path) -> set[str]:
    """Constant texts of a file, docstrings among them."""
    return {
        node.value
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def module_of(name: str, beside: Path) -> Path | None:
    """The file of a dotted name, or of the module that the name is in.

    Args:
        beside: A folder in which a name is looked up, too.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for root in (*ROOTS, beside):
            path = root.joinpath(*parts[:end])
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    return file
    return None


def packages_of(path: Path) -> set[Path]:
    """Files that Python or pytest runs before a file, for its folder's sake."""
    found = set()
    for folder in path.parents:
        if folder == ROOT:
            break
        found |= {folder / "__init__.py", folder / "conftest.py"}
    return {file for file in found if file.is_file()} - {path}


@cache
def reached_at_once(path: Path) -> frozenset[Path]:
    """Files that a source needs by itself."""
    names = set(imports(path))
    dotted = re.compile(
        r"\b(?:vllm_sink|vllm_sink_kernels|tests|evals|scripts)\.[.\w]+"
    )
    for text in strings(path):
        names |= {match.rstrip(".") for match in dotted.findall(text)}
    # A conftest's fixtures import vLLM for the tests that ask for them.
    if path.name != "conftest.py" and any(n.split(".")[0] == "vllm" for n in names):
        names.add(PLUGIN)
    found = {module_of(name, path.parent) for name in names} - {None, path}
    if path.is_relative_to(ROOT / "tests"):
        found |= packages_of(path)
    return frozenset(found)


def reached(path: Path) -> set[Path]:
    """All files that a source needs, itself among them."""
    found, queue = {path}, deque([path])
    while queue:
        for file in reached_at_once(queue.popleft()) - found:
            found.add(file)
            queue.append(file)
    return found


def test_files() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


def find(changed: list[Path]) -> list[Path]:
    """Test files that reach one of these files.

    Args:
        changed: Absolute; a file may be gone.
    """
    names = {re.escape(path.name) for path in changed} - {*map(re.escape, NAMELESS)}
    # Whole names, and none at all where nothing has a name.
    named = re.compile(rf"(?<![\w.-])(?:{'|'.join(names) or '(?!)'})(?![\w-])")
    found = []
    for test in test_files():
        files = reached(test)
        mine = {file for file in files if file.is_relative_to(ROOT / "tests")}
        if (
            files & set(changed)
            or (changed and str(test.relative_to(ROOT)) in READERS)
            or any(named.search(text) for file in mine for text in strings(file))
        ):
            found.append(test)
    return found


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout


def changed_since(revision: str) -> list[Path]:
    """Files that differ, staged, unstaged and untracked ones among them."""
    base = git("merge-base", "HEAD", revision).strip()
    names = git("diff", "--name-only", base).splitlines()
    names += git("ls-files", "--others", "--exclude-standard").splitlines()
    return [ROOT / name for name in names]


def default_revision() -> str:
    known = git("for-each-ref", "--format=%(refname:short)").split()
    return "origin/main" if "origin/main" in known else "main"


def main() -> int:
    revision = sys.argv[1] if len(sys.argv) > 1 else default_revision()
    for path in find(changed_since(revision)):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
