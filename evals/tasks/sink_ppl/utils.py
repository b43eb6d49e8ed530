"""Perplexity by position: one request for each stretch of the document.

The harness returns a sum per request, so a stretch from token a to b is the
request (text up to a, text from a to b): the whole text before it is context.
"""

from typing import Any

from evals.tasks import sink_data

# The metrics that sink_ppl.yaml declares, beside "ppl".
ENDS = (128, 256, 512, 1024, 2048, 4096, 8000, 12288, 16384, 24576, 32768, 65536)


def documents(
    lengths: list[int], num_samples: int = 1, **settings: Any
) -> dict[str, Any]:
    """Stretches ending at ``lengths`` tokens of ``num_samples`` documents.

    Each doc: ``context`` and ``continuation``, ``end`` (of ``lengths``), and
    ``num_tokens``, those that the harness scores.
    """
    unknown = sorted(set(lengths) - set(ENDS))
    if unknown:
        raise ValueError(
            f"lengths must be among {ENDS}, got {unknown}; or declare a metric "
            "ppl_to_LENGTH in sink_ppl.yaml and add it to ENDS"
        )
    sink_data.check_lengths(lengths, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for index in range(num_samples):
        # The first stretch starts after one word: a request needs a context.
        context = sink_data.fill(tokenizer, 8, text, str)
        for end in sorted(lengths):
            whole = sink_data.fill(tokenizer, end, text, str)
            count = sink_data.count_tokens
            docs.append(
                {
                    "sample": index,
                    "end": end,
                    "context": context,
                    "continuation": whole[len(context) :],
                    "num_tokens": count(tokenizer, whole) - count(tokenizer, context),
                }
            )
            context = whole
        text = text[len(context) :].lstrip()
    return sink_data.as_dataset(docs)


def score(doc: dict[str, Any], results: list) -> dict[str, tuple[float, int]]:
    """(log-likelihood, tokens), once for the whole and once for the stretch."""
    ((log_likelihood, _),) = results
    item = (log_likelihood, doc["num_tokens"])
    return {"ppl": item, f"ppl_to_{doc['end']}": item}
