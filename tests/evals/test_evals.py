"""The evaluation tasks: loaded by the harness, scored against hand-made answers."""

import math
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra: pip install -e .[eval]")

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TASKS = Path(__file__).parents[2] / "evals" / "tasks"
SMOKE = [
    f"sink_{name}_smoke" for name in ("ppl", "stream_qa", "passkey", "niah", "chat")
]


@pytest.fixture(scope="session")
def bpe_path(tmp_path_factory) -> str:
    """A second tokenizer, byte-level BPE of 4,000 entries."""
    import pydoc_data.topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = sorted(pydoc_data.topics.topics.values())
    tokenizer.train_from_iterator(texts, trainer)
    path = str(tmp_path_factory.mktemp("bpe"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(params=["smollm2", "bpe"])
def tokenizer_path(request, model_path, bpe_path) -> str:
    return model_path if request.param == "smollm2" else bpe_path


def load(task: str, tokenizer: str, **metadata):
    """The harness's task, its texts counted in ``tokenizer``'s tokens."""
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"tokenizer": tokenizer, **metadata},
    )
    return manager.load([task])["tasks"][task]


def docs_of(task: str, tokenizer: str, **metadata) -> list[dict]:
    return list(load(task, tokenizer, **metadata).eval_docs)


class Scripted(LM):
    """Answers each document by a function of it: a number, or a text."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests):
        return [(self.answer(request.doc), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return [self.answer(request.doc) for request in requests]


def evaluate(task: str, tokenizer: str, answer) -> dict[str, float]:
    """The harness's results, without the filter's name and the errors."""
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"tokenizer": tokenizer},
    )
    results = simple_evaluate(
        Scripted(answer), tasks=[task], task_manager=manager, bootstrap_iters=0
    )["results"][task]
    return {
        key.removesuffix(",none"): value
        for key, value in results.items()
        if key.endswith(",none") and "stderr" not in key
    }


def test_perplexity_is_scored_by_position(model_path):
    """Two documents of two stretches, log-likelihoods -10 and -30 each."""
    scores = evaluate(
        "sink_ppl_smoke", model_path, lambda doc: -10 if doc["end"] == 128 else -30
    )
    docs = docs_of("sink_ppl_smoke", model_path)
    first, second, third, fourth = (doc["num_tokens"] for doc in docs)
    assert [doc["end"] for doc in docs] == [128, 512, 128, 512]
    assert scores == pytest.approx(
        {
            "ppl_to_128": math.exp(20 / (first + third)),
            "ppl_to_512": math.exp(60 / (second + fourth)),
            "ppl": math.exp(80 / (first + second + third + fourth)),
        }
    )


def test_stream_qa_is_scored_by_distance(model_path):
    """A model that remembers 100 tokens: right at 40 and 80, wrong at 240."""
    scores = evaluate(
        "sink_stream_qa_smoke",
        model_path,
        lambda doc: f" {doc['answer']}." if doc["num_back"] <= 100 else " Nobody",
    )
    assert scores == pytest.approx(
        {"acc": 6 / 9, "acc_back_40": 1, "acc_back_80": 1, "acc_back_240": 0}
    )


@pytest.mark.parametrize("task", ["sink_passkey_smoke", "sink_niah_smoke"])
def test_retrieval_is_scored_by_length_and_depth(model_path, task):
    """A model that remembers 100 tokens: 128 tokens from half on, 400 at the end."""
    scores = evaluate(
        task,
        model_path,
        lambda doc: f" {doc['answer']}." if doc["num_back"] <= 100 else " 0",
    )
    assert scores == pytest.approx(
        {
            "acc": 3 / 6,
            "acc_len_128": 2 / 3,
            "acc_len_400": 1 / 3,
            "acc_depth_0": 0,
            "acc_depth_50": 1 / 2,
            "acc_depth_95": 1,
        }
    )


def test_chat_is_scored_by_rule_and_length(model_path):
    """The name is told and the city is not; both in a sentence."""
    scores = evaluate(
        "sink_chat_smoke",
        model_path,
        lambda doc: f"My name is {doc['answer'] if doc['rule'] == 'name' else 'X'}.",
    )
    assert scores == pytest.approx(
        {
            "acc": 1 / 2,
            "acc_name": 1,
            "acc_city": 0,
            "acc_len_250": 1 / 2,
            "acc_len_400": 1 / 2,
        }
    )


@pytest.mark.parametrize(
    "rule, wanted, answer, obeyed",
    [
        ("name", "Nora", "My name is Nora.", True),
        ("city", "Prague", "I live in Lisbon.", False),
        ("upper_case", "", "PARIS, 2 TIMES.", True),
        ("upper_case", "", "42.", False),  # digits alone are not upper case
        ("code_word", "marble", "Marble, I say", True),
        ("code_word", "marble", "I say marble", False),
    ],
)
def test_rules(rule, wanted, answer, obeyed):
    assert load_utils("sink_chat").obeys(rule, wanted, answer) == obeyed


def test_chat_tells_the_facts_at_its_start_alone(model_path):
    """What is asked for stands in the part that the sinks would have to cover."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for doc in docs_of("sink_chat_smoke", model_path):
        assert doc["answer"] in doc["prompt"]
        rest = tokenizer(doc["prompt"]).input_ids[doc["num_rule_tokens"] :]
        assert doc["answer"] not in tokenizer.decode(rest)
    docs = docs_of("sink_chat_smoke", model_path)
    assert [doc["prompt"].split()[-3:] for doc in docs[:2]] == [
        ["My", "name", "is"],
        ["I", "live", "in"],
    ]
    asked = docs_of("sink_chat_smoke", model_path, begin_answer=False)
    assert not any(doc["prompt"].endswith(("is", "in")) for doc in asked)
    rules = ["upper_case", "code_word"]
    docs = docs_of("sink_chat_smoke", model_path, rules=rules)
    assert [doc["rule"] for doc in docs] == rules * 2
    with pytest.raises(ValueError, match="rules must be among name, city"):
        docs_of("sink_chat_smoke", model_path, rules=["rhyme"])


@pytest.mark.parametrize("task", SMOKE)
def test_generation_is_deterministic(task, tokenizer_path):
    again = docs_of(task, tokenizer_path, lengths=[1024])
    assert docs_of(task, tokenizer_path, lengths=[1024]) == again
    if "ppl" not in task:
        other = docs_of(task, tokenizer_path, lengths=[1024], data_seed=1)
        assert other != again


@pytest.mark.parametrize("lengths", [[128, 256], [1024]])
def test_document_lengths(tokenizer_path, lengths):
    """Each stretch ends where it says, less than a word early."""
    encode = AutoTokenizer.from_pretrained(tokenizer_path)
    for doc in docs_of("sink_ppl_smoke", tokenizer_path, lengths=lengths):
        whole = encode(doc["context"] + doc["continuation"]).input_ids
        assert doc["end"] - 16 < len(whole) <= doc["end"]
        # What the harness will score is what the perplexity is divided by.
        context = encode(doc["context"]).input_ids
        assert doc["num_tokens"] == len(whole) - len(context)
        assert whole[: len(context)] == context


@pytest.mark.parametrize("task", ["sink_passkey_smoke", "sink_niah_smoke"])
def test_retrieval_lengths_and_depths(tokenizer_path, task):
    encode = AutoTokenizer.from_pretrained(tokenizer_path)
    docs = docs_of(task, tokenizer_path, lengths=[300, 900], depths=[0, 30, 95])
    for doc in docs:
        num_tokens = len(encode(doc["prompt"]).input_ids)
        assert doc["length"] - 16 < num_tokens <= doc["length"]
        assert doc["prompt"].index(doc["answer"]) > 0
        # The question and the other needles are not prose: a margin for them.
        where = 1 - doc["num_back"] / num_tokens
        assert abs(where - doc["depth"] / 100) < 0.25
    assert len(docs) == 6


def test_stream_distances(tokenizer_path):
    encode = AutoTokenizer.from_pretrained(tokenizer_path)
    docs = docs_of(
        "sink_stream_qa_smoke",
        tokenizer_path,
        lengths=[1500],
        distances=[60, 700],
        num_queries=3,
    )
    assert [sum(d["distance"] == w for d in docs) for w in (60, 700)] == [9, 9]
    assert {doc["kind"] for doc in docs} == {"fruit", "code"}
    for doc in docs:
        prompt = doc["prompt"]
        question = prompt[prompt.rindex("The ") :]
        fact = f"{question} {doc['answer']}."
        assert prompt.count(fact) == 1, "the stream tells the answer once"
        assert prompt.count(doc["answer"]) == 1
        back = len(encode(prompt[prompt.index(fact) :]).input_ids)
        # Moved by a line where two would touch.
        assert abs(back - doc["distance"]) <= 30
        assert abs(back - doc["num_back"]) <= 2
        num_tokens = len(encode(prompt).input_ids)
        assert doc["num_tokens"] == num_tokens <= 1500
    longest = max(doc["num_tokens"] for doc in docs)
    assert longest > 1400


def test_the_window_sees_no_answer_that_is_far_back(model_path):
    """Of the smoke tasks, for S + W = 4 + 124: what only retrieval heads can tell."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    docs = docs_of("sink_stream_qa_smoke", model_path)
    docs += docs_of("sink_chat_smoke", model_path)
    far = [doc for doc in docs if doc.get("distance", 240) == 240]
    assert len(far) == 3 + 4
    for doc in far:
        tokens = tokenizer(doc["prompt"]).input_ids
        seen = tokenizer.decode(tokens[:4] + tokens[-124:])
        assert doc["answer"] not in seen
        assert doc["answer"] in doc["prompt"]


def test_chat_lengths(tokenizer_path):
    encode = AutoTokenizer.from_pretrained(tokenizer_path)
    for doc in docs_of("sink_chat_smoke", tokenizer_path, lengths=[600, 1200]):
        num_tokens = len(encode(doc["prompt"]).input_ids)
        # A passage more costs a whole turn.
        assert doc["length"] - 40 < num_tokens <= doc["length"]
        assert doc["num_rule_tokens"] < 250


def test_groups_and_declared_metrics(model_path):
    """The groups name tasks that exist; perplexity needs a declared metric."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert {"sink_long", "sink_smoke"} <= set(manager.all_groups)
    task = load("sink_ppl_smoke", model_path)
    ends = load_utils("sink_ppl").ENDS
    assert set(task.aggregation()) == {"ppl", *(f"ppl_to_{end}" for end in ends)}
    assert task.VERSION == 1.0


def load_utils(task: str):
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    return _load_module_with_cache(TASKS / task / "utils.py")


class TestRefused:
    """What would be cut, or would measure nothing, is not run."""

    @pytest.mark.parametrize("task", SMOKE)
    def test_longer_than_the_model(self, model_path, task):
        with pytest.raises(ValueError, match="must be at most max_model_len"):
            load(task, model_path, max_model_len=200)

    @pytest.mark.parametrize("task", SMOKE)
    def test_inside_the_window(self, model_path, task):
        with pytest.raises(ValueError, match="must exceed num_sink_tokens"):
            load(task, model_path, attention_backend="sink")

    def test_outside_the_window_is_taken(self, model_path):
        sink = {"num_sink_tokens": 4, "window_size": 124}
        load(
            "sink_ppl_smoke",
            model_path,
            attention_backend="sink",
            additional_config={"sink": sink},
            max_model_len=514,
        )

    def test_more_questions_than_fit(self, model_path):
        with pytest.raises(ValueError, match="num_facts must be from 12"):
            load("sink_stream_qa_smoke", model_path, num_queries=4)
        with pytest.raises(ValueError, match="distances must leave room") as error:
            load("sink_stream_qa_smoke", model_path, distances=[40, 500])
        least = int(re.search(r"raise lengths to (\d+)", str(error.value)).group(1))
        load("sink_stream_qa_smoke", model_path, distances=[40, 500], lengths=[least])

    def test_undeclared_length(self, model_path):
        with pytest.raises(ValueError, match="declare a metric"):
            load("sink_ppl_smoke", model_path, lengths=[300])

    def test_text(self, model_path, tmp_path):
        with pytest.raises(ValueError, match="text must be 'pydoc'"):
            load("sink_ppl_smoke", model_path, text=str(tmp_path / "none.txt"))
        short = tmp_path / "short.txt"
        short.write_text("Only a few words stand here, " * 5)
        with pytest.raises(ValueError, match="text must hold at least"):
            load("sink_ppl_smoke", model_path, text=str(short))

    def test_no_tokenizer(self):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        with pytest.raises(ValueError, match="tokenizer must be known"):
            manager.load(["sink_niah_smoke"])
