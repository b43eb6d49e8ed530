"""What happens between the user's command and the first layer of the model.

On the CPU our platform class sees the configuration in the process that reads the
command. CUDA and ROCm have platform classes of their own, and vLLM hands a plugin
the configuration nowhere else before it loads the model. So :func:`check_start`
runs once more, on every platform and in every process that builds a model, at the
first module that is built under a configuration: torch calls
:func:`watch_models`' hook for each, through its public registration hook.

What came of it is compared once more where the engine core has its block managers,
before the first request: :mod:`vllm_sink.engine.groups`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from vllm_sink.engine import compat
from vllm_sink.policy import refusals
from vllm_sink.policy.drafters import POLICED_DRAFTERS
from vllm_sink.policy.table_length import lengthen

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# The configuration that was checked last: a model has thousands of modules.
_checked: weakref.ref[Any] | None = None
_watching = False


def check_start(vllm_config: VllmConfig) -> None:
    """Refuse what the policy can't honour, and put the drafter under it.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """
    if not refusals.is_selected(vllm_config):
        refusals.refuse_forgotten_backend(vllm_config)
        return
    refusals.validate_engine(vllm_config)
    if not watch_groups():
        import vllm

        raise ValueError(
            f"vllm must be {' or '.join(compat.SUPPORTED_VLLM)} with "
            f"--attention-backend sink, got {vllm.__version__}, whose KV cache groups "
            "can't be checked; install a supported version"
        )
    place_drafter(vllm_config)


def place_drafter(vllm_config: VllmConfig) -> None:
    """Give the drafter the attention backend of the model it drafts for.

    vLLM's runner V1 builds a drafter under ``speculative_config.attention_backend``
    and, where that is unset, under whatever the platform chooses; runner V2 under
    the target's. Stock attention would keep all of the drafter's cache, in a group
    of its own whose block table V1 does not hand to a ``draft_model`` drafter.
    Its rotary table gets a row for every position of the target's requests.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in POLICED_DRAFTERS:
        return
    text_config = speculative.draft_model_config.hf_text_config
    lengthen(text_config, vllm_config.model_config.max_model_len)
    if speculative.attention_backend is None:
        speculative.attention_backend = compat.register_backend_member()


def watch_groups() -> bool:
    """Have every engine core's groups checked; idempotent. False: it can't be."""
    from vllm_sink.engine.groups import check_groups

    return compat.watch_engine_core(check_groups)


def watch_models() -> None:
    """Call :func:`check_start` for each model built from now on; idempotent."""
    global _watching
    if _watching:
        return
    _watching = True
    from torch.nn.modules.module import register_module_module_registration_hook

    register_module_module_registration_hook(_on_module)


def _on_module(parent: Any, name: str, child: Any) -> None:
    global _checked
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or (_checked and _checked() is vllm_config):
        return
    check_start(vllm_config)
    _checked = weakref.ref(vllm_config)
