"""Cases of all settings that are refused from the configuration alone."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_sink.engine import Engine


def backend(name: str) -> SimpleNamespace:
    """Looks like a member of vLLM's enum of attention backends."""
    return SimpleNamespace(name=name)


def drafter(method: str, **changes: Any) -> SimpleNamespace:
    """Looks like vLLM's ``SpeculativeConfig``."""
    config = SimpleNamespace(
        method=method,
        attention_backend=None,
        target_model_config=None,
        draft_model_config=SimpleNamespace(
            hf_config=SimpleNamespace(model_type="llama"),
            get_head_size=lambda: 64,
            get_total_num_kv_heads=lambda: 2,
        ),
        use_gemma4_mtp=lambda: False,
        use_step3p5_mtp=lambda: False,
    )
    vars(config).update(changes)
    return config


def host_cache(**changes: Any) -> SimpleNamespace:
    """Looks like vLLM's ``KVTransferConfig`` of host memory behind the pool."""
    config = SimpleNamespace(
        kv_connector="SinkHostCache",
        kv_connector_module_path=None,
        kv_role="kv_both",
        kv_connector_extra_config={"host_cache_gib": 0.5},
    )
    vars(config).update(changes)
    return config


class Config(SimpleNamespace):
    """Can be referred to weakly, as vLLM's own."""


def stub_config(**changes: Any) -> SimpleNamespace:
    """What the checks read of a ``VllmConfig``: a model that is served as it is.

    Args:
        changes: Values by name; ``owner__name`` is the field of an inner config.
    """
    config = Config(
        additional_config={},
        attention_config=SimpleNamespace(backend=backend("SINK"), backend_per_kind={}),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        compilation_config=Config(static_forward_context={}),
        kv_transfer_config=None,
        speculative_config=None,
        cache_config=SimpleNamespace(sliding_window=None, enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=None),
        model_config=SimpleNamespace(
            model="m",
            max_model_len=4096,
            hf_overrides=None,
            use_mla=False,
            is_encoder_decoder=False,
            is_attention_free=False,
            is_hybrid=False,
            is_mm_prefix_lm=False,
            attention_chunk_size=None,
            get_head_size=lambda: 64,
            get_total_num_kv_heads=lambda: 2,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(),
        ),
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


def stub_engine(**changes: Any) -> Engine:
    """The record of an engine of :func:`stub_config`, which lives as long."""
    vllm_config = stub_config(**changes)
    engine = Engine.of(vllm_config)
    engine.kept_for_the_test = vllm_config
    return engine


@dataclass(frozen=True)
class Case:
    """One refusal.

    Args:
        name: Of the test.
        setting: What the message starts with.
        changes: Of :func:`stub_config`.
        message: A regular expression: setting, value, remedy.
    """

    name: str
    setting: str
    changes: dict[str, Any]
    message: str


# Heads of two policies in one layer, beside a layer that the policy doesn't govern.
BESIDE = {
    "additional_config": {"sink": {"retrieval_heads": [[1, 0]]}},
    "model_config__hf_text_config": SimpleNamespace(
        num_attention_heads=4, layer_types=["linear_attention", "full_attention"]
    ),
    "model_config__get_total_num_hidden_layers": lambda: 2,
    "model_config__get_total_num_kv_heads": lambda: 2,
    "model_config__max_model_len": 8192,
    "cache_config__kv_sharing_fast_prefill": False,
}


_HEADS = {
    "model_config__hf_text_config": SimpleNamespace(num_attention_heads=4),
    "model_config__get_total_num_hidden_layers": lambda: 2,
    "model_config__get_sliding_window": lambda: None,
    "model_config__max_model_len": 8192,
    "cache_config__kv_sharing_fast_prefill": False,
}


def _with_heads(
    heads, method: str, head_size: int = 64, kv_heads: int = 2, **changes
) -> dict[str, Any]:
    model = SimpleNamespace(
        hf_config=SimpleNamespace(model_type="llama"),
        get_head_size=lambda: head_size,
        get_total_num_kv_heads=lambda: kv_heads,
    )
    return _HEADS | {
        "additional_config": {"sink": {"retrieval_heads": heads}},
        "speculative_config": drafter(method, draft_model_config=model, **changes),
    }


_MIXED = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])

CASES = [
    Case(
        "a section by another name",
        "additional_config.sink_config",
        {"additional_config": {"sink_config": {"window_size": 60}, "other": {}}},
        "additional_config.sink_config must be the section 'sink' .* got 'sink_config' "
        "with value {'window_size': 60}; rename it to 'sink'",
    ),
    Case(
        "a pipeline stage without full attention beside heads of two kinds",
        "pipeline_parallel_size",
        BESIDE | {"parallel_config__pipeline_parallel_size": 2},
        "pipeline_parallel_size must leave every stage layers of each kind with "
        "retrieval heads in a model that has layers of other kinds, got 2, where stage "
        "0 has no full_attention; use fewer stages, or tensor parallelism alone",
    ),
    Case(
        "decode context parallel",
        "decode_context_parallel_size",
        {"parallel_config__decode_context_parallel_size": 2},
        "decode_context_parallel_size must be 1 .* got 2; .* tensor",
    ),
    Case(
        "prefill context parallel",
        "prefill_context_parallel_size",
        {"parallel_config__prefill_context_parallel_size": 4},
        "prefill_context_parallel_size must be 1 .* got 4; .* tensor",
    ),
    Case(
        "KV connector",
        "kv_connector",
        {"kv_transfer_config": SimpleNamespace(kv_connector="LMCache")},
        "kv_connector must be SinkHostCache or unset .* got 'LMCache'; .* drop "
        "--kv-transfer-config, or pass --kv-transfer-config '{",
    ),
    Case(
        "a stranger by our connector's name",
        "kv_connector",
        {"kv_transfer_config": host_cache(kv_connector_module_path="theirs")},
        "kv_connector must be .* got 'SinkHostCache' of theirs; .* drop",
    ),
    Case(
        "vLLM's own offloading",
        "kv_connector",
        {
            "kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector"),
            "cache_config__kv_offloading_size": 4.0,
        },
        "kv_connector must be .* got 'OffloadingConnector'; .*: drop "
        "--kv-offloading-size, or",
    ),
    *(
        Case(
            f"host cache of {size}",
            "kv_connector_extra_config.host_cache_gib",
            {
                "kv_transfer_config": host_cache(
                    kv_connector_extra_config={"host_cache_gib": size}
                )
            },
            r"host_cache_gib must be a number of GiB above 0 and below this machine's "
            rf"\d+, got {size!r}; pass --kv-transfer-config '{{",
        )
        for size in (0, -1, True, "20", 1e9)
    ),
    Case(
        "a host cache without a size",
        "kv_connector_extra_config.host_cache_gib",
        {"kv_transfer_config": host_cache(kv_connector_extra_config={})},
        "host_cache_gib must be a number .* got None; pass",
    ),
    Case(
        "a host cache's misspelt setting",
        "kv_connector_extra_config.gib",
        {
            "kv_transfer_config": host_cache(
                kv_connector_extra_config={"host_cache_gib": 0.1, "gib": 3}
            )
        },
        "gib must be host_cache_gib, .* got the unknown key with value 3; remove",
    ),
    Case(
        "a host cache that only takes",
        "kv_role",
        {"kv_transfer_config": host_cache(kv_role="kv_consumer")},
        "kv_role must be kv_both .* got 'kv_consumer'; pass",
    ),
    Case(
        "a host cache behind no prefix cache",
        "enable_prefix_caching",
        {
            "kv_transfer_config": host_cache(),
            "cache_config__enable_prefix_caching": False,
        },
        "must be true for SinkHostCache, got false; drop --no-enable-prefix-caching",
    ),
    *(
        Case(
            f"a host cache of layers with states{heads}",
            "kv_connector",
            more
            | {"kv_transfer_config": host_cache(), "model_config__is_hybrid": True},
            "kv_connector must be unset for a model whose layers keep something else "
            "than keys .* got SinkHostCache for 'm', which has layers with states; "
            "drop --kv-transfer-config",
        )
        for heads, more in (("", {}), (" beside heads of two kinds", BESIDE))
    ),
    Case(
        "a host cache of pipeline stages",
        "pipeline_parallel_size",
        {
            "kv_transfer_config": host_cache(),
            "parallel_config__pipeline_parallel_size": 2,
        },
        "must be 1 for SinkHostCache, got 2; use tensor parallelism",
    ),
    Case(
        "MLA",
        "model",
        {"model_config__use_mla": True},
        "must not use MLA .* got 'm'; serve",
    ),
    Case(
        "encoder-decoder",
        "model",
        {"model_config__is_encoder_decoder": True},
        "must be decoder-only .* encoder-decoder 'm'; drop",
    ),
    Case(
        "chunked-local attention",
        "model",
        {"model_config__attention_chunk_size": 8192},
        "must not use chunked-local .* got 'm' with attention_chunk_size 8192; drop",
    ),
    Case(
        "images seen both ways",
        "model",
        {"model_config__is_mm_prefix_lm": True},
        "must not look both ways .* got 'm'; pass --language-model-only",
    ),
    Case(
        "no attention",
        "model",
        {"model_config__is_attention_free": True},
        "must have a layer .* --attention-backend sink and its sink section .* got "
        "'m', which has no attention; drop --attention-backend sink and the section",
    ),
    Case(
        "own windows everywhere",
        "model",
        {"cache_config__sliding_window": 4096},
        "must have a layer .* layers all keep a window of 4096 tokens; drop",
    ),
    Case(
        "no hybrid KV cache manager",
        "disable_hybrid_kv_cache_manager",
        {
            "scheduler_config__disable_hybrid_kv_cache_manager": True,
            "model_config__hf_text_config": _MIXED,
        },
        "disable_hybrid_kv_cache_manager must be unset .* got True for 'm' with "
        "full_attention, sliding_attention; drop --disable-hybrid-kv-cache-manager",
    ),
    Case(
        "drafter that isn't causal",
        "speculative_config.method",
        {"speculative_config": drafter("dflash")},
        "method must be one of custom_class, draft_model, eagle, .* got 'dflash' "
        r"\(llama\); choose one",
    ),
    Case(
        "drafter that reads the target's cache",
        "speculative_config.method",
        {"speculative_config": drafter("mtp", use_gemma4_mtp=lambda: True)},
        "method must be one of .* got 'mtp'",
    ),
    Case(
        "drafter with larger heads beside retrieval heads",
        "speculative_config.model",
        _with_heads([[1, 0], [0, 0]], "eagle", 128, 2),
        "model must have KV heads like those .* with sink.retrieval_heads .* got heads "
        "of 128, not heads of 64; draft with n-grams or drop --speculative-config",
    ),
    Case(
        "drafter with fewer heads beside whole layers",
        "speculative_config.model",
        _with_heads([[1, 1], [0, 0]], "mtp", 64, 1),
        "model must have .* got 1 KV heads of 64, not 2 KV heads of 64; draft",
    ),
    Case(
        "draft model beside retrieval heads",
        "speculative_config.method",
        _with_heads([[1, 0], [0, 0]], "draft_model"),
        "method must be one of ngram, ngram_gpu, suffix, eagle, eagle3, mtp with .* "
        "got 'draft_model', whose layers are too many .*; draft with one of them",
    ),
    Case(
        "drafter's batch in new places beside retrieval heads",
        "speculative_config.disable_padded_drafter_batch",
        _with_heads([[1, 0], [0, 0]], "mtp", disable_padded_drafter_batch=True),
        "disable_padded_drafter_batch must be false with sink.retrieval_heads .* got "
        "true; take it out of --speculative-config",
    ),
    Case(
        "drafter under another backend",
        "speculative_config.attention_backend",
        {
            "speculative_config": drafter(
                "eagle", attention_backend=backend("FLASH_ATTN")
            )
        },
        "attention_backend must be SINK or unset .* got FLASH_ATTN; take it out",
    ),
]
