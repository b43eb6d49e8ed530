"""The rooms: a module imports only its own room and those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up; a room may use itself and what stands before it.
FLOORS = ["policy", "cache", "attention", "engine", "tools"]
KERNEL_USERS = {"attention"}


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FLOORS)
def test_arrows_run_down(room):
    files = sorted((ROOT / "vllm_sink" / room).glob("*.py"))
    assert len(files) > 1, f"no room {room}"
    allowed = set(FLOORS[: FLOORS.index(room) + 1])
    for file in files:
        for name in _imports(file):
            package, _, rest = name.partition(".")
            if package == "vllm_sink" and rest.split(".")[0] in FLOORS:
                assert rest.split(".")[0] in allowed, f"{file} imports {name}"
            if package == "vllm_sink_kernels":
                assert room in KERNEL_USERS, f"{file} imports {name}"


def test_kernels_stand_alone():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        packages = {name.split(".")[0] for name in _imports(file)}
        assert not packages & {"vllm", "vllm_sink"}, file
