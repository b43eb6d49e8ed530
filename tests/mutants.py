"""A run of the mutants: one mistake at a time in a copy of the tree, and its tests.

    python -m tests.mutants [--only REGEX] [--write]

Each mutant of ``tests/mutants.txt`` replaces one text of one file and runs the
narrowest tests that should notice. Before, the same tests must pass without it.
Exits with 1 if a mutant survives. ``--write`` puts what ran into
tests/results/mutants.csv, which keeps the rows of the other mutants.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".txt")
TABLE = ROOT / "tests" / "results" / "mutants.csv"
COLUMNS = ["file", "mutant", "noticed_by", "date"]
COPIED = "vllm_sink kernels tests scripts docs pyproject.toml README.md CHANGELOG.md"
TIMEOUT = 300  # seconds of a target
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE}
SURVIVED = "survived"


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Args:
        name: What the mutated code does.
        file: Relative to the repository.
        old, new: The text and what takes its place.
        target: What pytest is given.
    """

    name: str
    file: str
    old: str
    new: str
    target: str

    def apply(self, text: str) -> str:
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"old text of {self.name!r} must occur once in {self.file}, got "
                f"{count} times; mend tests/mutants.txt"
            )
        return text.replace(self.old, self.new)


def read() -> list[Mutant]:
    """The mutants of tests/mutants.txt."""
    mutants: list[Mutant] = []
    file = target = name = ""
    old: list[str] = []
    new: list[str] = []

    def finish() -> None:
        if old:
            assert name and new, f"a mutant without a name or a new text: {old}"
            texts = "\n".join(old), "\n".join(new)
            mutants.append(Mutant(name, file, *texts, target))
        old.clear()
        new.clear()

    for line in LIST.read_text().splitlines():
        if line.startswith("- "):
            assert not new, f"old text after the new: {line}"
            old.append(line[2:])
        elif line.startswith("+ "):
            new.append(line[2:])
        else:
            finish()
            if line.startswith("@ "):
                file, target = line[2:].split(" | ")
            elif line and not line.startswith("#"):
                name = line
    finish()
    return mutants


class Copy:
    """A copy of the tree in which mutants live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
        for name in COPIED.split():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, folder / name)
        self._check()

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PYTHONPATH": f"{self.folder}:{self.folder / 'kernels'}",
            "PYTHONDONTWRITEBYTECODE": "1",  # no stale one of a mutant
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.run(
            ["nice", "-n", "15", sys.executable, *command],
            cwd=self.folder,
            env=environment,
            timeout=TIMEOUT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _check(self) -> None:
        """The copy is what is imported, not the tree nor what is installed."""
        names = "vllm_sink", "vllm_sink_kernels.cpu", "tests"
        imports = f"import {', '.join(names)}; print(*["
        imports += ", ".join(f"{name}.__file__" for name in names) + "])"
        files = self.run(["-c", imports]).stdout.splitlines()[-1].split()
        assert len(files) == 3, files
        assert all(Path(file).is_relative_to(self.folder) for file in files), files

    def test(self, target: str) -> tuple[bool, str]:
        """Whether ``target`` passes, and else what failed first."""
        interpreted = {}
        if re.match("tests/(gpu_path|kernels)/", target):
            interpreted = {"TRITON_INTERPRET": "1"}
        command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            done = self.run([*command, *shlex.split(target)], **interpreted)
        except subprocess.TimeoutExpired:
            return False, "the time limit"
        if done.returncode == 0:
            assert re.search(r"\d+ passed", done.stdout), f"{target} runs no test"
            return True, ""
        if -done.returncode in CRASHES:
            return False, f"a crash ({signal.Signals(-done.returncode).name})"
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        assert failed, f"{target} failed in no test:\n{done.stdout[-3000:]}"
        return False, failed[0].rpartition("::")[2].partition("[")[0]


def run(mutants: list[Mutant], writes: bool) -> dict[str, str]:
    """Of each mutant, the test that noticed it, or :data:`SURVIVED`."""
    noticed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        for target in dict.fromkeys(mutant.target for mutant in mutants):
            start = time.monotonic()
            passes, failed = copy.test(target)
            assert passes, f"{target} fails in {failed} without any mutant"
            print(f"{time.monotonic() - start:5.0f} s  {target}", flush=True)
            for mutant in mutants:
                if mutant.target != target:
                    continue
                start, path = time.monotonic(), copy.folder / mutant.file
                text = path.read_text()
                path.write_text(mutant.apply(text))
                try:
                    passes, failed = copy.test(target)
                finally:
                    path.write_text(text)
                noticed[mutant.name] = SURVIVED if passes else failed
                print(
                    f"{time.monotonic() - start:5.0f} s    {mutant.name}: "
                    f"{noticed[mutant.name]}",
                    flush=True,
                )
            if writes:
                write(noticed)
    return noticed


def write(noticed: dict[str, str]) -> None:
    """Update the table: a row a mutant of the list that has ever run, in its order."""
    with TABLE.open(newline="") as file:
        rows = {row["mutant"]: row for row in csv.DictReader(file)}
    today = date.today().isoformat()
    for name, test in noticed.items():
        rows[name] = {"mutant": name, "noticed_by": test, "date": today}
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for mutant in read():
            if mutant.name in rows:
                table.writerow(rows[mutant.name] | {"file": mutant.file})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("--only", default="", help="of file and name, a pattern")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    chosen = [m for m in read() if re.search(options.only, f"{m.file} {m.name}")]
    noticed = run(chosen, options.write)
    survivors = [name for name, test in noticed.items() if test == SURVIVED]
    minutes = (time.monotonic() - start) / 60
    print(f"{len(noticed)} mutants, {len(survivors)} survived, {minutes:.0f} minutes")
    for name in survivors:
        print(f"  {name}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
