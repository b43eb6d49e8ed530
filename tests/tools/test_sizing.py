"""The calculator against vLLM's own specs, groups and start-up figure."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    Cohere2Config,
    DistilBertConfig,
    Exaone4Config,
    FalconConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MllamaConfig,
    Qwen2Config,
    T5Config,
    WhisperConfig,
)
from vllm.v1.core.kv_cache_utils import (
    _get_kv_cache_groups_uniform_page_size,
    get_max_concurrency_for_kv_cache_config,
    unify_kv_cache_spec_page_size,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.helpers.engine import core, sink_engine
from tests.helpers.reference import random_heads
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import cli, model_layers, sizing
from vllm_sink.tools.cache_shape import CacheShape, LayerKind

LLAMA = LlamaConfig(
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_size=4096,
)
GEMMA3 = Gemma3TextConfig(
    num_hidden_layers=62,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    sliding_window=1024,
)
GPT_OSS = GptOssConfig(num_hidden_layers=24)
# Unequal pages: five layers with a window of 512 to one full layer of twice the head.
GEMMA4 = Gemma4TextConfig(num_hidden_layers=30)
MODELS = {"llama": LLAMA, "gemma3": GEMMA3, "gpt_oss": GPT_OSS, "gemma4": GEMMA4}
LAYERS = {"llama": (32, 0), "gemma3": (10, 52), "gpt_oss": (12, 12), "gemma4": (5, 25)}


def vllm_groups(shape, policy, block_size):
    """vLLM's KV cache groups for the layers of ``shape``."""
    specs = {}
    for kind in shape.kinds:
        common = dict(
            block_size=block_size,
            num_kv_heads=kind.num_kv_heads,
            head_size=kind.head_size,
            dtype=torch.bfloat16,
        )
        spec = FullAttentionSpec(**common)
        if kind.window:
            spec = SlidingWindowSpec(**common, sliding_window=kind.window)
        elif policy is not None:
            config = SinkConfig(policy.num_sink_tokens, policy.window_size)
            spec = SinkSpec.from_full(spec, config)
        for _ in range(kind.num_layers):
            specs[f"{len(specs)}"] = spec
    specs = unify_kv_cache_spec_page_size(specs)
    return _get_kv_cache_groups_uniform_page_size(specs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", [None, RetentionPolicy(4, 1000)])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("in_flight", [1, 4096])
def test_blocks_are_vllms_own(name, policy, block_size, in_flight):
    shape = sizing.read_shape(MODELS[name], dtype="bfloat16")
    assert (shape.num_full_layers, shape.num_sliding_layers) == LAYERS[name]
    groups = vllm_groups(shape, policy, block_size)
    num_tokens, num_blocks = 131_072, 10_000
    config = SimpleNamespace(
        max_in_flight_tokens=in_flight,
        model_config=SimpleNamespace(max_model_len=num_tokens),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    cache = SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)
    for group in groups:
        group.host_resident = False
    blocks = shape.request_blocks(policy, num_tokens, in_flight, block_size)
    assert num_blocks / blocks == pytest.approx(
        get_max_concurrency_for_kv_cache_config(config, cache)
    )
    page = groups[0].kv_cache_spec.page_size_bytes
    assert shape.pool_block_bytes(block_size) == page * max(
        len(group.layer_names) for group in groups
    )


def test_startup_figure_of_an_engine(model_path):
    """The model's own config gives the number of requests that vLLM logs."""
    from transformers import AutoConfig

    with sink_engine(model_path, 4, 500, max_num_batched_tokens=256) as llm:
        config = llm.llm_engine.vllm_config
        cache = core(llm).scheduler.kv_cache_config
        expected = get_max_concurrency_for_kv_cache_config(config, cache)
        pool_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors)
    shape = sizing.read_shape(AutoConfig.from_pretrained(model_path), "float32")
    block_size = config.cache_config.block_size
    assert pool_bytes == cache.num_blocks * shape.pool_block_bytes(block_size)
    blocks = shape.request_blocks(
        RetentionPolicy(4, 500), 4096, config.max_in_flight_tokens, block_size
    )
    assert cache.num_blocks / blocks == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tensor_parallel_size", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)]
)
def test_tensor_parallel_splits_kv_heads(tensor_parallel_size, heads):
    shape = sizing.read_shape(LLAMA, "float16", tensor_parallel_size)
    assert [kind.num_kv_heads for kind in shape.kinds] == [heads]


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (FalconConfig(num_attention_heads=8, multi_query=True), 1),
        (FalconConfig(num_attention_heads=8, multi_query=False), 8),
        (
            FalconConfig(
                num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True
            ),
            2,
        ),
    ],
)
@pytest.mark.parametrize("has_vllm", [True, False])
def test_falcons_kv_heads(config, heads, has_vllm, monkeypatch):
    monkeypatch.setattr(model_layers, "_has_vllm", lambda: has_vllm)
    (kind,) = sizing.read_shape(config).kinds
    assert (kind.num_layers, kind.num_kv_heads) == (config.num_hidden_layers, heads)


@pytest.mark.parametrize(
    ("quantization", "size"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, 1),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, 2),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, 1),
        ({"quant_method": "gptq", "bits": 4}, 2),
    ],
)
def test_the_cache_that_a_checkpoint_orders(quantization, size):
    config = LlamaConfig(dtype="bfloat16", quantization_config=quantization)
    assert sizing.read_shape(config).bytes_per_value == size
    ordered = sizing.read_shape(config, cache_dtype="bfloat16")
    assert ordered.bytes_per_value == 2


def test_a_checkpoint_in_fp32_is_served_in_bfloat16():
    assert sizing.read_shape(LlamaConfig(dtype="float32")).bytes_per_value == 2
    assert sizing.read_shape(LlamaConfig(), "float32").bytes_per_value == 4


@pytest.mark.parametrize("has_vllm", [True, False])
def test_kv_heads_of_each_layer(has_vllm, monkeypatch):
    monkeypatch.setattr(model_layers, "_has_vllm", lambda: has_vllm)
    text = SimpleNamespace(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=[1, 4, 1],
        hidden_size=64,
    )
    config = SimpleNamespace(
        get_text_config=lambda decoder: text, model_type="llama", dtype="bfloat16"
    )
    shape = sizing.read_shape(config)
    assert shape.kinds == (LayerKind(2, 0, 1, 16), LayerKind(1, 0, 4, 16))
    # One group of full attention: a block holds its tokens of all layers.
    assert shape.pool_block_bytes(16) == 16 * 2 * 2 * 16 * (1 + 4 + 1)
    with pytest.raises(
        ValueError, match=r"different numbers of KV heads, got \[1, 4\]"
    ):
        model_layers.model_shape(config)


def test_exaones_pattern_of_letters(tmp_path):
    config = Exaone4Config(num_hidden_layers=8, sliding_window=4096).to_dict()
    config |= {"sliding_window_pattern": "LLLG", "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "config.json"):
        shape = sizing.read_shape(model_layers.read_config(str(name)))
        counts = [(kind.window, kind.num_layers) for kind in shape.kinds]
        assert counts == [(0, 2), (4096, 6)]


def test_coheres_windows_see_a_token_more_than_its_configuration_says():
    """As vLLM's layers of that name do."""
    config = Cohere2Config(num_hidden_layers=4, sliding_window=64)
    counts = [(k.window, k.num_layers) for k in sizing.read_shape(config).kinds]
    assert counts == [(0, 1), (65, 3)]


def test_a_window_that_is_switched_off_is_full_attention():
    config = Qwen2Config(use_sliding_window=False, sliding_window=4096)
    assert sizing.read_shape(config).num_sliding_layers == 0


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LlamaConfig(kv_lora_rank=512), "MLA"),
        (LlamaConfig(num_hidden_layers=1, layer_types=["linear_attention"]), "linear"),
        (LlamaConfig(hybrid_layer_pattern=[0, 1] * 16), r"\(hybrid_layer_pattern=\[0"),
        (LlamaConfig(dtype="float64"), "float64"),
        (BertConfig(architectures=["BertForMaskedLM"]), "generate text, got 'bert'"),
        (DistilBertConfig(), "generate text, got 'distilbert'"),
        (T5Config(), "decoder-only, got the encoder-decoder 't5'"),
        (WhisperConfig(), "decoder-only, got the encoder-decoder 'whisper'"),
        (MllamaConfig(), r"cross attention \(cross_attention_layers=\[3, 8"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(config, match):
    with pytest.raises(ValueError, match=match):
        sizing.read_shape(config)


def test_command(model_path, capsys):
    options = "--max-model-len 131072 --block-size 128 --memory 2GiB --window-size 1020"
    arguments = ["size", "--model", model_path, "--dtype", "float32", *options.split()]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "30 full-attention layers" in out
    assert "decoding\t1,024 blocks, 5.6 GiB\t10 blocks" in out
    assert "\t0.4\t36.4" in out
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["policy"] == {"num_sink_tokens": 4, "window_size": 1020}
    assert result["dense"]["decoding"]["blocks"] == 1024
    assert result["dense"]["growth_bytes"] > result["sink"]["growth_bytes"] == 0
    assert result["sink"]["decoding"]["requests"] == pytest.approx(36.4, abs=0.05)


def test_startup_figure_of_an_engine_with_heads(model_path):
    """Padding, groups and blocks of heads of two kinds are those that vLLM makes."""
    from transformers import AutoConfig

    heads = random_heads(23)
    with sink_engine(
        model_path, 4, 500, retrieval=dict(heads=heads), max_num_batched_tokens=256
    ) as llm:
        config = llm.llm_engine.vllm_config
        cache = core(llm).scheduler.kv_cache_config
        expected = get_max_concurrency_for_kv_cache_config(config, cache)
        # Groups overlay each other in one allocation.
        (pool_bytes,) = {tensor.size for tensor in cache.kv_cache_tensors}
    shape = sizing.read_shape(AutoConfig.from_pretrained(model_path), "float32")
    memory = sizing.heads_memory(
        shape,
        SinkConfig(4, 500, retrieval_heads=heads),
        tensor_parallel_size=1,
        block_size=config.cache_config.block_size,
    )
    assert memory.grouping.num_groups == len(cache.kv_cache_groups) == 4
    assert pool_bytes == cache.num_blocks * memory.pool_block_bytes
    blocks = memory.blocks(4096, config.max_in_flight_tokens)
    assert cache.num_blocks / blocks == pytest.approx(expected)


def test_command_with_heads(model_path, capsys, tmp_path):
    pattern = tmp_path / "heads.tsv"
    pattern.write_text("1\t0.5\t0\n" * 30)
    options = "--max-model-len 8010 --block-size 128 --memory 2GiB --window-size 252"
    arguments = ["size", "--model", model_path, "--dtype", "float32", *options.split()]
    heads = ["--retrieval-heads", str(pattern), "--retrieval-fraction", "0.5"]
    assert cli.main([*arguments, *heads]) == 0
    out = capsys.readouterr().out
    assert "sink 4+252, 45 of 90 heads all" in out
    assert "decoding\t63 blocks, 354.4 MiB\t67 blocks, 188.4 MiB" in out
    assert cli.main([*arguments, *heads, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["retrieval_heads"] == 45
    assert result["sink"]["growth_bytes"] * 2 == result["dense"]["growth_bytes"]
    assert cli.main([*arguments, *heads, "--retrieval-window-size", "1020"]) == 0
    out = capsys.readouterr().out
    assert "45 of 90 heads 4+1020" in out
    assert "all decoding\t5.8\t" in out
    # Heads of equal policies are one kind, as in an engine.
    assert cli.main([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    same = [*heads, "--retrieval-window-size", "252", "--json"]
    assert cli.main([*arguments, *same]) == 0
    assert json.loads(capsys.readouterr().out)["sink"] == plain["sink"]
    # As the divisor of three KV heads that vLLM takes.
    assert cli.main([*arguments, *heads, "--tensor-parallel-size", "4"]) != 0
    err = capsys.readouterr().err
    assert "must divide the 9 query heads of a layer, and its 3 KV heads" in err
    assert "got 4; pass --tensor-parallel-size 3" in err
    assert cli.main([*arguments, *heads, "--tensor-parallel-size", "3"]) == 0


def test_document_holds_the_calculators_numbers():
    """Every row of the table in docs/scaling.md, from its own columns."""
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    row = re.compile(r"^\| (?P<model>[^|]+) \|" + r" ([\d,.]+)[^|]*\|" * 8 + "$", re.M)
    found = list(row.finditer(page.read_text()))
    assert len(found) >= 6
    for match in found:
        cells = [float(cell.replace(",", "")) for cell in match.groups()[1:]]
        full, own, window, heads, size, dense_gib, sink_mib, times = cells
        kinds = (
            LayerKind(int(count), int(of_window), int(heads), int(size))
            for count, of_window in ((full, 0), (own, window))
            if count
        )
        shape = CacheShape(tuple(kinds), 2)
        block = shape.pool_block_bytes(16)
        dense = shape.request_blocks(None, 131_072, 1, 16) * block
        sink = shape.request_blocks(RetentionPolicy(4, 4092), 131_072, 1, 16) * block
        assert dense_gib == pytest.approx(dense / 2**30, abs=0.051), match["model"]
        assert sink_mib == pytest.approx(sink / 2**20, abs=0.51), match["model"]
        assert times == pytest.approx(dense / sink, abs=0.51), match["model"]
