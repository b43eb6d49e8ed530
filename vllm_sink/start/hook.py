"""The hook by which the plugin sees an engine before its model is built.

On the CPU our platform class sees the configuration in the process that reads the
command. CUDA and ROCm have platform classes of their own, and vLLM hands a plugin
the configuration nowhere else before it loads the model. So everything that depends
on it begins at the first module that is built under a configuration, on every
platform and in every process that builds a model: torch calls :func:`on_module` for
each, through its public registration hook.

It makes the engine's record, checks the settings, puts the drafter under the policy,
and gives each attention layer its backend class and its heads. vLLM's ``Attention``
doesn't tell its backend which layer it is; the hook sees the layer.
:mod:`vllm_sink.start.groups` compares the result, once the engine core has its block
managers and before the first request.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_sink.engine import Engine
from vllm_sink.start import checks
from vllm_sink.start.drafters import place_drafter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@functools.cache
def install(unwatched: str | None = None) -> None:
    """Call :func:`on_module` for each module built from now on; idempotent.

    Args:
        unwatched: Why this vLLM's engine cores can't be watched; None: they are.
    """
    from torch.nn.modules.module import register_module_module_registration_hook

    register_module_module_registration_hook(functools.partial(on_module, unwatched))


def on_module(unwatched: str | None, parent: Any, name: str, child: Any) -> None:
    """Prepare the engine under whose configuration a module is registered, if any.

    Raises:
        ValueError: What must change before the engine can start, by name.
    """
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or child is None:
        return
    if not checks.is_selected(vllm_config):
        checks.refuse_forgotten_backend(vllm_config)
        return
    engine = Engine.of(vllm_config)
    if not engine.is_checked:
        _prepare(engine, unwatched)
    engine.note_parent(parent, child)
    if getattr(child, "attn_backend", None) is not None:
        from vllm_sink.attention.backend import place_layer

        place_layer(engine, child)


def _prepare(engine: Engine, unwatched: str | None) -> None:
    from vllm_sink.start.loaded import refuse_layers
    from vllm_sink.start.log_lines import log_retrieval_heads

    if unwatched is not None:
        raise ValueError(unwatched)
    check_start(engine.vllm_config)
    engine.when_loaded = (refuse_layers, log_retrieval_heads)
    engine.is_checked = True


def check_start(vllm_config: VllmConfig) -> None:
    """Refuse what the policy can't honour, and put the drafter under it.

    Called where the configuration is made, on the CPU, and from :func:`on_module`.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """
    if not checks.is_selected(vllm_config):
        checks.refuse_forgotten_backend(vllm_config)
        return
    checks.check_settings(Engine.of(vllm_config))
    place_drafter(vllm_config)
