"""Chats of growing history, on the real model; drafts: tests/engine/test_drafters."""

from vllm import SamplingParams

from tests.helpers.engine import sink_engine
from tests.helpers.retention_oracle import Oracle, Sequence

BLOCK = 32
SINKS, WINDOW = 4, 60
QUESTIONS = [
    "Tell me how a lighthouse works, from the lamp to the lens, at some length. "
    "Then tell me who keeps it, and what they do when a storm comes in at night.",
    "And what did the keepers of the past do with their days?",
    "Which of these would you take to an island, and why?",
]


def retained_prefixes(oracle: Oracle, sequence: Sequence, boundary: int) -> set[int]:
    """Prefixes that a hit of ``boundary`` tokens needs: sinks and window."""
    size = oracle.block_size
    indices = [i for i in range(boundary // size) if not oracle.in_gap(i, boundary)]
    return {sequence.name((i + 1) * size - 1) for i in indices}


def test_three_turns_report_the_predicted_cached_tokens(model_path):
    """With defaults each turn pays for what no turn before it passed through."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    messages = []
    oracle = Oracle(SINKS, WINDOW, BLOCK)
    cached: set[int] = set()
    hits = []
    with sink_engine(
        model_path, SINKS, WINDOW, block_size=BLOCK, max_model_len=1024
    ) as llm:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            output = llm.chat(messages, params, use_tqdm=False)[0]
            prompt = list(output.prompt_token_ids)
            want = oracle.longest_hit(Sequence(prompt), len(prompt) - 1, cached)
            assert output.num_cached_tokens == want
            hits.append(want)
            answer = output.outputs[0]
            messages.append({"role": "assistant", "content": answer.text})
            # The last token of the answer is sampled but has no key yet.
            sequence = Sequence(prompt + list(answer.token_ids)[:-1])
            for boundary in range(BLOCK, len(sequence.tokens) + 1, BLOCK):
                cached |= retained_prefixes(oracle, sequence, boundary)
    print(hits)
    assert hits[0] == 0 < hits[1] < hits[2]
