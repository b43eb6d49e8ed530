"""Wheel and sdist work outside the repository, and the site has no dead link."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_sink import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "vllm_sink", "kernels"]


def call(*command: object, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with sdist and wheel; the wheel is made from the sdist."""
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    call(sys.executable, "-m", "build", "--no-isolation", clone)
    return clone / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    call(*pip, "--quiet", "--target", target, wheel)
    return target


def test_both_hold_every_module_and_the_license(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    for package, root in (("vllm_sink", ROOT), ("vllm_sink_kernels", ROOT / "kernels")):
        modules = sorted((root / package).rglob("*.py"))
        assert len(modules) > 10
        for module in modules:
            assert str(module.relative_to(root)) in in_wheel
            assert str(module.relative_to(ROOT)) in in_sdist
    assert any(name.endswith("LICENSE") for name in in_wheel)
    assert not any(name.startswith(("tests", "build")) for name in in_wheel | in_sdist)


def test_it_runs_outside_the_repository(installed, tmp_path):
    """The command, both packages, and the entry points by which vLLM finds it."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = {"cwd": tmp_path, "env": environment}
    version = call(sys.executable, "-m", "vllm_sink", "--version", **run)
    assert version == f"vllm-sink {__version__}\n"
    assert (installed / "bin" / "vllm-sink").exists()
    script = """
import importlib.metadata as metadata, json, pathlib, sys
import vllm_sink.policy.layout, vllm_sink_kernels
(found,) = metadata.distributions(name="vllm-sink", path=[sys.argv[1]])
files = [m.__file__ for m in (vllm_sink, vllm_sink_kernels)]
print(json.dumps([files, found.version, sorted(e.group for e in found.entry_points)]))
"""
    files, version, groups = json.loads(
        call(sys.executable, "-c", script, installed, **run)
    )
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert version == __version__
    assert groups == [
        "console_scripts",
        "vllm.general_plugins",
        "vllm.platform_plugins",
    ]


def test_the_site_has_no_dead_link(tmp_path):
    site = tmp_path / "site"
    # Not --quiet: what it does not print, it does not count as an error either.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    call(*build, "--site-dir", site, cwd=ROOT)
    first = (site / "index.html").read_text()
    assert 'href="install/"' in first and "files/evals/results/heads.png" in first
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").exists()


def test_the_version_is_one(tmp_path):
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text()
