"""A comparison of cache policies on the harness's tasks.

    python -m evals.run --model M --policies dense,window,sink --tasks sink_smoke \\
        --out DIR

Policies: dense, window (S+W, no sinks), sink, sink:S+W[:cache|absolute], and
heads:FILE@F (the best share F of the heads in FILE keeps everything). DIR gets
results.json, results.csv, results.md and pictures; started again, the run goes on
where it stopped. The exit status is 1 when a policy did not act as it should.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from evals import report, worker
from evals.policies import Policy

SMOKE_BUDGET = (4, 124)
SMOKE_MODEL_LEN = 1024


def expand_tasks(names: list[str]) -> list[str]:
    """Replace groups by their tasks, in order.

    Raises:
        ValueError: A name that neither this folder nor the harness knows.
    """
    manager = worker.task_manager(names)
    tasks: list[str] = []
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            known = sorted(task for task in manager.all_tasks if "sink_" in task)
            raise ValueError(
                f"tasks must be known to the harness, got {name!r}; of this folder "
                f"there are {', '.join(known)}"
            )
        members = (entry.cfg or {}).get("task") if name in manager.all_groups else name
        tasks += expand_tasks(members) if isinstance(members, list) else [name]
    return list(dict.fromkeys(tasks))


def engine_args(args: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """Arguments of the harness's ``vllm`` model for this policy."""
    import torch

    from vllm_sink.rotation.table_length import overrides_for

    arguments: dict[str, Any] = {"pretrained": args.model}
    if not torch.cuda.is_available():
        arguments.update(dtype="float32", enforce_eager=True)
    if args.max_model_len:
        arguments["max_model_len"] = args.max_model_len
        if overrides := overrides_for(args.model, args.max_model_len):
            arguments["hf_overrides"] = overrides
    arguments.update(args.engine_args)
    arguments.update(policy.engine_args())
    return arguments


def configuration(args: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """Everything that the numbers depend on; it identifies a finished part."""
    return {
        "policy": asdict(policy),
        "engine_args": engine_args(args, policy),
        "metadata": args.metadata,
        "limit": args.limit,
        "versions": {
            name: metadata.version(name)
            for name in ("lm_eval", "vllm", "torch", "transformers", "vllm-sink")
        },
    }


def run_policy(config, tasks: list[str], out: Path, on_part) -> None:
    """Run the tasks that have no result yet in a process with its own engine.

    Raises:
        SystemExit: The process failed; its log says why.
    """
    name = config["policy"]["name"]
    todo = [task for task in tasks if worker.read_part(out, config, task) is None]
    on_part(len(tasks) - len(todo))
    if not todo:
        return
    for task in todo:  # of another configuration
        worker.part_path(out, name, task).unlink(missing_ok=True)
    log = out / f"{worker.file_name(name)}.log"
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [root, os.environ.get("PYTHONPATH")])
    )
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "evals.worker"],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        try:
            assert process.stdin is not None, "a pipe was asked for"
            json.dump({"config": config, "tasks": todo, "out": str(out)}, process.stdin)
            process.stdin.close()
            done = 0
            while process.poll() is None:
                time.sleep(0.3)
                now = sum(worker.part_path(out, name, task).exists() for task in todo)
                on_part(now - done)
                done = now
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    now = sum(worker.part_path(out, name, task).exists() for task in todo)
    on_part(now - done)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        sys.exit(f"policy {name} failed: {errors[-1]}\nsee {log}; run again to go on")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evals.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--policies", default="dense,window,sink")
    parser.add_argument("--tasks", default="sink_smoke", help="tasks or groups")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--num-sink-tokens", type=int, help="4")
    parser.add_argument(
        "--window-size", type=int, help="1020, or 124 where all tasks are smoke tasks"
    )
    parser.add_argument(
        "--max-model-len", type=int, help="the trained length; 1024 for smoke tasks"
    )
    parser.add_argument("--limit", type=int, help="documents a task")
    parser.add_argument(
        "--metadata", type=json.loads, default={}, help="for the tasks, JSON"
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="for vLLM, JSON"
    )
    args = parser.parse_args()
    args.tasks = expand_tasks(args.tasks.split(","))
    smoke = all(task.endswith("_smoke") for task in args.tasks)
    sinks, window = SMOKE_BUDGET if smoke else (4, 1020)
    args.num_sink_tokens = (
        sinks if args.num_sink_tokens is None else args.num_sink_tokens
    )
    args.window_size = window if args.window_size is None else args.window_size
    if args.max_model_len is None and smoke:
        args.max_model_len = SMOKE_MODEL_LEN
    return args


def main() -> None:
    # Ended like this, it still ends the engine's process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse()
    console = Console()
    policies = [
        Policy.parse(name, args.num_sink_tokens, args.window_size)
        for name in args.policies.split(",")
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    configs = [configuration(args, policy) for policy in policies]
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "tasks")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = [progress.add_task(p.name, total=len(args.tasks)) for p in policies]
        for bar, config in zip(bars, configs, strict=True):
            advance = functools.partial(progress.advance, bar)
            run_policy(config, args.tasks, args.out, advance)
    parts = [
        worker.read_part(args.out, config, task)
        for config in configs
        for task in args.tasks
    ]
    assert None not in parts, "each policy wrote each task"
    checks = report.write(args.out, parts)
    console.print((args.out / "results.md").read_text(encoding="utf-8"), markup=False)
    if any(check["ok"] is False for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
