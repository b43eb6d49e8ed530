"""Every benchmark, then the pictures: ``python -m benchmarks.run --quick``."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import common

BENCHMARKS = (
    "stream",
    "batches",
    "attention",
    "capacity",
    "serve",
    "peers",
    "manager_cost",
    "million",
    "chats",
    "host_cache",
)
OWN_MODEL = ("manager_cost", "attention", "million", "chats")  # none, or a random one


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--llama-python", help="a python that has llama-cpp-python")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if name not in OWN_MODEL:
            command += ["--model", args.model]
            command += ["--quick"] if args.quick else []
        if name == "peers" and args.llama_python:
            command += ["--llama-python", args.llama_python]
        start = time.monotonic()
        status = subprocess.run(command, cwd=common.ROOT).returncode
        print(f"== {name}: {time.monotonic() - start:.0f} s, exit {status}", flush=True)
        failed += [name] if status else []
    subprocess.run(
        [sys.executable, "-m", "benchmarks.plot"], check=True, cwd=common.ROOT
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
