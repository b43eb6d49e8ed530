"""vLLM-Sink: keep the attention sinks and a window, evict the rest.

vLLM finds this package through two entry points, both named ``sink``:

``vllm.general_plugins``
    :func:`register`, called once or more in every process of vLLM.
``vllm.platform_plugins``
    :func:`platform_plugin`, called while vLLM chooses its platform.

Both import vLLM lazily: importing :mod:`vllm_sink` costs nothing.
"""

__version__ = "0.2.0"

__all__ = ["platform_plugin", "register"]


def register() -> None:
    """Make ``--attention-backend sink`` known to this process; idempotent."""
    from vllm_sink.cache import metrics
    from vllm_sink.plugin import compat
    from vllm_sink.start import groups, hook

    compat.warn_if_unsupported()
    compat.register_backend_member()
    compat.register_kv_cache_spec()
    compat.register_host_cache()
    compat.register_variable(metrics.FOLDER_VARIABLE)
    hook.install(compat.watch_engine_core(groups.check_groups))
    metrics.register_collector()


def platform_plugin() -> str | None:
    """Name the CPU platform class that honours the selected backend.

    ``None`` (no change) everywhere but on vLLM's CPU platform: CUDA and ROCm
    ask the selected backend themselves.
    """
    from vllm_sink.plugin import compat

    return compat.cpu_platform_path()
