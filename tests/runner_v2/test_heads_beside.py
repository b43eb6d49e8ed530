"""Heads of two policies beside layers of other kinds, on runner V2.

Each model is compared with the independent reference: a prompt in chunks, past S + W,
whose freed blocks are given out again, then a second turn that hits what it left.

Linear attention (Qwen3-Next) does not run here: vLLM's kernel of it for CPUs takes
bfloat16 alone, which Triton's interpreter multiplies wrongly. Its layers add nothing
in these tests; they have their groups, pages, block tables and metadata.
"""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from tests.helpers.engine import core, model_runner
from tests.helpers.reference import load, logprobs
from tests.runner_v2.graphs import replay_graphs
from tests.runner_v2.serving import (
    SINKS,
    VOCABULARY,
    Reply,
    ask,
    random_tokens,
    serving,
)
from tests.zoo.models import entry_of, save
from vllm_sink.engine import Engine
from vllm_sink.policy.slots import SlotMemory

TOLERANCE = 2e-3
WINDOW = 12
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
OWN = [9, 9]  # the row of a layer that the policy doesn't govern: ignored
PROMPT, FOLLOW_UP = random_tokens(1, 75), random_tokens(2, 9)
# Of the first turn, in whole blocks of every group. vLLM's Mamba kernel for CPUs has
# no state from within a last chunk, which a longer second turn would ask for.
HIT = 64


@dataclass(frozen=True)
class Case:
    """A model of the zoo under a head map.

    Args:
        model: Its name there.
        rows: The map.
        config: Changes to its config, after ``SMALL``.
        slot: (heads, tokens) that a page of the pool holds.
        window: Of the retrieval heads.
        graphs: Replayed in the second turn.
        layout: Of the KV cache; block-outermost ones put pages of a block together.
    """

    model: str
    rows: list
    config: dict
    slot: tuple[int, int]
    window: int | None = None
    graphs: str = ""
    layout: str = "LBNHC"  # vLLM's choice on a GPU


def layers(*kinds: str) -> dict:
    return {
        "num_hidden_layers": len(kinds),
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "sliding_window": 24,
    }


GEMMA = layers("sliding", "full", "full")
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 2}
NEMOTRON = {"num_hidden_layers": 3, "mamba_num_heads": 4, "mamba_head_dim": 32}
LINEAR = {
    "mlp_only_layers": [0],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
CASES = {
    "Gemma 3": Case("Gemma 3", [OWN, [1, 0], [0, 1]], GEMMA, (2, 16), graphs="FULL"),
    "Gemma 3, whole layers": Case("Gemma 3", [OWN, [1, 1], [0, 0]], GEMMA, (1, 16)),
    "gpt-oss": Case(
        "gpt-oss",
        [OWN, [0, 1]],
        layers("sliding", "full"),
        (1, 32),
        window=40,
        layout="BLHNC",
    ),
    "Falcon-H1": Case(
        "Falcon-H1",
        [[1, 0], [0, 1]],
        STATES,
        (1, 32),
        graphs="FULL_DECODE_ONLY",
        layout="BLNHC",
    ),
    "Qwen3-Next": Case(
        "Qwen3-Next", [OWN, [1, 0]], layers("linear", "full") | LINEAR, (1, 64)
    ),
    # The last two layers read the keys of the first two.
    "Gemma 4": Case(
        "Gemma 4, shared keys",
        [OWN, [1, 0]] * 2,
        layers("sliding", "full", "sliding", "full") | {"global_head_dim": 32},
        (1, 32),
    ),
    "Nemotron-H": Case("Nemotron-H", [OWN, [1, 0], OWN], NEMOTRON, (1, 64)),
}
# What is as the others for the runner: one vLLM's tells.
ONCE = {"Gemma 3, whole layers", "Qwen3-Next", "Gemma 4", "Nemotron-H"}


@pytest.fixture(scope="module")
def load_case(tmp_path_factory):
    """Of a case -> (folder, reference model), made once a model."""
    known = {}

    def find(case: Case):
        if case.model not in known:
            entry = entry_of(case.model)
            entry = replace(entry, config=entry.config | SMALL | case.config)
            path = save(entry, tmp_path_factory.mktemp("model"))
            known[case.model] = path, silence(load(path))
        return known[case.model]

    return find


def silence(model: torch.nn.Module) -> torch.nn.Module:
    """Let linear attention add nothing, in vLLM's model or in Hugging Face's."""
    for name, module in model.named_modules():
        if name.endswith("linear_attn"):
            module.forward = lambda hidden_states, **_: torch.zeros_like(hidden_states)
    return model


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.power if name in ONCE else ())
        for name, case in CASES.items()
    ],
)
def test_chunks_hits_and_freed_blocks(case, load_case, monkeypatch):
    path, model = load_case(case)

    def error(prompt: list[int], reply: Reply, rows: list) -> torch.Tensor:
        want = logprobs(
            model,
            prompt + reply.tokens,
            SINKS,
            WINDOW,
            "cache",
            heads=rows,
            retrieval_window=case.window,
        )
        return (reply.logprobs - want[-len(reply.logprobs) :]).abs().max()

    policy = {
        "window_size": WINDOW,
        "retrieval_heads": case.rows,
        "retrieval_window_size": case.window,
    }
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", case.layout)
    with serving(
        path, "v2", policy=policy, num_gpu_blocks_override=24, max_model_len=128
    ) as llm:
        silence(model_runner(llm).get_model())
        config = llm.llm_engine.vllm_config
        assert config.cache_config.kv_cache_layout == case.layout
        check_pool(llm, Engine.of(config).head_groups.plan(config), case.slot)
        given = count_given(llm, monkeypatch)
        (first,) = ask(llm, [PROMPT], 3, score_prompts=True)
        assert error(PROMPT, first, case.rows) < TOLERANCE
        other = [row if row == OWN else [1 - head for head in row] for row in case.rows]
        assert error(PROMPT, first, other) > 20 * TOLERANCE
        if case.graphs:
            used = replay_graphs(llm, case.graphs, monkeypatch)
        again = PROMPT + first.tokens + FOLLOW_UP
        (second,) = ask(llm, [again], 2)
        assert second.cached == HIT
        assert error(again, second, case.rows) < TOLERANCE
        assert not case.graphs or sum(used.values()), "no graph was replayed"
        assert max(given.values()) > 1, "no block was freed and given out again"


def check_pool(llm, memory: SlotMemory, slot: tuple[int, int]) -> None:
    """The groups and the bytes that were planned."""
    grouping, cache = memory.grouping, core(llm).scheduler.kv_cache_config
    assert (grouping.heads_per_slot, grouping.tokens_per_block) == slot
    assert len(cache.kv_cache_groups) == grouping.num_groups
    pool_bytes = model_runner(llm).kv_caches[0].untyped_storage().nbytes()
    assert pool_bytes == cache.num_blocks * memory.pool_block_bytes


def count_given(llm, monkeypatch) -> Counter:
    """How often each block is given out from now on."""
    pool, given = core(llm).scheduler.kv_cache_manager.block_pool, Counter()
    take = pool.get_new_blocks

    def count(num_blocks: int):
        blocks = take(num_blocks)
        given.update(block.block_id for block in blocks)
        return blocks

    monkeypatch.setattr(pool, "get_new_blocks", count)
    return given
