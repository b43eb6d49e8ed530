"""The process that ``evals.run`` starts: one policy's engine and its tasks.

The harness scores. A file for each task, written when it is done, makes a run
resumable: a task whose file has the same configuration is not run again.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
LONGEST_FIELD = 200  # characters: prompts stay out of the results


def file_name(policy: str) -> str:
    """The policy's name without characters that a file's name can't hold."""
    return re.sub(r"[^\w.+@-]", "_", policy)


def part_path(out: Path, policy: str, task: str) -> Path:
    """The path of the results of one task under one policy."""
    return out / "parts" / f"{file_name(policy)}--{task}.json"


def read_part(out: Path, config: dict[str, Any], task: str) -> dict[str, Any] | None:
    """The finished results of this very configuration, or None."""
    path = part_path(out, config["policy"]["name"], task)
    if not path.exists():
        return None
    part = json.loads(path.read_text(encoding="utf-8"))
    return part if part["config"] == config else None


def task_manager(names: list[str], **settings: Any):
    """The harness's index of tasks, with its own where this folder's don't suffice.

    Its own are 14,000, which takes seconds.
    """
    from lm_eval.tasks import TaskManager

    path = str(TASKS)
    ours = TaskManager(include_path=path, include_defaults=False, **settings)
    if set(names) <= set(ours.task_index):
        return ours
    return TaskManager(include_path=path, **settings)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole once it exists: beside its name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _backend_names(worker) -> list[str]:
    """Names of the attention backends that the engine's layers got."""
    groups = worker.model_runner.attn_groups
    return sorted({group.backend.get_name() for row in groups for group in row})


def _short(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample without its prompt: its keys, the answer, the scores."""
    kept = {
        key: value
        for key, value in sample["doc"].items()
        if not isinstance(value, str) or len(value) <= LONGEST_FIELD
    }
    kept["response"] = sample["filtered_resps"][0]
    for metric in sample["metrics"]:
        kept[metric] = sample[metric]
    return kept


def run(config: dict[str, Any], tasks: list[str], out: Path) -> None:
    """Start the engine of ``config`` and evaluate ``tasks`` one after another."""
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    start = time.perf_counter()
    # The harness's class keeps and changes what it is given.
    arguments = json.loads(json.dumps(config["engine_args"]))
    model = get_model("vllm").create_from_arg_obj(arguments, {"batch_size": "auto"})
    seconds_to_start = time.perf_counter() - start
    backends = model.model.collective_rpc(_backend_names)[0]
    settings = {**config["engine_args"], **config["metadata"]}
    manager = task_manager(tasks, metadata=settings)
    for task in tasks:
        start = time.perf_counter()
        results = simple_evaluate(
            model,
            tasks=[task],
            task_manager=manager,
            limit=config["limit"],
            bootstrap_iters=0,
        )
        metrics = {
            key.removesuffix(",none"): value
            for key, value in results["results"][task].items()
            if key.endswith(",none")
            and isinstance(value, (int, float))
            and value != -1  # RULER's, for a length that no sample has
        }
        part = {
            "config": config,
            "task": task,
            "task_version": results["versions"].get(task),
            "attention_backends": backends,
            "seconds_to_start": round(seconds_to_start, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "results": metrics,
            "samples": [_short(sample) for sample in results["samples"][task]],
        }
        write_json(part_path(out, config["policy"]["name"], task), part)


if __name__ == "__main__":
    # In one process: collective_rpc may take a function, and starting is quick.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    job = json.load(sys.stdin)
    run(job["config"], job["tasks"], Path(job["out"]))
