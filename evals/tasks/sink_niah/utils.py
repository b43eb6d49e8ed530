"""A needle in a haystack of prose, with needles of the same form beside it."""

import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import sink_data


def documents(
    lengths: list[int],
    depths: list[int],
    num_samples: int = 1,
    num_distractors: int = 2,
    data_seed: int = 0,
    max_gen_toks: int = 8,
    **settings: Any,
) -> dict[str, Any]:
    """One prompt for each length, depth (per cent of the prose) and sample.

    The needle tells a person's favourite fruit; ``num_distractors`` sentences
    elsewhere tell other people's. Docs are as in ``sink_passkey``.
    """
    sink_data.check_lengths(lengths, max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for length in lengths:
        for depth in depths:
            for index in range(num_samples):
                rng = random.Random(f"niah {data_seed} {length} {depth} {index}")
                count = num_distractors + 1
                people = [
                    f"{first} {last}"
                    for first, last in zip(
                        rng.sample(sink_data.NAMES, count),
                        rng.sample(sink_data.SURNAMES, count),
                        strict=True,
                    )
                ]
                fruits = rng.sample(sink_data.FRUITS, count)
                docs.append(
                    sink_data.haystack(
                        tokenizer,
                        length,
                        depth,
                        text,
                        needles=[
                            f"The favourite fruit of {person} is {fruit}."
                            for person, fruit in zip(people, fruits, strict=True)
                        ],
                        question=f"The favourite fruit of {people[0]} is",
                        answer=fruits[0],
                        rng=rng,
                    )
                )
    return sink_data.as_dataset(docs)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first word is the fruit."""
    right = float(sink_data.first_word(results[0]) == doc["answer"])
    return {
        "acc": right,
        f"acc_len_{doc['length']}": right,
        f"acc_depth_{doc['depth']}": right,
    }
