"""Every architecture of the zoo, against Hugging Face's own forward of it.

docs/models.md is written from what these tests found:
``VLLM_SINK_WHOLE_ZOO=1 VLLM_SINK_WRITE_DOCS=1 pytest tests/zoo``. What didn't run keeps
its cells, so a part of the models (``-k``) or of the modes
(``VLLM_SINK_WHOLE_ZOO='retrieval heads'``) may run at a time.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.engine import model_runner, prompt_logprobs, sink_engine
from tests.helpers.reference import load, logprobs
from tests.zoo.models import VOCABULARY, ZOO, Entry, save
from tests.zoo.sizes import check_size, check_size_of_heads

SINKS, WINDOW, LENGTH = 4, 60, 300
# Fewer blocks than the text has: what is freed is written again.
BLOCK, BLOCKS = 32, {1: 10, 2: 16}  # by how many kinds of layers there are
TOLERANCE = 2e-3
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
HEADS = "retrieval heads"
MODES = ("cache", "absolute", HEADS)
# These modes of every architecture; else `absolute`, which knows nothing of rotations,
# and heads for some.
WHOLE = os.environ.get("VLLM_SINK_WHOLE_ZOO", "")
IN_BOTH = {"Llama", "Mixtral", "Gemma 3", "OLMo 2", "GLM"}
# Heads of two policies beside layers of each other kind, and in either implementation.
WITH_HEADS = {"Gemma 3", "Gemma 4, shared keys", "gpt-oss", "Qwen3-Next"}
WITH_HEADS |= {"Falcon-H1", "Nemotron-H", "LFM2", "Cohere 2", "OLMo 2"}
# name -> implementation and what was found, by mode
outcomes: dict[str, dict[str, str]] = {}


def tokens_of() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (LENGTH,), generator=generator).tolist()


class Reference:
    """The log-probabilities of one model.

    All are computed here, before an engine starts: vLLM's Transformers backend
    changes Hugging Face's class of the model, for all of its instances.
    """

    def __init__(self, entry: Entry, path: str, tokens: list[int]) -> None:
        model = load(path, auto=entry.auto)
        rounded = entry.settings.get("dtype") == "bfloat16"
        self.is_near = rounded or entry.is_near
        self.words = "as near as stock" if entry.is_near else "within rounding"
        if rounded:  # the weights that the engine has, in exact arithmetic
            model = model.to(torch.bfloat16).float()

        def want(window: int, positions: str, heads=None) -> torch.Tensor:
            if entry.learned_positions:
                positions = "absolute"
            return logprobs(
                model,
                tokens,
                SINKS,
                window,
                positions,
                extra_window=entry.extra_window,
                heads=heads,
            )

        # What stands beside retrieval heads.
        self.positions = positions = "absolute" if "cache" in entry.refused else "cache"
        self.scores = scores_of(model.config.get_text_config())
        self.want = {
            HEADS: want(WINDOW, positions, rows_read(model.config, self.scores)),
            "cache": want(WINDOW, "cache"),
            "absolute": want(WINDOW, "absolute"),
            "dense": want(LENGTH, "absolute"),
        }

    def check(self, got: torch.Tensor, positions: str) -> None:
        assert (got - self.want[positions]).abs().max() < TOLERANCE
        dense = (got - self.want["dense"]).abs().max()
        assert dense > 20 * TOLERANCE, "no policy to be seen"
        if positions == HEADS:
            plain = (got - self.want[self.positions]).abs().max()
            assert plain > 20 * TOLERANCE, "no retrieval head to be seen"

    def check_near(self, got, positions: str, unlimited) -> None:
        """As close as the engine is to Hugging Face where nothing is evicted.

        The rest is that of layers without attention (their rounding, or the routes
        of experts), which the policy leaves alone; what it does is far above.
        """
        rounding = (unlimited - self.want["dense"]).abs().mean()
        error = (got - self.want[positions]).abs().mean()
        effect = (self.want["dense"] - self.want[positions]).abs().mean()
        assert error < 1.5 * rounding, (error, rounding)
        assert effect > 4 * error, (effect, error)
        if positions == HEADS:
            plain = (got - self.want[self.positions]).abs().mean()
            assert plain > 1.5 * rounding, "no retrieval head to be seen"


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_architecture(entry, tmp_path, request):
    """Chunked, past S + W, in both modes; or refused, and why."""
    if entry.needs_torchvision:
        request.getfixturevalue("importable_multimodal_models")
    path = save(entry, tmp_path)
    tokens = tokens_of()
    reference = Reference(entry, path, tokens)
    found = {"implementation": "-"} if len(entry.refused) == 2 else {}
    for positions in modes_of(entry):
        refused = entry.refused.get(positions)
        settings = {
            "positions": positions,
            "max_model_len": 512,
            "max_num_batched_tokens": 96,
            "max_num_seqs": 4,
            "block_size": BLOCK,
            "num_gpu_blocks_override": BLOCKS[num_kinds(entry)],
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            **entry.settings,
        }
        if positions == HEADS:
            settings["positions"] = reference.positions
            settings["retrieval"] = {"heads": reference.scores}
            settings["max_model_len"] = 320
            settings["num_gpu_blocks_override"] = 60
            refused = entry.refused_heads or entry.refused.get("absolute")
        if refused is not None:
            with (
                pytest.raises(Exception, match=refused.replace("…", ".*")),
                sink_engine(path, SINKS, WINDOW, **settings),
            ):
                pass
            found[positions] = f"refused: {refused}"
            continue
        with sink_engine(path, SINKS, WINDOW, **settings) as llm:
            found["implementation"] = server_of(model_runner(llm).get_model())
            got = prompt_logprobs(llm, [tokens])[0]
            check = check_size if positions != HEADS else check_size_of_heads
            check(entry, path, llm)
        if reference.is_near:
            settings["num_gpu_blocks_override"] = 64
            settings.pop("retrieval", None)
            with sink_engine(path, SINKS, LENGTH, **settings) as llm:
                unlimited = prompt_logprobs(llm, [tokens])[0]
            reference.check_near(got, positions, unlimited)
            found[positions] = (
                "as near as stock" if entry.is_near else "within rounding"
            )
        else:
            reference.check(got, positions)
            found[positions] = "exact"
    outcomes[entry.name] = found


def modes_of(entry: Entry) -> list[str]:
    """The modes that run."""
    if WHOLE:
        return [mode for mode in MODES if WHOLE == "1" or mode in WHOLE.split(",")]
    among = {"cache"}
    if entry.refused or entry.name in IN_BOTH:
        among.add("absolute")
    if entry.name in WITH_HEADS:
        among.add(HEADS)
    return [mode for mode in MODES if mode in among]


def scores_of(config) -> list[list[int]]:
    """The first head of every fourth layer is a retrieval head."""
    rows = []
    for layer in range(config.num_hidden_layers):
        own = config
        if getattr(config, "is_heterogeneous", False):
            own = config.per_layer_config[layer]
        heads = getattr(own, "num_key_value_heads", own.num_attention_heads)
        rows.append([int(layer % 4 == 1 and head == 0) for head in range(heads)])
    return rows


def rows_read(config, scores) -> list[list[int]]:
    """What each layer obeys: a layer that reads another's keys that one's row.

    Its heads keep everything if a head of either row does.
    """
    config = config.get_text_config()
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    rows = [list(row) for row in scores]
    first = len(rows) - shared
    for layer in range(first, len(rows)):
        kinds = config.layer_types
        owner = rows[max(i for i in range(first) if kinds[i] == kinds[layer])]
        owner[:] = map(max, owner, rows[layer])
        rows[layer] = owner
    return rows


def num_kinds(entry: Entry) -> int:
    return len(set(entry.config.get("layer_types", "."))) or 1


def server_of(model: torch.nn.Module) -> str:
    is_generic = type(model).__name__.startswith("Transformers")
    return "Transformers backend" if is_generic else "vLLM"


def test_docs_say_what_was_found():
    text = DOCS.read_text()
    table = re.compile(r"(?<=<!-- zoo -->\n).*(?=<!-- /zoo -->)", re.S)
    page = table.sub(lambda match: render(match.group()), text)
    if os.environ.get("VLLM_SINK_WRITE_DOCS"):
        DOCS.write_text(page)
    assert DOCS.read_text() == page


def render(before: str) -> str:
    """The table; what did not run this time is as it was ``before``."""
    earlier = {
        cells[1]: cells
        for cells in (row.split(" | ") for row in before.splitlines())
        if len(cells) > 5
    }
    rows = [
        "| architecture | models | implementation | `cache` | `absolute` "
        "| retrieval heads | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in ZOO:
        known = earlier.get(entry.used_by, ["not run"] * 6)
        found = outcomes.get(entry.name, {})
        cells = (
            f"{entry.name} (`{entry.kind}`)",
            entry.used_by,
            *(
                found.get(column, cell)
                for column, cell in zip(
                    ("implementation", *MODES), known[2:6], strict=True
                )
            ),
            entry.notes,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
