"""Rotary tables hold exact angles past the trained length."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from vllm import SamplingParams

from tests.helpers.engine import model_runner, sink_engine
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import load, logprobs
from vllm_sink.rotation import exact as rotation_exact
from vllm_sink.rotation.exact import read_frequencies, write_rows

SINKS, WINDOW = 4, 124
TEXT, SCORED = 768, 512
TOLERANCE = 2e-3
# 4,000,000 takes minutes: VLLM_SINK_FAR_OFFSET=4000000 runs it, too.
OFFSETS = [100_000, int(os.environ.get("VLLM_SINK_FAR_OFFSET", "1000000"))]


def model_table(length: int, dtype, factor=1.0, magnitude=1.0) -> tuple:
    """Frequencies and rows as models compute them: in float32, then rounded."""
    frequencies = 1 / (10000.0 ** (torch.arange(0, 64, 2).float() / 64)) / factor
    angles = torch.arange(length).float()[:, None] * frequencies
    rows = torch.cat([angles.cos(), angles.sin()], -1) * magnitude
    return frequencies, rows.to(dtype)


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
@pytest.mark.parametrize("trained", [256, 8192])
def test_frequencies_are_read_off_a_tables_rows(trained, magnitude):
    frequencies, rows = model_table(1_000_001, torch.float32, 3.0, magnitude)
    found, factor = read_frequencies(rows[:trained].double(), torch.float32)
    assert (found / frequencies.double() - 1).abs().max() < 2**-22
    write_rows(rows, found, factor)
    at = torch.tensor([0, 1, trained, 500_000, 1_000_000])
    angles = at.double()[:, None] * found
    exact = torch.cat([angles.cos(), angles.sin()], -1) * magnitude
    assert torch.equal(rows[at], exact.float())


@pytest.mark.parametrize("trained", [8192, 131_072])
def test_frequencies_of_a_bf16_table(trained):
    """Good enough for every distance that a query ever sees."""
    frequencies, rows = model_table(trained, torch.bfloat16)
    found, _ = read_frequencies(rows.double(), torch.bfloat16)
    assert ((found - frequencies.double()).abs() * trained).max() < 1e-3


def test_a_table_that_does_not_grow_evenly_is_left_alone():
    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, rows = model_table(2048, torch.float32)
            rows[1000:] = rows[1000:].flip(0)
            self.register_buffer("cos_sin_cache", rows)

    from vllm_sink.rotation.candidates import tables_of

    rotary = Rotary()
    before = rotary.cos_sin_cache.clone()
    table = next(tables_of([("rotary", rotary)], 64, torch.float32))
    assert rotation_exact.make_exact(rotary, table, 2048, 2048) is None
    assert torch.equal(rotary.cos_sin_cache, before)
    straight = Rotary()
    straight.cos_sin_cache = model_table(2048, torch.float32)[1]
    table = next(tables_of([("rotary", straight)], 64, torch.float32))
    assert rotation_exact.make_exact(straight, table, 1024, 2048) is table


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_llama(
        tmp_path_factory.mktemp("tiny"),
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=2048,
    )


@pytest.mark.parametrize(
    "positions, window", [("cache", WINDOW), ("absolute", WINDOW), ("cache", 4096)]
)
def test_no_position_is_past_the_table(path, monkeypatch, positions, window):
    """Also where no query is turned: by choice, or because nothing is evicted."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with (
        pytest.raises(ValueError, match=r"<= 2048, the rows of the rotary .* got 3000"),
        sink_engine(
            path,
            SINKS,
            window,
            positions=positions,
            max_model_len=3000,
            skip_tokenizer_init=True,
        ),
    ):
        pass


def logprobs_at(llm, tokens: list[int], offset: int) -> torch.Tensor:
    """[SCORED]: of the text's end, ``offset`` tokens after its sinks.

    Taken from the hidden states: vLLM's own would come with those of the prefix.
    """
    filler = torch.randint(
        3, 512, (offset,), generator=torch.Generator().manual_seed(offset)
    ).tolist()
    prompt = tokens[:SINKS] + filler + tokens[SINKS:]
    model = model_runner(llm).get_model()
    kept: list[torch.Tensor] = []

    def keep(module, args, output):
        kept.append(output.clone())
        del kept[:-2]

    hook = model.register_forward_hook(keep)
    try:
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=1),
            use_tqdm=False,
        )
    finally:
        hook.remove()
    hidden = torch.cat(kept)[: -1 if len(kept[-1]) == 1 else None]
    logits = model.compute_logits(hidden[-SCORED - 1 : -1])
    chosen = torch.tensor(tokens[-SCORED:])[:, None]
    return torch.log_softmax(logits.float(), -1).gather(1, chosen)[:, 0]


def far_from_near(path: str, impl: str, offsets: list[int]) -> dict[int, float]:
    """The largest difference in log-probability, by offset."""
    tokens = torch.randint(
        3, 512, (TEXT,), generator=torch.Generator().manual_seed(7)
    ).tolist()
    length = max(offsets) + TEXT + 16
    with sink_engine(
        path,
        SINKS,
        WINDOW,
        max_model_len=length,
        hf_overrides={"max_position_embeddings": length},
        max_num_batched_tokens=8192,
        max_num_seqs=1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        model_impl=impl,
    ) as llm:
        near = logprobs_at(llm, tokens, 0)
        assert near.std() > 0.1
        return {
            offset: (logprobs_at(llm, tokens, offset) - near).abs().max().item()
            for offset in offsets
        }


def test_the_reference_has_exact_angles(path):
    """A text a million positions out, and no engine: float32 is 0.06 rad off there."""
    tokens = torch.randint(3, 512, (300,), generator=torch.Generator().manual_seed(5))
    model, policy = load(path), (tokens.tolist(), SINKS, WINDOW)
    near = logprobs(model, *policy)
    far = logprobs(model, *policy, first_position=1_000_000)
    assert (far - near).abs().max() < 1e-4


def test_one_text_at_far_offsets(path):
    """What a query sees is the same there, and so is what it says."""
    for offset, apart in far_from_near(path, "vllm", OFFSETS).items():
        print(f"at {offset}: {apart:.1e}")
        assert apart < TOLERANCE, offset


def test_one_text_at_a_far_offset_of_a_transformers_model(path):
    """In a process of its own: vLLM wraps the class of Transformers for good there.

    ``model_impl="transformers"`` decorates ``LlamaModel`` itself with vLLM's
    compilation, and no plain Transformers model of that class can be made after it.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        apart = pool.submit(far_from_near, path, "transformers", [100_000]).result()
    assert apart[100_000] < TOLERANCE


def test_nothing_changes_within_the_trained_length(path, monkeypatch):
    called = []
    monkeypatch.setattr(
        "vllm_sink.rotation.measure.make_exact",
        lambda *arguments: called.append(arguments),
    )
    with sink_engine(
        path, SINKS, WINDOW, max_model_len=2048, skip_tokenizer_init=True
    ) as llm:
        rotary = model_runner(llm).get_model().model.layers[0].self_attn.rotary_emb
        want = rotary._compute_cos_sin_cache()
        assert torch.equal(rotary.cos_sin_cache, want)
    assert not called
