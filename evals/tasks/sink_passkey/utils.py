"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300) in real prose."""

import random
from typing import Any

from evals.tasks import sink_data


def documents(
    lengths: list[int],
    depths: list[int],
    num_samples: int = 1,
    data_seed: int = 0,
    max_gen_toks: int = 8,
    **settings: Any,
) -> dict[str, Any]:
    """One prompt for each length, depth (per cent of the prose) and sample.

    Each doc: ``prompt`` of at most ``length`` tokens, ``num_tokens``, ``answer``,
    ``length``, ``depth``, ``num_back``: tokens from the key to the end.
    """
    sink_data.check_lengths(lengths, max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for length in lengths:
        for depth in depths:
            for index in range(num_samples):
                rng = random.Random(f"passkey {data_seed} {length} {depth} {index}")
                key = str(rng.randrange(10_000, 100_000))
                needle = f"The pass key is {key}. Remember it. {key} is the pass key."
                docs.append(
                    sink_data.haystack(
                        tokenizer,
                        length,
                        depth,
                        text,
                        needles=[needle],
                        question="What is the pass key? The pass key is",
                        answer=key,
                        rng=rng,
                    )
                )
    return sink_data.as_dataset(docs)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer starts with the key's digits."""
    right = float(results[0].strip().startswith(doc["answer"]))
    return {
        "acc": right,
        f"acc_len_{doc['length']}": right,
        f"acc_depth_{doc['depth']}": right,
    }
