"""Chats whose system prompt must be obeyed after the window slid past it.

A conversation: a rule in the system prompt and examples of it, then turns in which
the user gives prose and the assistant answers with a number (digits have no case and
tell nothing of the rule), then a question. Scored by string.
"""

import functools
import random
from typing import Any

from evals.tasks import sink_data

# Shown right after the system prompt: small models need to see a rule at work.
EXAMPLES = (
    ("What do cows drink?", "Cows drink water."),
    ("Who wrote Hamlet?", "Hamlet was written by Shakespeare."),
    ("What do we use to cut bread?", "We cut bread with a knife."),
)
CODE_WORDS = ("tangerine", "lighthouse", "butterfly", "cathedral", "volcano", "marble")
QUESTIONS = (
    "What is the capital of France?",
    "What colour is the sky on a clear day?",
    "Which animal gives us wool?",
    "What do bees make?",
    "In which season does snow fall?",
    "What do we call frozen water?",
    "Which planet do we live on?",
    "What is the opposite of hot?",
)
PASSAGE = "How many words are in this passage?"
# What the system prompt tells, how it is asked for, and how the answer begins.
CITIES = ("Prague", "Lisbon", "Vienna", "Dublin", "Athens", "Boston")
FACTS = {
    "name": ("What is your name?", "My name is"),
    "city": ("Where do you live?", "I live in"),
}
RULES = (*FACTS, "upper_case", "code_word")
TURN_WORDS = 60


def _instructions(
    rule: str, code_word: str, name: str, city: str
) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt and examples that obey it."""
    if rule in FACTS:
        system = f"You are {name}. You live in {city}."
        told = {"name": name, "city": city}
        return system, [
            (ask, f"{begun} {told[fact]}.") for fact, (ask, begun) in FACTS.items()
        ]
    if rule == "upper_case":
        system = "You write every answer in upper case letters only."
        return system, [(ask, answer.upper()) for ask, answer in EXAMPLES]
    system = f"Whatever you are asked, you answer with the code word {code_word}."
    return system, [(ask, f"{code_word}.") for ask, _ in EXAMPLES]


def documents(
    lengths: list[int],
    num_samples: int = 1,
    rules: tuple[str, ...] | list[str] = tuple(FACTS),
    begin_answer: bool = True,
    data_seed: int = 0,
    max_gen_toks: int = 24,
    **settings: Any,
) -> dict[str, Any]:
    """One conversation for each length and sample.

    Args:
        begin_answer: Whether the prompt ends with the beginning of a fact's answer
            ("My name is"): a small model digresses otherwise.

    Rendered by the tokenizer's chat template (plain ``User:`` lines without one):
    run it without ``--apply_chat_template``. Each doc: ``prompt`` of at most
    ``length`` tokens, ``num_tokens``, ``num_rule_tokens``: the tokens up to the end
    of the examples; ``num_sink_tokens`` must be that many to keep the rule.
    """
    unknown = sorted(set(rules) - set(RULES))
    if unknown:
        raise ValueError(
            f"rules must be among {', '.join(RULES)}, got {unknown}; correct --metadata"
        )
    sink_data.check_lengths(lengths, max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for length in lengths:
        for index in range(num_samples):
            rng = random.Random(f"chat {data_seed} {length} {index}")
            rule = rules[index % len(rules)]
            code_word = rng.choice(CODE_WORDS)
            name, city = rng.choice(sink_data.NAMES), rng.choice(CITIES)
            question, begun = FACTS.get(rule, (rng.choice(QUESTIONS), ""))
            wanted = {"name": name, "city": city, "code_word": code_word}
            system, examples = _instructions(rule, code_word, name, city)
            ends = sink_data.word_ends(text)
            room = max(1, sum(end < len(text) - 12 * length for end in ends))
            part = text[ends[rng.randrange(room)] :].lstrip()
            opening = [{"role": "system", "content": system}]
            for ask, answer in examples:
                opening.append({"role": "user", "content": ask})
                opening.append({"role": "assistant", "content": answer})
            begun = begun if begin_answer else ""
            render = functools.partial(
                _conversation, tokenizer, opening, question, begun
            )
            prompt = sink_data.fill(tokenizer, length, part, render)
            last = examples[-1][1]
            # Before the first passage, "last" ends with the last example.
            start = prompt[: prompt.index(PASSAGE)]
            kept = start[: start.rindex(last) + len(last)]
            docs.append(
                {
                    "prompt": prompt,
                    "answer": wanted.get(rule, ""),
                    "rule": rule,
                    "length": length,
                    "num_tokens": sink_data.count_tokens(tokenizer, prompt),
                    "num_rule_tokens": sink_data.count_tokens(tokenizer, kept),
                }
            )
    return sink_data.as_dataset(docs)


def _conversation(
    tokenizer, opening: list[dict], question: str, begun: str, part: str
) -> str:
    messages = list(opening)
    words = part.split()
    for start in range(0, len(words), TURN_WORDS):
        passage = words[start : start + TURN_WORDS]
        content = f"{PASSAGE}\n{' '.join(passage)}"
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": str(len(passage))})
    messages.append({"role": "user", "content": question})
    if getattr(tokenizer, "chat_template", None):
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return asked + begun
    lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n".join([*lines, f"Assistant: {begun}".rstrip()])


def obeys(rule: str, wanted: str, answer: str) -> bool:
    """Whether the answer is upper case, starts with the code word, or has the fact."""
    if rule == "upper_case":
        return answer.isupper()
    if rule == "code_word":
        return sink_data.first_word(answer) == wanted
    return wanted in answer


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the rule is obeyed."""
    right = float(obeys(doc["rule"], doc["answer"], results[0]))
    return {
        "acc": right,
        f"acc_{doc['rule']}": right,
        f"acc_len_{doc['length']}": right,
    }
