"""One request of a million tokens: is the last chunk as quick as the first?

A small random Llama, so that a million tokens take minutes on two cores (--full:
four million, the length in the StreamingLLM paper). One engine takes the long
request chunk by chunk. A second one takes a short request, and for the last chunks
and for every decoded token the two take turns: the paired ratios hold on a machine
that does other things too. Stock attention gets the same KV pool and runs for as
long as its cache fits there.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

from benchmarks import common
from tests.helpers.random_llama import save_llama

CHUNK = 2048
NEAR = 4096  # tokens of the short request, past S + W
PAIRS = 16  # chunks at the end that take turns with the short request's
STEPS = 128  # decoded tokens, in turns
POOL_BLOCKS = 320  # of 128 tokens, and the null block
VOCABULARY = 512


def tokens_of(count: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randrange(VOCABULARY) for _ in range(count)]


def engine(name: str, model: str, max_model_len: int) -> common.Engine:
    return common.Engine(
        name,
        model,
        max_model_len,
        skip_tokenizer_init=True,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=2,
        num_gpu_blocks_override=POOL_BLOCKS + 1,
        enable_prefix_caching=False,
    )


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Curve:
    """Samples of a prefill, by the context's power of two."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: dict[tuple[str, int, str], list[float]] = {}

    def add(self, context: int, values: dict[tuple[str, str], float]) -> None:
        bucket = max(1 << (context - 1).bit_length(), CHUNK)
        for (metric, unit), value in values.items():
            self.samples.setdefault((metric, bucket, unit), []).append(value)

    def save(self, table: common.Table) -> None:
        for (metric, context, unit), values in self.samples.items():
            table.add(self.name, metric, context, values, unit)


def chunk(engine: common.Engine, curve: Curve, context: int) -> float:
    seconds = engine.step()
    curve.add(
        context,
        {
            ("chunk", "ms"): 1e3 * seconds,
            ("kv_blocks", "blocks"): engine.live_blocks(),
            ("resident", "MiB"): resident_mib(),
        },
    )
    return seconds


def prefill(engine: common.Engine, length: int, curve: Curve) -> None:
    """The whole request but for its last ``PAIRS`` chunks, and a word now and then."""
    engine.add(tokens_of(length), STEPS + 8)
    for index in range(length // CHUNK - PAIRS):
        chunk(engine, curve, (index + 1) * CHUNK)
        if index % 64 == 63:
            print(f"  {engine.name}: {(index + 1) * CHUNK:,} tokens", flush=True)


def pair(far: common.Engine, near: common.Engine, length: int, curve: Curve, table):
    """Last chunks, then tokens: far and near in turn."""
    assert far.name == near.name
    near.add(tokens_of(NEAR + PAIRS * CHUNK), 1)
    for _ in range(NEAR // CHUNK):
        near.step()
    ratios = []
    for index in range(PAIRS):
        late = chunk(far, curve, length - (PAIRS - 1 - index) * CHUNK)
        ratios.append(late / near.step())
    table.add("sink", "chunk_ratio", length, ratios, "x of 4,096")
    while near.is_busy():
        near.step()

    near.add(tokens_of(NEAR), STEPS + 8)
    while not near.num_output_tokens:
        near.step()
    samples: dict[str, list[float]] = {"far": [], "near": []}
    far.num_output_tokens = 0
    while not far.num_output_tokens:
        far.step()
    for _ in range(STEPS):
        samples["near"].append(near.step())
        samples["far"].append(far.step())
    pairs = zip(samples["far"], samples["near"], strict=True)
    table.add("sink", "tpot_ratio", length, [a / b for a, b in pairs], "x of 4,096")
    table.add("sink", "tpot", NEAR, [1e3 * s for s in samples["near"]], "ms")
    table.add("sink", "tpot", length, [1e3 * s for s in samples["far"]], "ms")


def stock(model: str, table: common.Table) -> None:
    """Stock attention until its request fills the pool."""
    length = POOL_BLOCKS * 128 // CHUNK * CHUNK
    print(f"  stock: the pool holds {length:,} tokens", flush=True)
    full = engine("stock", model, length)
    curve = Curve("stock")
    full.add(tokens_of(length - 1), 1)
    for index in range(length // CHUNK):
        chunk(full, curve, (index + 1) * CHUNK)
    while full.is_busy():
        full.step()
    curve.save(table)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="four million tokens")
    parser.add_argument("--length", type=int, help="another number of tokens")
    args = parser.parse_args()
    length = args.length or (4_000_000 if args.full else 1_000_000)
    length = max(length // CHUNK, 2 * PAIRS) * CHUNK
    with tempfile.TemporaryDirectory() as folder:
        model = save_llama(Path(folder) / "random-llama", vocab_size=VOCABULARY)
        table = common.Table("million", model)
        far = engine("sink", model, length + 2 * STEPS)
        near = engine("sink", model, length + 2 * STEPS)
        for warm in (far, near):
            warm.add(tokens_of(2 * CHUNK), 4)
            while warm.is_busy():
                warm.step()
        curve = Curve("sink")
        prefill(far, length, curve)
        pair(far, near, length, curve, table)
        curve.save(table)
        table.save()
        stock(model, table)
    table.save()


if __name__ == "__main__":
    main()
