"""Settings that are refused at start: name, value, remedy."""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm import envs, platforms
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)

import vllm_sink
from tests.helpers.block_managers import sink_spec
from tests.helpers.refusals import BESIDE, CASES, drafter, host_cache, stub_engine
from vllm_sink import __version__
from vllm_sink.cache import metrics
from vllm_sink.engine import Engine
from vllm_sink.plugin import compat
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.checks import CHECKS, check_settings
from vllm_sink.start.host_cache import EXAMPLE, check_layers


@pytest.mark.parametrize(
    "section, message",
    [
        ({"num_sink_tokens": -1}, r"num_sink_tokens must be .* >= 0, got -1; give"),
        ({"num_sink_tokens": "4"}, r"num_sink_tokens must be an integer .* got '4'"),
        ({"num_sink_tokens": True}, r"num_sink_tokens must be an integer .* got True"),
        ({"window_size": 0}, r"window_size must be an integer >= 1, got 0; give"),
        ({"window_size": 10.5}, r"window_size must be an integer .* got 10.5"),
        ({"sink_positions": "rel"}, r"must be 'cache' or 'absolute', got 'rel'"),
        ({"windowsize": 7}, r"got the unknown key 'windowsize' with value 7; remove"),
        ([4, 60], r"additional_config.sink must be a dict, got \[4, 60\]; pass"),
    ],
)
def test_bad_config(section, message):
    with pytest.raises(ValueError, match=message):
        SinkConfig.from_additional_config({"sink": section})


def test_defaults_and_foreign_keys():
    assert SinkConfig.from_additional_config({}) == SinkConfig()
    assert SinkConfig.from_additional_config({"other": 1}) == SinkConfig()


def refusals(engine: Engine) -> dict[str, str]:
    """What each check refuses, by its name."""
    found = {}
    for check in CHECKS:
        try:
            check(engine)
        except ValueError as error:
            found[check.__name__] = str(error)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_settings(case):
    check_settings(stub_engine())
    (text,) = refusals(stub_engine(**case.changes)).values()
    assert text.startswith(f"{case.setting} must ") and re.search(case.message, text)


def test_host_memory_behind_the_pool_is_no_stranger():
    assert not refusals(stub_engine(kv_transfer_config=host_cache()))


def test_the_connector_that_a_message_tells_to_pass_is_one():
    """vLLM takes the flag: it parses, and names a connector that is known."""
    compat.register_host_cache()
    flag, value = shlex.split(EXAMPLE)
    assert flag == "--kv-transfer-config"
    transfer = KVTransferConfig(**json.loads(value))
    transfer.kv_connector_extra_config["host_cache_gib"] = 0.5  # on small machines
    assert not refusals(stub_engine(kv_transfer_config=transfer))
    assert KVConnectorFactory.supports_hma_config(transfer)


def test_every_check_has_a_case():
    """So that a refusal nobody tried doesn't reach a user."""
    seen = {name for case in CASES for name in refusals(stub_engine(**case.changes))}
    unseen = {check.__name__ for check in CHECKS} - seen
    # These have tests of their own.
    assert unseen <= {"_interpreter", "_retrieval_heads", "_platform", "_own_rotation"}


def test_a_platform_that_ignores_the_flag(monkeypatch):
    """vLLM asks for no platform plugin where this variable names the CPU."""
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.setattr(envs, "VLLM_TARGET_DEVICE", "cpu", raising=False)
    monkeypatch.setattr(platforms, "_current_platform", None)
    (text,) = refusals(stub_engine()).values()
    assert text == (
        "VLLM_TARGET_DEVICE must leave the choice of the CPU platform to vLLM's "
        "plugins with --attention-backend sink, which vLLM's own ignores, got 'cpu'; "
        "unset it: a vLLM that is built for CPUs needs none"
    )
    monkeypatch.delenv("VLLM_TARGET_DEVICE")  # another reason for the same class
    (text,) = refusals(stub_engine()).values()
    assert text.startswith("platform must leave") and "CpuPlatform" in text


def test_heads_of_two_kinds_and_one_window_are_of_one_kind():
    """What retrieval heads can't be combined with is then no obstacle either."""
    mixed = {"num_sink_tokens": 4, "retrieval_heads": [[1, 0], [0, 0]]}
    text = SimpleNamespace(num_attention_heads=4)
    for windows in ((4092, 4092), (4092, 16384), (16384, 4092)):
        section = mixed | dict(
            zip(("window_size", "retrieval_window_size"), windows, strict=True)
        )
        changes = {
            "additional_config": {"sink": section},
            "cache_config__kv_sharing_fast_prefill": True,
            "model_config__hf_text_config": text,
            "model_config__get_total_num_hidden_layers": lambda: 2,
            "model_config__get_total_num_kv_heads": lambda: 2,
            "model_config__get_sliding_window": lambda: None,
        }
        engine = stub_engine(**changes, model_config__max_model_len=64)
        assert not refusals(engine) and engine.config == SinkConfig(4, 64)
    engine = stub_engine(**changes, model_config__max_model_len=8192)
    assert refusals(engine)["_retrieval_heads"].startswith("kv_sharing_fast_prefill")


def test_heads_beside_layers_of_other_kinds():
    """No obstacle, nor is a drafter; a stage that has not all of them is."""
    assert not refusals(stub_engine(**BESIDE))
    changes = BESIDE | {"speculative_config": drafter("eagle")}
    assert not refusals(stub_engine(**changes))
    stages = BESIDE | {"parallel_config__pipeline_parallel_size": 2}
    text = refusals(stub_engine(**stages))["_stages_beside"]
    assert re.search("each kind .* got 2, where stage 0 has no full_attention", text)
    whole = {"additional_config": {"sink": {"retrieval_heads": [[1, 1]]}}}
    assert not refusals(stub_engine(**stages | whole))
    kinds = ["linear_attention", "full_attention", "mlp"] * 2
    text = SimpleNamespace(num_attention_heads=4, layer_types=kinds)
    more = {
        "model_config__hf_text_config": text,
        "model_config__get_total_num_hidden_layers": lambda: len(kinds),
        "additional_config": {"sink": {"retrieval_heads": [[1, 0], [0, 0]]}},
    }
    assert not refusals(stub_engine(**stages | more))


def test_a_drafters_heads_beside_layers_of_other_kinds():
    """Whole layers are divided there: their number of KV heads is no matter."""
    whole = {"additional_config": {"sink": {"retrieval_heads": [[1, 1], [0, 0]]}}}
    kinds = ["linear_attention", "full_attention"] * 2
    more = {
        "model_config__hf_text_config": SimpleNamespace(
            num_attention_heads=4, layer_types=kinds
        ),
        "model_config__get_total_num_hidden_layers": lambda: len(kinds),
    }
    for head_size, refused in ((64, False), (128, True)):
        model = SimpleNamespace(
            hf_config=SimpleNamespace(model_type="llama"),
            get_head_size=lambda size=head_size: size,
            get_total_num_kv_heads=lambda: 1,
        )
        changes = {"speculative_config": drafter("mtp", draft_model_config=model)}
        found = refusals(stub_engine(**BESIDE | whole | more | changes))
        assert ("_retrieval_heads" in found) == refused, found


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"attn_type": "encoder_decoder"}, "attention of type encoder_decoder"),
        ({"use_mla": True}, "left out for MLA"),
        (
            {"kv_cache_dtype": "fp8"},
            "--kv-cache-dtype must be .* on a CPU, got fp8; pass",
        ),
        ({"block_size": 24}, "block_size 24"),
        ({"use_non_causal": True}, "non-causal"),
    ],
)
def test_attention_kinds(change, message):
    from vllm_sink.attention.backend import SinkBackend

    selector = SimpleNamespace(
        use_mla=False,
        use_sparse=False,
        attn_type="decoder",
        kv_cache_dtype="auto",
        block_size=128,
        use_non_causal=False,
        use_mm_prefix=False,
    )
    SinkBackend.refuse_unsupported(selector)
    vars(selector).update(change)
    with pytest.raises(ValueError, match=message):
        SinkBackend.refuse_unsupported(selector)


def test_enum_member_survives_pickling_by_value():
    member = compat.register_backend_member()
    assert compat.register_backend_member() is member
    again = pickle.loads(pickle.dumps(member))
    assert again is member
    assert b"restore_backend_member" in pickle.dumps(member)


def test_a_process_without_the_plugin_says_so():
    pickled = pickle.dumps(compat.register_backend_member())
    code = (
        "import pickle, sys; sys.modules['vllm_sink'] = None; "
        "pickle.loads(sys.stdin.buffer.read())"
    )
    process = subprocess.run([sys.executable, "-c", code], input=pickled, stderr=-1)
    assert process.returncode == 1
    assert b"must be %s like the driver's, got none" % __version__.encode() in (
        process.stderr
    )


def test_vllm_knows_the_plugins_variable(monkeypatch):
    """``--fail-on-environ-validation`` must not refuse what the user didn't set."""
    vllm_sink.register()
    for name in set(os.environ) - set(envs.environment_variables):
        if name.startswith("VLLM_"):  # the tests' and vLLM's own
            monkeypatch.delenv(name)
    factors = envs.compile_factors()
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, "/tmp/folder")
    current_platform.validate_environ(hard_fail=True)
    assert envs.compile_factors() == factors


def test_unsupported_vllm_gets_one_clear_warning(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"0.32 and 0.33, got 0.99.0"):
        compat.warn_if_unsupported()


def test_other_backends_are_left_alone():
    selector = SimpleNamespace(use_sparse=False, use_mla=False)
    path = current_platform.get_attn_backend_cls(None, selector)
    assert path == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


SHAPE = {"block_size": 16, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
STATE = MambaSpec(block_size=16, shapes=((16,),), dtypes=(torch.float32,))


@pytest.mark.parametrize(
    "specs, message",
    [
        (
            [sink_spec(RetentionPolicy(4, 60), 16), STATE],
            r"kv_connector must be unset for a model whose layers keep something else "
            r"than keys .* got MambaSpec of layer1; drop --kv-transfer-config",
        ),
        (
            [FullAttentionSpec(**SHAPE)],
            r"kv_connector must be another than SinkHostCache where no layer is under "
            r".* got layers of FullAttentionSpec; pass --attention-backend sink, or",
        ),
    ],
)
def test_layers_that_host_memory_cannot_keep(specs, message):
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=groups)
    with pytest.raises(ValueError, match=message):
        check_layers(config)
