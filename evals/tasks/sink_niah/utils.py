"""A needle in a haystack of prose, with needles of the same forms beside it."""

import random
from typing import Any

from evals.tasks import sink_data
from vllm_sink.tools.heads.needles import draw_needles


def documents(
    lengths: list[int],
    depths: list[int],
    num_samples: int = 1,
    num_distractors: int = 7,
    data_seed: int = 0,
    max_gen_toks: int = 8,
    **settings: Any,
) -> dict[str, Any]:
    """One prompt for each length, depth (per cent of the prose) and sample.

    Needles tell a person's favourite fruit or a city's five-digit code;
    ``num_distractors`` others lie elsewhere, half of each kind, and the two kinds are
    asked for in turn. Docs are as in ``sink_passkey``, with ``kind``.
    """
    sink_data.check_lengths(lengths, max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for length in lengths:
        for place, depth in enumerate(depths):
            for index in range(num_samples):
                rng = random.Random(f"niah {data_seed} {length} {depth} {index}")
                needles = draw_needles(rng, num_distractors + 1)
                asked = needles[(place + index) % min(2, len(needles))]
                others = [needle for needle in needles if needle is not asked]
                doc = sink_data.haystack(
                    tokenizer,
                    length,
                    depth,
                    text,
                    needles=[needle.sentence for needle in (asked, *others)],
                    question=asked.question,
                    answer=asked.answer.strip(),
                    rng=rng,
                )
                docs.append({**doc, "kind": asked.kind})
    return sink_data.as_dataset(docs)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first word is the fruit, or the code."""
    right = float(sink_data.first_word(results[0]) == doc["answer"])
    return {
        "acc": right,
        f"acc_len_{doc['length']}": right,
        f"acc_depth_{doc['depth']}": right,
    }
