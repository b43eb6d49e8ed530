"""The block manager's state machines for as long as one likes.

    python -m tests.million_steps --steps 1000000 --processes 2 --seed 1

The machine of ``tests/helpers/manager_machine.py``, by seeds: a seed is
``EXAMPLES`` lives of a pool, each of one group of heads or of several. A step is one
request's step of up to 24 tokens after which every invariant was checked. The first
failure ends the run, prints the seed and how to see it again, and exits with 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import ClassVar

EXAMPLES = 40
SHOWN = {
    "steps": "steps",
    "of several groups": "steps of several groups",
    "lives": "pools",
    "hits": "hits",
    "hit tokens": "hit tokens",
    "preemptions": "preemptions",
    "out of blocks": "of those, out of blocks",
    "evicted blocks": "evicted blocks",
    "refused": "admissions refused",
    "resumed with output": "resumed with output",
    "drafts rejected": "drafts rejected",
    "resets": "resets of the prefix cache",
}


def run_seed(seed: int) -> tuple[int, Counter, str]:
    """What happened under ``seed``, and the traceback of a failure."""
    from hypothesis import seed as seeded
    from hypothesis import settings
    from hypothesis.stateful import invariant, run_state_machine_as_test

    from tests.helpers.manager_machine import STEPS, BlockManagerMachine

    class Machine(BlockManagerMachine):
        counts: ClassVar[Counter] = Counter()

        @invariant()  # what overrides an invariant is none by itself
        def everything_adds_up(self):
            super().everything_adds_up()
            several = hasattr(self, "oracles") and len(self.oracles) > 1
            self.counts["of several groups"] += several

        def teardown(self):
            super().teardown()
            self.counts["lives"] += 1
            self.counts["evicted blocks"] += self.tally["evicted_blocks"]

    try:
        run_state_machine_as_test(
            seeded(seed)(Machine),
            settings=settings(STEPS, derandomize=False, max_examples=EXAMPLES),
        )
    except Exception:
        return seed, Machine.counts, traceback.format_exc()
    return seed, Machine.counts, ""


def run(steps: int, processes: int, seed: int) -> tuple[Counter, list[int], str]:
    """Seeds from ``seed`` on, until ``steps`` steps were made or one failed."""
    totals: Counter = Counter()
    done: list[int] = []
    start = shown = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(run_seed, seed + i) for i in range(processes)}
        following = seed + processes
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                number, counts, failure = future.result()
                totals += counts
                done.append(number)
                if failure:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return totals, sorted(done), f"seed {number} failed:\n{failure}"
                if totals["steps"] < steps:
                    running.add(pool.submit(run_seed, following))
                    following += 1
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                rate = totals["steps"] / (shown - start)
                print(f"{totals['steps']:,} steps, {rate:,.0f} a second", flush=True)
    return totals, sorted(done), ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.million_steps")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    totals, seeds, failure = run(options.steps, options.processes, options.seed)
    seconds = time.monotonic() - start
    print(f"seeds {seeds[0]} to {seeds[-1]}, {len(seeds)} of them, {seconds:,.0f} s")
    for name, words in SHOWN.items():
        print(f"{totals[name]:>12,} {words}")
    if failure:
        number = failure.split()[1]
        print(
            f"{failure}\nTo see it again: python -m tests.million_steps "
            f"--steps 1 --seed {number}"
        )
    return int(bool(failure))


if __name__ == "__main__":
    sys.exit(main())
