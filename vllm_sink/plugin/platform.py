"""The CPU platform that honours ``--attention-backend sink``.

vLLM's ``CpuPlatform.get_attn_backend_cls`` ignores the selected backend, and
the platform refuses Ray. The class here derives from whatever vLLM detected
(Zen CPUs have their own) and changes nothing unless ``sink`` or Ray is selected.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vllm.platforms import builtin_platform_plugins
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_sink.plugin import compat
from vllm_sink.start import hook

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CpuPlatform = resolve_obj_by_qualname(builtin_platform_plugins["cpu"]())


class SinkCpuPlatform(_CpuPlatform):  # type: ignore[valid-type, misc]
    """vLLM's CPU platform, with one more attention backend and with Ray."""

    takes_sink = True  # start.checks asks: the platform below ignores the flag

    @property
    def ray_device_key(self) -> str:
        """The Ray resource of one worker: real CPUs, none pretended.

        A worker asks Ray for the ids of the devices of this name that it was
        given. Ray lists accelerators alone, so a worker asks for those: none.
        """
        return "GPU" if "VLLM_SINK_RAY_WORKER" in os.environ else "CPU"

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend, attn_selector_config, num_heads=None
    ) -> str:
        if getattr(selected_backend, "name", None) != compat.BACKEND_NAME:
            return super().get_attn_backend_cls(
                selected_backend, attn_selector_config, num_heads
            )
        backend = resolve_obj_by_qualname(compat.BACKEND_PATH)
        backend.refuse_unsupported(attn_selector_config)
        return compat.BACKEND_PATH

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().check_and_update_config(vllm_config)
        if vllm_config.parallel_config.distributed_executor_backend == "ray":
            from vllm_sink.plugin.ray_executor import CpuRayExecutor

            vllm_config.parallel_config.distributed_executor_backend = CpuRayExecutor
        hook.check_start(vllm_config)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Register vLLM's overrides; hides llvmlite from vLLM's module scan.

        vLLM looks through the globals of every module and asks each value for
        ``__dict__``. ``llvmlite.binding.ffi.lib`` forwards that question to a C
        library and answers with something that isn't a dict: AttributeError, at
        the start of any engine after Numba was imported.
        """
        hidden = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            super().register_triton_kernel_overrides()
        finally:
            if hidden is not None:
                sys.modules["llvmlite.binding.ffi"] = hidden
