"""The measured rotation: layers that it accepts, layers that it refuses, and why."""

import re
from types import MethodType, SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaAttention

from tests.helpers.engine import model_runner, sink_engine
from tests.helpers.random_llama import save_llama
from vllm_sink.engine import Engine
from vllm_sink.rotation import measure
from vllm_sink.rotation.measure import measure_model
from vllm_sink.rotation.table import (
    RotaryTable,
    Unknown,
    check_table,
    find_rotation,
)

LENGTH = 16384  # past the first step of Llama 4's temperature


class Loaded:
    """A loaded tiny Llama whose attention's forward a test may replace."""

    def __init__(self, llm) -> None:
        runner = model_runner(llm)
        self.config = runner.vllm_config
        context = self.config.compilation_config.static_forward_context
        self.layers = {
            name: layer
            for name, layer in context.items()
            if isinstance(layer, Attention)
        }
        self.engine = Engine.of(self.config)
        self.root = self.engine.ancestors(next(iter(self.layers.values())))[-1]
        assert self.root is runner.get_model()

    def measure(self):
        with set_current_vllm_config(self.config):
            found = measure_model(self.engine, self.root, self.layers)
        assert list(found) == list(self.layers)
        assert not any("forward" in vars(layer.impl) for layer in self.layers.values())
        return list(found.values())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request, tmp_path_factory):
    path = save_llama(
        tmp_path_factory.mktemp("llama"),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    with sink_engine(
        path,
        4,
        60,
        dtype=request.param,
        max_model_len=LENGTH,
        skip_tokenizer_init=True,
    ) as llm:
        yield Loaded(llm)


def forward(change=None, *, rotates=("q", "k"), times=1):
    """A Llama attention's forward: rotate, then ``change(positions, q, k)``."""

    def attend(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = q.contiguous(), k.contiguous()
        for _ in range(times):
            turned_q, turned_k = self.rotary_emb(positions, q.clone(), k.clone())
            q = turned_q if "q" in rotates else q
            k = turned_k if "k" in rotates else k
        if change is not None:
            q, k = change(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    return attend


def by_temperature(positions, q, k):
    """Llama 4's scale of queries: 1 before 8,192, 1.07 after."""
    scale = 1 + 0.1 * torch.log(torch.floor((positions + 1.0) / 8192) + 1)
    return (q * scale[:, None]).to(q.dtype), k


def by_length(positions, q, k):
    """Whole batches alike, but another scale once a long position is there."""
    return q, k * (1.2 if positions.max() > 9000 else 1.0)


def by_dimension(positions, q, k):
    return q, k * torch.linspace(0.7, 1.3, k.shape[-1], dtype=k.dtype)


def by_row(positions, q, k):
    """A row hears of its neighbour, as where a convolution mixes tokens."""
    return q, k + 0.3 * k.roll(1, 0)


REFUSED = {
    "twice": (forward(times=2), "queries are explained by no table"),
    "keys alone": (
        forward(rotates=("k",)),
        "queries are not rotated, its keys rotated by model.*cos_sin_cache",
    ),
    "queries alone": (
        forward(rotates=("q",)),
        "queries are rotated by model.*cos_sin_cache, its keys not rotated",
    ),
    "temperature": (forward(by_temperature), r"at position 16383 is off by"),
    "length": (forward(by_length), "at position 0 with the positions beside it"),
    "scaled by dimension": (forward(by_dimension), "its keys explained by no table"),
    "neighbours": (forward(by_row), "reaches it in different ways"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_table_explains_is_refused(loaded, monkeypatch, kind):
    change, message = REFUSED[kind]
    monkeypatch.setattr(LlamaAttention, "forward", change)
    for found in loaded.measure():
        assert isinstance(found, Unknown), found
        assert re.search(message, found.seen), found.seen


def test_a_change_of_length_alone_counts_four_times():
    """1% of all rows' length tells more than of a pair's: rounding averages out."""
    from vllm_sink.rotation.candidates import misfit

    first = torch.randn(8, 1, 2, 64)
    seen = torch.cat([first, 1.01 * first], 1)
    worst, position = misfit(seen, torch.tensor([0, 5]), None)
    assert position == 5
    assert worst == pytest.approx(0.04, rel=1e-3)


def twice_as_long(positions, q, k):
    """The same factor everywhere: the turn commutes with it."""
    return 2 * q, k / 3


def with_fp8_noise(x):
    """Rounded to fp8 with a scale of its row, as dynamic quantization does."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


ROTATED = {
    "stock": None,
    "plain": forward(),
    "a constant factor": forward(twice_as_long),
}


@pytest.mark.parametrize("kind", ROTATED)
def test_rotation_by_the_models_table_is_found(loaded, monkeypatch, kind):
    if ROTATED[kind] is not None:
        monkeypatch.setattr(LlamaAttention, "forward", ROTATED[kind])
    rotary = loaded.root.model.layers[0].self_attn.rotary_emb
    for found in loaded.measure():
        assert isinstance(found, RotaryTable)
        assert found.rows.data_ptr() == rotary.cos_sin_cache.data_ptr()
        assert found.rows.shape == rotary.cos_sin_cache.shape
        assert found.is_neox


def test_layers_without_rotation_are_not_turned(loaded, monkeypatch):
    """By layer: the first rotates, the others don't."""
    rotated, plain = forward(), forward(times=0)

    def attend(self, positions, hidden_states):
        first = self is loaded.root.model.layers[0].self_attn
        return (rotated if first else plain)(self, positions, hidden_states)

    monkeypatch.setattr(LlamaAttention, "forward", attend)
    first, *others = loaded.measure()
    assert isinstance(first, RotaryTable)
    assert len(others) == 2 and all(found is None for found in others)


def test_interleaved_and_partial_rotations_are_told_apart(loaded, monkeypatch):
    """The table rotates the first half of the head, in neighbouring pairs."""
    rotary = loaded.root.model.layers[0].self_attn.rotary_emb
    table = rotary.cos_sin_cache
    half = table[:, ::2].clone()
    monkeypatch.setattr(rotary, "rotary_dim", half.shape[1])
    try:
        rotary.cos_sin_cache = half
        for is_neox in (True, False):
            rotary.is_neox_style = is_neox
            for found in loaded.measure():
                assert isinstance(found, RotaryTable), found
                assert found.is_neox == is_neox
                assert found.rotary_dim == half.shape[1]
    finally:
        rotary.cos_sin_cache, rotary.is_neox_style = table, True


@pytest.mark.parametrize("kind", [None, "temperature", "twice", "queries alone"])
def test_fp8_noise_does_not_mislead(loaded, monkeypatch, kind):
    """In either direction: noise is not a rotation, and hides none."""
    for layer in loaded.root.model.layers:
        project = layer.self_attn.qkv_proj
        stock = project.forward
        monkeypatch.setattr(
            project, "forward", lambda x, stock=stock: stock(with_fp8_noise(x))
        )
    monkeypatch.setattr(
        LlamaAttention, "forward", REFUSED[kind][0] if kind else forward()
    )
    for found in loaded.measure():
        assert isinstance(found, Unknown if kind else RotaryTable), found


def test_a_failing_forward_is_a_refusal(loaded, monkeypatch):
    def fail(positions, q, k):
        raise RuntimeError("no such input")

    monkeypatch.setattr(LlamaAttention, "forward", forward(fail))
    for found in loaded.measure():
        assert isinstance(found, Unknown)
        assert "no such input" in found.seen


def test_an_unknown_rotation_names_the_layer_and_absolute(loaded):
    layer, engine = torch.nn.Identity(), loaded.engine
    with pytest.raises(ValueError, match=r"for layers.0.attn: it was not measured; .*"):
        find_rotation(engine, "layers.0.attn", layer)
    engine.rotations[layer] = Unknown("its keys are off")
    with pytest.raises(ValueError, match=r"keys are off; .* 'absolute', which works"):
        find_rotation(engine, "layers.0.attn", layer)


def test_layers_are_looked_over_once_until_there_are_more(monkeypatch):
    looks, layers = [], {"a": 1, "b": 2}
    config = SimpleNamespace(static_forward_context=layers)
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=config), _known={}
    )
    engine.once = MethodType(Engine.once, engine)
    monkeypatch.setattr(measure, "_measure", looks.append)
    for _ in layers:  # vLLM asks for the spec of each
        measure.measure_loaded_model(engine)
    assert looks == [engine]
    layers["drafter"] = 3
    measure.measure_loaded_model(engine)
    assert looks == [engine, engine]


def test_turn_divides_the_magnitude_out():
    positions = torch.arange(4000).double()
    frequency = 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    angle = positions[:, None] * frequency
    table = 1.25 * torch.cat([angle.cos(), angle.sin()], dim=1)
    cos, sin = RotaryTable(table.float(), True).turn(torch.tensor([10, 3999]), 64)
    want = torch.tensor([0.0, 63 - 3999.0]).double()[:, None] * frequency
    assert torch.allclose(cos.double(), want.cos(), atol=1e-5)
    assert torch.allclose(sin.double(), want.sin(), atol=1e-5)


def test_rows_for_every_position():
    table = RotaryTable(torch.zeros(10, 4), True)
    check_table("layer", table, 10)
    with pytest.raises(ValueError, match=r"must be <= 10, the rows .* got 11"):
        check_table("layer", table, 11)
