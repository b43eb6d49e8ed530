"""The policy's counters without room for their folder: the engine lives on."""

import shutil
import subprocess
import sys

import pytest

from vllm_sink.cache import metrics as module

COUNT = f"""
import os, sys
os.environ["{module.FOLDER_VARIABLE}"] = sys.argv[1]
from vllm_sink.cache import metrics as module
metrics = module.metrics()
if metrics is not None:
    metrics.add("vllm:sink_live_blocks", 1)
print("counted" if metrics else "not counted")
"""


@pytest.fixture(autouse=True)
def warnings(monkeypatch) -> list[str]:
    """What is logged as a warning; all as in a new process that was told no folder."""
    lines: list[str] = []
    monkeypatch.setattr(
        module.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    module._metrics_in.cache_clear()
    monkeypatch.delenv(module.VLLM_FOLDER_VARIABLE, raising=False)
    return lines


def test_a_folder_that_is_a_file_ends_the_counting_with_a_warning(
    monkeypatch, tmp_path, warnings
):
    folder = tmp_path / "file"
    folder.write_text("")
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(folder))
    assert module.metrics() is None
    assert module.metrics() is None  # asked for each group of layers: one warning
    (text,) = warnings
    assert text.startswith("TMPDIR (or ") and str(folder) in text


def test_a_full_disk_ends_the_counting_and_not_the_process(tmp_path):
    """A page of a mapped file that the disk has no room for is a SIGBUS."""
    script = (
        f"mount -t tmpfs -o size=16k tmpfs {tmp_path} && "
        f'(head -c 16k /dev/zero > {tmp_path}/zeros; exec "$@")'
    )
    user = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*user, "true"]).returncode:
        pytest.skip("mounts nothing")
    run = subprocess.run(
        [*user, "sh", "-c", script, "sh", sys.executable, "-c", COUNT, tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "not counted"
    assert "No space left on device" in run.stdout + run.stderr


def test_deleted_while_it_counts(monkeypatch, tmp_path):
    folder = tmp_path / "folder"
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(folder))
    metrics = module.metrics()
    assert metrics is not None
    reader = module._FolderCollector(str(folder))
    metrics.add("vllm:sink_live_blocks", 3)
    (value,) = (
        sample.value
        for family in reader.collect()
        for sample in family.samples
        if sample.name == "vllm:sink_live_blocks"
    )
    assert value == 3
    shutil.rmtree(folder)
    metrics.add("vllm:sink_live_blocks", 1)
    assert not list(reader.collect())
    folder.write_text("no folder")
    assert not list(reader.collect())
