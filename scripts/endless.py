"""A reader of a log (or a chat) that never ends: one session, constant memory.

    python scripts/endless.py MODEL                      # Python's manual, in a circle
    tail -f app.log | python scripts/endless.py MODEL -  # or a log of your own

One streaming-input session of vLLM: every ``--chunk`` tokens of text are a turn, and
the model says a few words after each. A line a turn shows what the session holds;
the same counters are on http://127.0.0.1:PORT/metrics. Ctrl-C ends it.

A session ends at ``--max-model-len``, for the rotary table has no further row. The next
one then starts with the opening and the last turns' text, and forgets the rest, which
the old one had evicted too.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import CancelledError
from contextlib import aclosing
from pathlib import Path

OPENING = "The following is a log. After each part, say in a few words what is new.\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder or name")
    add("text", nargs="?", help="a text file, - for standard input")
    add("--sinks", type=int, default=4, help="S (4)")
    add("--window", type=int, default=4092, help="W (4092)")
    add("--chunk", type=int, default=512, help="tokens of text a turn (512)")
    add("--answer", type=int, default=16, help="tokens of answer a turn (16)")
    add("--tokens", type=int, help="stop after so many tokens in all")
    add("--max-model-len", type=int, default=131072, help="of one session (131072)")
    add("--port", type=int, default=0, help="of /metrics (one that is free)")
    add("--ray", action="store_true", help="run the worker over Ray")
    add("--dtype", default="auto")
    return parser.parse_args()


def read_text(path: str | None) -> Iterator[str]:
    """Pieces of a file, or of Python's manual over and over."""
    if path == "-":
        yield from read_lines(sys.stdin.fileno())
    elif path is not None:
        with open(path, errors="replace") as file:
            yield from file
    else:
        from pydoc_data.topics import topics

        while True:
            for key in sorted(topics):
                yield topics[key]


def read_lines(descriptor: int) -> Iterator[str]:
    """Lines of a pipe or a terminal; bytes that are no UTF-8 are replaced.

    Past Python's buffers: their locks can't be had while a thread waits in a read,
    and the interpreter wants them when it ends.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while data := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + decoder.decode(data)).split("\n")
        for line in lines:
            yield line + "\n"
    if rest := rest + decoder.decode(b"", final=True):
        yield rest


def chunks(pieces: Iterator[str], tokenizer, size: int) -> Iterator[list[int]]:
    """Tokens of the text, ``size`` at a time."""
    tokens: list[int] = []
    for piece in pieces:
        tokens += tokenizer(piece, add_special_tokens=False)["input_ids"]
        while len(tokens) >= size:
            yield tokens[:size]
            tokens = tokens[size:]
    if tokens:
        yield tokens


def metrics_page(port: int) -> int:
    """Serve /metrics on the loopback interface; returns the port."""
    import prometheus_client

    server, _ = prometheus_client.start_http_server(port, "127.0.0.1")
    return server.server_port


def live_blocks() -> int:
    """Blocks that requests hold, from /metrics."""
    from prometheus_client import REGISTRY

    for metric in REGISTRY.collect():
        if metric.name == "vllm:sink_live_blocks":
            return int(sum(sample.value for sample in metric.samples))
    return 0


def resident_mib() -> float:
    """Memory of this process and of all that it started, shared pages counted once."""
    import psutil

    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue  # it ended in between
    return total / 2**20


class Turns:
    """Turns that a thread reads: a log may be silent for hours.

    The thread ends with the process: nobody waits for a read that nothing may end.
    """

    def __init__(self, pieces: Iterator[list[int]]) -> None:
        self.queue: asyncio.Queue = asyncio.Queue(maxsize=1)
        self.held: list[int] | None = None  # was taken and handed back
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(pieces, loop), daemon=True).start()

    def _read(self, pieces: Iterator[list[int]], loop) -> None:
        try:
            for piece in pieces:
                if not self._put(piece, loop):
                    return
        finally:
            self._put(None, loop)

    def _put(self, piece: list[int] | None, loop) -> bool:
        """Whether somebody can still take it: an interrupt ends the loop first."""
        put = self.queue.put(piece)
        try:
            asyncio.run_coroutine_threadsafe(put, loop).result()
        except (RuntimeError, CancelledError):
            put.close()
            return False
        return True

    async def next(self) -> list[int] | None:
        """The next turn's tokens; None: the text has ended."""
        if self.held is not None:
            turn, self.held = self.held, None
            return turn
        return await self.queue.get()


class Session:
    """One request that is fed turn by turn.

    Args:
        engine: An ``AsyncLLM``.
        opening: Tokens that come first: the sinks are among them.
        text: Where turns come from; shared with the session after this one.
        room: Tokens of the session, answers included: past ``max_model_len`` vLLM's
            whole engine ends.
    """

    def __init__(self, engine, opening, text: Turns, room: int, answer: int) -> None:
        self.engine = engine
        self.opening = opening
        self.text = text
        self.room = room
        self.answer = answer
        self.num_tokens = 0
        self.recent: deque[list[int]] = deque(maxlen=4)
        self.is_over = False  # the text is
        self._answered = asyncio.Event()

    async def turns(self) -> AsyncGenerator:
        """A turn when the one before is answered; ends before the room does."""
        from vllm.engine.protocol import StreamingInput

        first = self.opening
        while True:
            tokens = await self.text.next()
            if tokens is None:
                self.is_over = True
                return
            # vLLM extends this list in place: give it one of its own.
            prompt = [*first, *tokens]
            if self.num_tokens + len(prompt) + self.answer > self.room:
                self.text.held = tokens  # the next session's
                return
            self.recent.append(tokens)
            self._answered.clear()
            self.num_tokens += len(prompt)
            yield StreamingInput(prompt={"prompt_token_ids": prompt})
            first = []
            await self._answered.wait()

    async def run(self, name: str) -> AsyncGenerator[tuple[str, float], None]:
        """(answer, seconds a token) of every turn."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=self.answer,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        text, count, start = "", 0, 0.0
        outputs = self.engine.generate(self.turns(), params, name)
        async with aclosing(outputs):
            async for output in outputs:
                for piece in output.outputs:
                    text += piece.text
                    start = start or time.monotonic()
                    count += len(piece.token_ids)
                if count < self.answer:
                    continue
                seconds = (time.monotonic() - start) / max(count - 1, 1)
                # The last token of a turn is sampled and dropped by vLLM.
                self.num_tokens += count - 1
                yield text, seconds
                text, count, start = "", 0, 0.0
                self._answered.set()


def open_engine(args: argparse.Namespace):
    """An ``AsyncLLM`` whose rotary table has a row for every position."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_sink.rotation.table_length import overrides_for

    try:
        overrides = overrides_for(args.model, args.max_model_len)
    except ValueError as error:
        sys.exit(f"--max-model-len: {error}")
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            args.model,
            attention_backend="sink",
            additional_config={
                "sink": {"num_sink_tokens": args.sinks, "window_size": args.window}
            },
            max_model_len=args.max_model_len,
            hf_overrides=overrides,
            dtype=args.dtype,
            enforce_eager=True,
            distributed_executor_backend="ray" if args.ray else None,
        )
    )


async def follow(args: argparse.Namespace) -> None:
    """Run session after session, until the text ends or ``--tokens`` are read."""
    engine = open_engine(args)
    print(f"metrics: http://127.0.0.1:{metrics_page(args.port)}/metrics", flush=True)
    tokenizer = engine.get_tokenizer()
    text = Turns(chunks(read_text(args.text), tokenizer, args.chunk))
    opening = tokenizer(OPENING)["input_ids"]
    start, total = opening, 0
    print(f"{'tokens':>10} {'KV blocks':>9} {'MiB':>7} {'ms a token':>10}", flush=True)
    try:
        for number in range(sys.maxsize):
            session = Session(engine, start, text, args.max_model_len, args.answer)
            async with aclosing(session.run(f"log-{number}")) as answers:
                async for answer, seconds in answers:
                    read = total + session.num_tokens
                    print(
                        f"{read:>10,} {live_blocks():>9} {resident_mib():>7,.0f} "
                        f"{1e3 * seconds:>10.1f}  {json.dumps(answer)[:48]}",
                        flush=True,
                    )
                    if args.tokens and read >= args.tokens:
                        return
            if session.is_over:
                return
            total += session.num_tokens
            recent = [token for turn in session.recent for token in turn]
            start = [*opening, *recent[-args.max_model_len // 4 :]]
    finally:
        engine.shutdown()


def main() -> None:
    args = parse_args()
    if args.max_model_len < 4 * (args.chunk + args.answer):
        sys.exit(
            "--max-model-len must be at least four turns (--chunk + --answer), got "
            f"{args.max_model_len}; make it larger or a turn shorter"
        )
    if Path(args.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # On a CPU vLLM takes nine tenths of the memory unless told: little is needed.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        asyncio.run(follow(args))
    except KeyboardInterrupt:
        print("ended")


if __name__ == "__main__":
    main()
