"""``scripts/endless.py`` without an engine: its input, its requests, its end."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "endless.py"


@pytest.fixture(scope="module")
def endless():
    spec = importlib.util.spec_from_file_location("endless", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_that_are_no_text_do_not_end_it(endless):
    reading, writing = os.pipe()
    os.write(writing, b"one \xff\ntwo \xe2\x82")
    lines = endless.read_lines(reading)
    assert next(lines) == "one \ufffd\n"
    os.write(writing, b"\xac\nthree \xe2")
    os.close(writing)
    assert list(lines) == ["two \u20ac\n", "three \ufffd"]
    os.close(reading)


class FakeEngine:
    """Answers every turn; keeps how long each session became."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.turns: list[list[int]] = []

    async def generate(self, turns, params, name):
        self.lengths.append(0)
        async for turn in turns:
            prompt = turn.prompt["prompt_token_ids"]
            self.turns.append(prompt)
            self.lengths[-1] += len(prompt) + params.max_tokens
            yield SimpleNamespace(
                outputs=[SimpleNamespace(text="x", token_ids=[7] * params.max_tokens)]
            )
            self.lengths[-1] -= 1  # the last one is dropped where a turn follows


@pytest.mark.parametrize("room", [100, 101, 110, 119])
def test_the_next_session_begins_before_the_room_ends(endless, room):
    """And no turn is lost between them; turns grow shorter and longer."""
    turns = [[i] * (20 + 7 * (i % 3)) for i in range(30)]
    opening = [99] * 5

    async def follow() -> FakeEngine:
        engine, text, start = FakeEngine(), endless.Turns(iter(turns)), opening
        while True:
            session = endless.Session(engine, start, text, room, answer=4)
            async for _ in session.run("s"):
                assert session.num_tokens <= room
            if session.is_over:
                return engine

    engine = asyncio.run(asyncio.wait_for(follow(), 60))
    assert len(engine.lengths) > 3
    assert max(engine.lengths) <= room
    assert max(engine.lengths) > room - 34 - 4, "sessions must use their room"
    fed = [[token for token in turn if token != 99] for turn in engine.turns]
    assert fed == turns


@pytest.mark.parametrize("last", ["a turn", "the end"])
def test_what_is_read_after_the_end_is_dropped(endless, last, monkeypatch):
    """The interrupt that ends the script often ends what writes to it, too."""
    failures, may_read, threads = [], threading.Event(), set(threading.enumerate())
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def pieces():
        yield [1]
        may_read.wait()
        if last == "a turn":
            yield [2]

    async def follow() -> None:
        assert await endless.Turns(pieces()).next() == [1]

    asyncio.run(follow())
    (reader,) = set(threading.enumerate()) - threads
    may_read.set()
    reader.join(60)
    assert not reader.is_alive() and not failures


# The script with an engine that only says that it was shut down, without vLLM.
QUIET = """
import importlib.util, signal, sys
# A shell has its background jobs ignore an interrupt, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)
from types import SimpleNamespace
sys.modules["vllm"] = SimpleNamespace(SamplingParams=SimpleNamespace)
sys.modules["vllm.sampling_params"] = SimpleNamespace(
    RequestOutputKind=SimpleNamespace(DELTA=0)
)
sys.modules["vllm.engine.protocol"] = SimpleNamespace(StreamingInput=None)
spec = importlib.util.spec_from_file_location("endless", sys.argv[1])
endless = importlib.util.module_from_spec(spec)
spec.loader.exec_module(endless)
endless.open_engine = lambda args: SimpleNamespace(
    get_tokenizer=lambda: lambda text, **_: {"input_ids": [1]},
    generate=generate,
    shutdown=lambda: print("shut down", flush=True),
)
endless.metrics_page = lambda port: 0
async def generate(turns, params, name):
    async for turn in turns:
        yield turn
sys.argv[1:] = ["model", "-"]
endless.main()
"""


def test_an_interrupt_while_nothing_is_written(tmp_path):
    """The pipe stays open and silent: nothing else ends the read."""
    with subprocess.Popen(
        [sys.executable, "-c", QUIET, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for line in process.stdout:
                if "KV blocks" in line:
                    break
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
        finally:
            process.kill()
    assert said == "shut down\nended\n"


@pytest.mark.parametrize("asked", [64, 4096])
def test_its_table_has_a_row_for_every_position(endless, asked, tmp_path, monkeypatch):
    """By the override that the model's kind of rotation needs."""
    from transformers import LlamaConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", staticmethod(lambda args: args))
    argv = ["endless", str(tmp_path), "--max-model-len", str(asked)]
    monkeypatch.setattr(sys, "argv", argv)
    overrides = endless.open_engine(endless.parse_args()).hf_overrides
    if asked == 64:
        assert overrides == {}
    else:
        assert overrides["max_position_embeddings"] == asked
        assert overrides["rope_parameters"]["original_max_position_embeddings"] == 1024
