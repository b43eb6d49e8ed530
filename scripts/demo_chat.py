"""One question to a server that is starting, once it answers.

python scripts/demo_chat.py URL PID LOG [QUESTION]
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 900
ANSWER_TIMEOUT_S = 600
# Never through a proxy: the server is on the loopback interface.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def last_line(log: Path) -> str:
    """vLLM's last message in the log, as one short line."""
    lines = log.read_text(errors="replace").splitlines()
    messages = [line for line in lines if " INFO " in line and "] " in line]
    if not messages:
        return "importing vLLM"
    return messages[-1].split("] ", 1)[1].strip()[:80]


def loop_lines(log: str) -> list[str]:
    """What a log says of the attention loops: compiled or found, and how long it took.

    At most 70 characters each.
    """
    told = (line.partition("] ")[2] for line in log.splitlines())
    loops = [line for line in told if re.match("(Compiled|Found) the .*loops", line)]
    return [
        line if len(line) <= 70 else re.sub(r" in /\S+,", ",", line)[:70]
        for line in loops
    ]


def fail(log: Path, reason: str) -> None:
    tail = log.read_text(errors="replace").splitlines()[-30:]
    sys.exit("\n".join([*tail, f"error: {reason}; the log is {log}"]))


def wait_until_healthy(url: str, pid: int, log: Path) -> None:
    """Poll /health; a line of progress every five seconds."""
    start = time.monotonic()
    next_report = 5.0
    while True:
        waited = time.monotonic() - start
        if not is_alive(pid):
            fail(log, "the server stopped while starting")
        try:
            with _open(f"{url}/health", timeout=5):
                print(f"  server ready after {waited:.0f} s", flush=True)
                for line in loop_lines(log.read_text(errors="replace")):
                    print(f"  {line}", flush=True)
                return
        except (urllib.error.URLError, OSError):
            pass
        if waited > START_TIMEOUT_S:
            fail(log, f"the server did not answer within {START_TIMEOUT_S} s")
        if waited >= next_report:
            print(f"  starting, {waited:.0f} s: {last_line(log)}", flush=True)
            next_report += 5
        time.sleep(0.5)


def ask(url: str, question: str) -> str:
    """The answer to one chat message."""
    with _open(f"{url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with _open(request, timeout=ANSWER_TIMEOUT_S) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    url, pid, log = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    question = sys.argv[4] if len(sys.argv) == 5 else "What is the capital of France?"
    wait_until_healthy(url, pid, log)
    start = time.monotonic()
    try:
        answer = ask(url, question)
    except urllib.error.HTTPError as error:
        fail(log, f"the server answered {error.code}: {error.read().decode()[:500]}")
    except OSError as error:
        fail(log, f"the server did not answer: {error}")
    print(f"\n  you:   {question}\n  model: {answer}")
    print(f"  ({time.monotonic() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
