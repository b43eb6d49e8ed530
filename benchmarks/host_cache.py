"""A chat's next turn, once others have pushed it out of the pool.

Seconds to its first token after a history of 1,000 to 16,000 tokens: computed anew, and
read from host memory. The two take turns; their ratio is what holds on a machine that
does other things, too. The "host" of a CPU is the memory that the pool is in: what a
copy over PCIe would add is not in it.
"""

from __future__ import annotations

from benchmarks import common

HISTORIES = (1000, 4000, 16000)
NEXT = 32  # tokens of the next turn
CHUNK = 1024
POOL_BLOCKS = 30  # of 128 tokens: a request and little more
OTHERS = (8, 900)  # chats that push one out, and their tokens


def serve(engine: common.Engine, prompt: list[int]) -> float:
    """Seconds until the first token."""
    engine.add(prompt, 1)
    seconds = 0.0
    while engine.is_busy():
        seconds += engine.step()
    return seconds


def push_out(engine: common.Engine, tokens: list[int], seed: int) -> None:
    count, length = OTHERS
    for i in range(count):
        start = 700 * (seed + i)
        serve(engine, tokens[start : start + length])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    table = common.Table("host_cache", args.model, "float32")
    tokens = common.prose(args.model, 95_000)
    transfer = {
        "kv_connector": "SinkHostCache",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_cache_gib": 2},
    }
    engine = common.Engine(
        "sink",
        args.model,
        max(HISTORIES) + 2 * NEXT,
        num_gpu_blocks_override=POOL_BLOCKS + 1,
        max_num_batched_tokens=CHUNK,
        kv_transfer_config=transfer,
    )
    serve(engine, tokens[-300:])  # warm-up
    scheduler = engine.scheduler.connector.scheduler
    found: list[int] = []
    match = scheduler.match
    scheduler.match = lambda *asked: found.append(match(*asked)) or found[-1]
    others = 0
    for history in HISTORIES:
        seconds: dict[str, list[float]] = {"computed anew": [], "from the host": []}
        for i in range(1 if args.quick else args.rounds):
            chat = tokens[1000 * i : 1000 * i + history]
            serve(engine, chat)
            push_out(engine, tokens[20_000:], others)
            others += OTHERS[0]
            turn = tokens[90_000 + 40 * i :][:NEXT]
            found.clear()
            seconds["from the host"].append(serve(engine, chat + turn))
            assert found[0] > (history - 128) // 128 * 128 - 256, "not from the host"
            # Another first token: nothing of it was ever computed.
            other = [(chat[0] + 1 + i) % 1000, *chat[1:], *turn]
            seconds["computed anew"].append(serve(engine, other))
        for what, samples in seconds.items():
            table.add(what, "ttft", history, samples, "s")
        ratios = [anew / host for anew, host in zip(*seconds.values(), strict=True)]
        table.add("anew/host", "ttft", history, ratios, "x")
        table.save()
    engine.close()


if __name__ == "__main__":
    main()
