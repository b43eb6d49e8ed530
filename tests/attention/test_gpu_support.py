"""Answers to vLLM's selector on a GPU, for a platform that is not here."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.refusals import stub_engine
from vllm_sink.attention import backend, cpu, gpu_support
from vllm_sink.attention.backend import SinkBackend
from vllm_sink.policy.config import SinkConfig
from vllm_sink.start.checks import check_settings

SELECTOR = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": (9, 0),
    "attn_type": "decoder",
}


@pytest.fixture
def platform(monkeypatch):
    def pretend(name: str) -> None:
        fake = SimpleNamespace(
            device_name=name,
            is_cpu=lambda: False,
            is_cuda=lambda: name == "cuda",
            is_rocm=lambda: name == "rocm",
        )
        monkeypatch.setattr(gpu_support, "current_platform", fake)
        monkeypatch.setattr(backend, "current_platform", fake)

    return pretend


def reasons(**changes) -> str:
    return "; ".join(SinkBackend.validate_configuration(**(SELECTOR | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"device_capability": (8, 0)},
        {"device_capability": (8, 6)},
        {"device_capability": (12, 0)},
        {"dtype": torch.float32},
        {"dtype": torch.float16, "head_size": 80, "block_size": 128},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "bfloat16"},
        {"has_sink": True, "has_sliding_window": True},
    ],
)
def test_cuda_accepts(platform, changes):
    platform("cuda")
    assert reasons(**changes) == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"device_capability": (7, 5)}, r"8\.0 or later, .* got cuda \(7, 5\); use"),
        ({"head_size": 100}, "multiple of 8 up to 256, got 100; use another"),
        ({"head_size": 512}, "multiple of 8 up to 256, got 512; use another"),
        (
            {"kv_cache_dtype": "fp8", "device_capability": (8, 6)},
            r"must be auto on compute capability \(8, 6\), got fp8; .* 8\.9",
        ),
        (
            {"kv_cache_dtype": "float16"},
            "must be auto, fp8 or the model's dtype torch.bfloat16, got float16",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"block_size": 24}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    ],
)
def test_cuda_refuses(platform, changes, message):
    import re

    platform("cuda")
    assert re.search(message, reasons(**changes))


def test_rocm_runs_what_the_kernels_were_compiled_for(platform):
    platform("rocm")
    assert reasons(device_capability=(9, 4)) == ""
    assert reasons(device_capability=(9, 5), kv_cache_dtype="fp8") == ""
    for other in ((9, 0), (11, 0)):
        assert "gfx942 or gfx950, got rocm" in reasons(device_capability=other)


def test_other_devices_are_refused(platform):
    platform("xpu")
    assert "got xpu (12, 0)" in reasons(device_capability=(12, 0))


def test_gpus_get_the_gpu_path_in_any_layout_and_cpus_their_own(platform, monkeypatch):
    assert SinkBackend.get_impl_cls() is cpu.SinkCpuImpl
    assert SinkBackend.get_builder_cls() is cpu.SinkCpuMetadataBuilder
    assert [x.name for x in SinkBackend.supported_kv_cache_layouts()] == ["LBHNC"]
    assert not SinkBackend.supports_kv_cache_dtype("fp8")
    platform("cuda")
    assert SinkBackend.get_impl_cls().__name__ == "SinkGpuImpl"
    assert SinkBackend.get_builder_cls().__name__ == "SinkGpuMetadataBuilder"
    assert SinkBackend.supported_kv_cache_layouts() is None


def check_interpreter(dtype=torch.float32):
    """The settings of an engine that asks for the interpreter."""
    section = {"triton_interpreter": True}
    changes = {"model_config__dtype": dtype}
    check_settings(stub_engine(additional_config={"sink": section}, **changes))


def test_interpreter_setting(monkeypatch):
    import triton.language as tl

    with pytest.raises(ValueError, match="triton_interpreter must be true or false"):
        SinkConfig(triton_interpreter="yes")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET must be 1 .* got None"):
        check_interpreter()
    # Set too late: Triton's library is there, and compiled.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tl, "cdiv", len)
    with pytest.raises(ValueError, match="TRITON_INTERPRET must be 1 before Triton"):
        check_interpreter()
    monkeypatch.setattr(tl, "cdiv", type("InterpretedFunction", (), {})())
    check_interpreter()
    with pytest.raises(ValueError, match=r"dtype must be float32 or float16 .* bfloat"):
        check_interpreter(torch.bfloat16)


def test_interpreter_is_refused_on_a_gpu(monkeypatch):
    import vllm.platforms

    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(vllm.platforms, "current_platform", gpu, raising=False)
    with pytest.raises(ValueError, match="triton_interpreter must be false on a GPU"):
        check_interpreter()
