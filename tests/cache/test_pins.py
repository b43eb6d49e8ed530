"""A system prompt as long as the sinks stays in sight, and in memory once."""

import random

import pytest
from vllm import SamplingParams

from tests.helpers.engine import core, manager, sink_engine
from tests.helpers.random_llama import save_llama

BLOCK = 32
SYSTEM, WINDOW = 1000, 96  # tokens
CHATS, ANSWER = 50, 140  # an answer leaves the window
SHARED = SYSTEM // BLOCK  # the last sink block holds a chat's own tokens too


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with sink_engine(
        save_llama(folder, max_position_embeddings=2048),
        SYSTEM,
        WINDOW,
        block_size=BLOCK,
        max_model_len=2048,
        max_num_seqs=CHATS,
        max_num_batched_tokens=512,
        skip_tokenizer_init=True,
    ) as llm:
        yield llm


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    system = [rng.randrange(512) for _ in range(SYSTEM)]
    return [system + [rng.randrange(512) for _ in range(80)] for _ in range(count)]


def test_50_chats_hold_a_system_prompt_once(engine):
    """From the first step to the last, however much each chat has evicted."""
    first, *others = prompts(CHATS + 1)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    warm = SamplingParams(temperature=0, max_tokens=1)
    engine.generate({"prompt_token_ids": first}, warm, use_tqdm=False)
    for index, tokens in enumerate(others):
        engine.llm_engine.add_request(str(index), {"prompt_token_ids": tokens}, params)

    rows = manager(engine).req_to_blocks
    pool = core(engine).scheduler.kv_cache_manager.block_pool
    everyone, at_last = 0, 0
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        running = [row for row in rows.values() if len(row) > SHARED]
        everyone = max(everyone, len(running))
        if not running:
            continue
        systems = {tuple(block.block_id for block in row[:SHARED]) for row in running}
        assert len(systems) == 1, "one copy for all chats"
        assert all(block.ref_cnt == len(running) for block in running[0][:SHARED])
        live = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        own = 1 + -(-(WINDOW + 512) // BLOCK) + 1  # last sink block, window, edge
        assert live <= SHARED + own * len(running)
        at_last = sum(block.is_null for block in running[0])
    assert everyone == CHATS
    assert at_last > 0, "the chats were to leave their windows"
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_a_later_chat_finds_it(engine):
    """Nobody holds the blocks; the prefix cache does."""
    *_, tokens = prompts(CHATS + 2)
    warm = SamplingParams(temperature=0, max_tokens=1)
    (output,) = engine.generate({"prompt_token_ids": tokens}, warm, use_tqdm=False)
    assert output.num_cached_tokens == SHARED * BLOCK
