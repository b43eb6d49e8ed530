"""The rooms: a module imports only its own room and those below it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_sink"
# From the ground up; a room may use itself and what stands before it. A room is a
# folder, with all that is in it, or a module.
FLOORS = ["policy", "settings", "engine", "cache", "rotation", "attention"]
FLOORS += ["start", "plugin", "tools"]
KERNEL_USERS = {"attention"}
MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "popitem"}
MUTATORS |= {"remove", "setdefault", "update"}


def files_of(room: str) -> list[Path]:
    module = PACKAGE / f"{room}.py"
    return [module] if module.exists() else sorted((PACKAGE / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_is_in_a_room():
    known = {file for room in FLOORS for file in files_of(room)}
    known |= {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    assert known == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("room", FLOORS)
def test_arrows_run_down(room):
    files = files_of(room)
    assert files, f"no room {room}"
    allowed = set(FLOORS[: FLOORS.index(room) + 1])
    for file in files:
        for name in imports(file):
            package, _, rest = name.partition(".")
            if package == "vllm_sink" and rest.split(".")[0] in FLOORS:
                assert rest.split(".")[0] in allowed, f"{file} imports {name}"
            if package == "vllm_sink_kernels":
                assert room in KERNEL_USERS, f"{file} imports {name}"


def test_the_policy_is_pure():
    for file in files_of("policy"):
        packages = {name.split(".")[0] for name in imports(file)}
        assert not packages & {"torch", "triton", "vllm"}, file
    names = [f"vllm_sink.policy.{file.stem}" for file in files_of("policy")]
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "vllm_sink.policy.layout" in loaded
    assert not {"torch", "triton", "vllm"} & set(loaded)


def test_kernels_stand_alone():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        packages = {name.split(".")[0] for name in imports(file)}
        assert not packages & {"vllm", "vllm_sink"}, file


def test_no_file_edits_the_path_of_imports():
    """pytest's ``pythonpath``, ``python -m`` or the installed package find modules."""
    edit = re.compile(r"sys\.path(\.[a-z]+\(|\[[\d:]+\] *=| *\+?= )")
    folders = ["benchmarks", "evals", "kernels", "scripts", "tests", "vllm_sink"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    sources = [file for file in files if file.suffix in {".py", ".sh"}]
    assert len(sources) > 100
    for file in sources:
        assert not edit.search(file.read_text()), file


@pytest.mark.parametrize("room", FLOORS)
def test_no_module_keeps_state(room):
    """State of an engine is in its record. Module-level tables are constants."""
    for file in files_of(room):
        tree = ast.parse(file.read_text())
        tables = {name for node in tree.body for name in table_names(node)}
        assert all(name.isupper() for name in tables), f"{file}: {tables}"
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Global), f"{file}:{node.lineno} global"
            is_item = isinstance(node, ast.Subscript)
            if is_item and isinstance(node.ctx, ast.Load):
                continue
            if is_item or (isinstance(node, ast.Attribute) and node.attr in MUTATORS):
                assert ast.unparse(node.value) not in tables, f"{file}:{node.lineno}"


def table_names(node: ast.stmt) -> set[str]:
    """Names that a statement gives to something that can be changed in place."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not is_mutable(node.value):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {ast.unparse(target) for target in targets}


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func).rpartition(".")[2]
        return name in {"dict", "list", "set", "defaultdict"} or name.startswith("Weak")
    kinds = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
    return isinstance(value, kinds)
