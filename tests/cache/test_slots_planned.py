"""Heads beside other layers through vLLM's whole planning, in served models' shapes.

What ``vllm-sink size`` says, what the start line says, the pool that vLLM makes for the
specs of one worker or two, and what a request takes of it are the same numbers.
"""

from dataclasses import replace

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_max_concurrency_for_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, MambaSpec
from vllm.v1.request import Request

from tests.helpers.planned import (
    BLOCK,
    IN_FLIGHT,
    LENGTH,
    MEMORY,
    MODELS,
    plan,
    whole_layers,
)
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec
from vllm_sink.start.log_lines import retrieval_line
from vllm_sink.tools import sizing
from vllm_sink.tools.model_layers import read_shape

NUM_PROMPT = 5000
LBHNC, BLHNC = KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
# Whether prefixes are cached counts where layers have states.
CASES = [
    (model, caches)
    for model in MODELS
    for caches in ((True, False) if model.states else (True,))
]


def spec_of(group):
    """One spec of a group's layers, which differ in nothing that counts here."""
    spec = group.kv_cache_spec
    return next(iter(getattr(spec, "kv_cache_specs", {0: spec}).values()))


@pytest.mark.parametrize("layout", [LBHNC, BLHNC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model, caches", CASES, ids=str)
def test_the_pool_is_what_is_said(model, caches, ranks, layout, monkeypatch):
    made = plan(monkeypatch, model, ranks, layout, caches)
    vllm_config, settings = made.engine.vllm_config, made.engine.config
    memory = made.memories[0]
    print(memory.grouping, memory.counts)
    if ranks > 1:
        assert len({other.counts for other in made.memories}) > 1, "an uneven map"
    check_pool(made)
    line = retrieval_line(vllm_config, settings, memory.page_bytes)
    assert f"{memory.bytes(LENGTH) / 2**20:.1f} MiB at {LENGTH:,} tokens" in line
    if model.is_counted:
        shape = read_shape(model.hf_config, "bfloat16", ranks, caches_prefixes=caches)
        said = sizing.slot_memory(shape, settings, ranks, BLOCK)
        assert said == max(made.memories, key=lambda memory: memory.counts)


def check_pool(made):
    """vLLM's groups and pool are those of the plan, on every worker."""
    vllm_config, memory = made.engine.vllm_config, made.memories[0]
    for other in made.memories:
        assert other.grouping == memory.grouping
    for config in made.configs:
        groups = [
            (spec_of(group), len(group.layer_names)) for group in config.kv_cache_groups
        ]
        assert len(groups) == memory.grouping.num_groups
        assert max(size for _, size in groups) == memory.grouping.size
        (pool_bytes,) = {tensor.size for tensor in config.kv_cache_tensors}
        assert pool_bytes == config.num_blocks * memory.pool_block_bytes
        assert config.num_blocks == MEMORY // memory.pool_block_bytes
        heads = {
            spec.block_size
            for spec, _ in groups
            if isinstance(spec, (RetrievalSpec, SinkSpec))
        }
        assert heads == {memory.block_size}
        windows = {
            spec.block_size for spec, _ in groups if isinstance(spec, OwnWindowSpec)
        }
        assert windows == {x.block_size for x in memory.beside if x.window}
        fit = get_max_concurrency_for_kv_cache_config(vllm_config, config)
        blocks = memory.blocks(LENGTH, IN_FLIGHT)
        assert config.num_blocks / blocks == pytest.approx(fit)


@pytest.mark.parametrize("layout", [LBHNC, BLHNC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("model", [x for x in MODELS if x.own_window], ids=str)
def test_whole_layers_have_pages_of_the_pool(model, layout, monkeypatch):
    """Of four workers, where a window's page may be larger than a governed layer's."""
    made = plan(monkeypatch, model, 4, layout, True, whole_layers)
    check_pool(made)
    # vLLM asks what one token takes, to settle the block size: its own bytes.
    layer = made.engine.head_groups.layers[0]
    token = replace(layer.spec, block_size=1)
    found = layer.attn_backend.customize_spec(token)
    assert found.page_size_bytes == token.page_size_bytes


@pytest.mark.parametrize("model, caches", CASES, ids=str)
def test_a_request_takes_what_is_said(model, caches, monkeypatch):
    """Of a group of each kind at most what is counted, and as much at some time."""
    made = plan(monkeypatch, model, 1, LBHNC, caches)
    memory, vllm_config = made.memories[0], made.engine.vllm_config
    config = generate_scheduler_kv_cache_config(made.configs)
    vllm_config.kv_transfer_config = None
    scheduler_size, hash_size = resolve_kv_cache_block_sizes(config, vllm_config)
    manager = KVCacheManager(
        config,
        max_model_len=LENGTH,
        scheduler_block_size=scheduler_size,
        hash_block_size=hash_size,
        max_in_flight_tokens=IN_FLIGHT,
        enable_caching=caches,
    )
    init_none_hash(sha256)
    request = Request(
        "r",
        list(range(NUM_PROMPT)),
        SamplingParams(max_tokens=LENGTH),
        None,
        block_hasher=get_request_block_hasher(hash_size, sha256),
    )
    pool = manager.block_pool
    free = pool.get_num_free_blocks()
    managers = manager.coordinator.single_type_managers
    states = [
        index
        for index, each in enumerate(managers)
        if isinstance(each.kv_cache_spec, MambaSpec)
    ]
    # With states whose prefixes are cached vLLM ends a prompt's chunks with a block.
    first = managers[states[0]].block_size if states and caches else 2048
    beside = [layers.block_size for layers in memory.beside]
    period = max(memory.block_size, memory.whole_block, *beside)  # where a block ends
    chunks = [first, NUM_PROMPT - first, *[1] * (period + 1)]
    most = {True: [0] * len(managers), False: [0] * len(managers)}
    for chunk in chunks:
        assert manager.allocate_slots(request, chunk) is not None
        request.num_computed_tokens += chunk
        if request.num_computed_tokens >= request.num_tokens:
            request.append_output_token_ids(7)
        rows = [each.req_to_blocks["r"] for each in managers]
        counts = [sum(not block.is_null for block in row) for row in rows]
        assert sum(counts) == free - pool.get_num_free_blocks()
        assert sum(counts) <= memory.blocks(request.num_computed_tokens, chunk)
        is_prefill = chunk > 1
        most[is_prefill] = list(map(max, most[is_prefill], counts))
    assert sum(most[False]) == memory.blocks(sum(chunks)), most
    # The last chunk ends in a block of its own: a state before it is written besides.
    assert {most[True][index] for index in states} == {
        layers.blocks(LENGTH, IN_FLIGHT)
        for layers in memory.beside
        if not layers.window
    }
