"""A report of all policies side by side: JSON, CSV, Markdown, pictures, checks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from evals import plots
from evals.policies import Policy
from evals.worker import write_json

Part = dict[str, Any]
# Nats a token. Between runs that compute the same, differences are below 1e-4;
# what a policy hides costs 1e-2 and more.
SAME = 1e-3


def budget(part: Part) -> int | None:
    """S + W, or None where every head keeps everything."""
    return Policy(**part["config"]["policy"]).budget


def check_policies(parts: list[Part]) -> list[dict[str, Any]]:
    """A check that each policy acted: its perplexity samples against stock attention's.

    Within S + W tokens they must be equal, beyond they must not: a policy that
    is ignored fails. Beyond, retrieval heads must also differ from the same S and W
    without them: a map that is ignored fails. ``ok`` is None where there is nothing to
    compare with.
    """
    checks = []
    tasks = {part["task"] for part in parts if part["task"].startswith("sink_ppl")}
    for part in parts:
        limit = budget(part)
        if part["task"] not in tasks or limit is None:
            continue
        name, task = part["config"]["policy"]["name"], part["task"]
        stock = [p for p in parts if p["task"] == task and budget(p) is None]
        if not stock:
            checks.append(
                {
                    "policy": name,
                    "task": task,
                    "ok": None,
                    "what": "not compared with stock attention; add the policy dense",
                }
            )
            continue
        inside, beyond = _differences(part, stock[0], limit)
        claims = [
            (f"equal to stock attention within {limit} tokens", inside, _all_same),
            (f"different from it beyond {limit} tokens", beyond, _all_differ),
        ]
        plain = _without_heads(part, parts)
        if plain is not None:
            what = f"different from {plain['config']['policy']['name']} there too"
            claims.append((what, _differences(part, plain, limit)[1], _all_differ))
        for what, values, ok in claims:
            checks.append(
                {
                    "policy": name,
                    "task": task,
                    "ok": ok(values),
                    "what": f"{what}: {', '.join(f'{v:.1e}' for v in values)} nats "
                    "a token",
                }
            )
    return checks


def _differences(part: Part, other: Part, limit: int) -> tuple[list, list]:
    """Nats a token of each sample, within ``limit`` tokens and beyond."""
    inside, beyond = [0.0], []
    for mine, theirs in zip(part["samples"], other["samples"], strict=True):
        assert mine["end"] == theirs["end"], "the same documents"
        difference = abs(mine["response"][0] - theirs["response"][0])
        where = inside if mine["end"] <= limit else beyond
        where.append(difference / mine["num_tokens"])
    return inside, beyond


def _without_heads(part: Part, parts: list[Part]) -> Part | None:
    """The result under the same S and W without retrieval heads, if it was run."""
    mine = Policy(**part["config"]["policy"])
    if not mine.retrieval_fraction:
        return None
    for other in parts:
        policy = Policy(**other["config"]["policy"])
        sizes = (policy.num_sink_tokens, policy.window_size, policy.sink_positions)
        wanted = (mine.num_sink_tokens, mine.window_size, mine.sink_positions)
        plain = policy.retrieval_heads is None and sizes == wanted
        if plain and other["task"] == part["task"]:
            return other
    return None


def _all_same(values: list[float]) -> bool:
    return max(values) < SAME


def _all_differ(values: list[float]) -> bool:
    return bool(values) and min(values) > SAME


def rows(parts: list[Part]) -> list[dict[str, Any]]:
    """A row a metric, with the whole configuration in each."""
    return [
        {
            "model": Path(part["config"]["engine_args"]["pretrained"]).name,
            **{
                key: "" if value is None else value
                for key, value in part["config"]["policy"].items()
            },
            "task": part["task"],
            "task_version": part["task_version"],
            "metric": metric,
            "value": value,
            "num_samples": len(part["samples"]),
            "attention_backends": " ".join(part["attention_backends"]),
            "engine_args": json.dumps(part["config"]["engine_args"]),
            "metadata": json.dumps(part["config"]["metadata"]),
            "limit": part["config"]["limit"] or "",
            "versions": json.dumps(part["config"]["versions"]),
            "seconds": part["seconds"],
        }
        for part in parts
        for metric, value in part["results"].items()
    ]


def markdown(table: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    """A line a metric, a column a policy; then the checks."""
    policies = list(dict.fromkeys(row["name"] for row in table))
    values = {(r["task"], r["metric"], r["name"]): r["value"] for r in table}
    lines = [
        f"| task | metric | {' | '.join(policies)} |",
        f"|---|---|{'---:|' * len(policies)}",
    ]
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in table):
        cells = [
            "" if value is None else f"{value:.2f}"
            for value in (values.get((task, metric, policy)) for policy in policies)
        ]
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    lines.append("")
    marks = {True: "ok", False: "FAILED", None: "not made"}
    for check in checks:
        lines.append(
            f"- {marks[check['ok']]}: {check['policy']}, {check['task']}: "
            f"{check['what']}"
        )
    return "\n".join(lines) + "\n"


def write(out: Path, parts: list[Part]) -> list[dict[str, Any]]:
    """Write everything into ``out``; returns the checks."""
    checks = check_policies(parts)
    write_json(out / "results.json", {"checks": checks, "parts": parts})
    table = rows(parts)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (out / "results.md").write_text(markdown(table, checks), encoding="utf-8")
    plots.of_parts(parts, out)
    return checks
