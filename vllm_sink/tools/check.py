"""A trial start of a policy with this machine, this vLLM and this model.

    vllm-sink check MODEL [the flags of vllm serve]

Starts the engine as ``vllm serve`` would, in this process, with random weights in
place of the model's: no weight is read, nothing is downloaded but the configuration
(of a model that reads images, its processor's, too), and what refuses the start is the
code that refuses here. One replica, without Ray. Exits with 1 where the start would be
refused. Weights still take their memory, and the machine must be the one that will
serve.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from vllm_sink.tools.cli import one_line, print_json

# One replica, in this process, with nothing compiled or captured.
CHANGES = {
    "load_format": "dummy",
    "enforce_eager": True,
    "disable_log_stats": True,
    "data_parallel_size": 1,
    "distributed_executor_backend": None,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-sink check``: the model, then vLLM's own."""
    parser.description = (
        "What this machine, this vLLM and this model will do with a policy, by the "
        "code that refuses\nat start. Takes the flags of `vllm serve`; reads the "
        "model's configuration and no weights."
    )
    parser.epilog = (
        "example: vllm-sink check MODEL --attention-backend sink \\\n"
        '    --additional-config \'{"sink": {"window_size": 2044}}\'\n'
        "Exits with 1 where the start would be refused."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name on the Hub")
    parser.add_argument(
        "flags",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="as `vllm serve MODEL ...` has them",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 where the start would be refused."""
    flags = list(args.flags)
    as_json = args.json or "--json" in flags
    flags = [flag for flag in flags if flag != "--json"]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM logs to standard output, which is the report's.
    with contextlib.redirect_stdout(sys.stderr):
        report = check(args.model, flags)
    if as_json:
        print_json(report)
    else:
        print(words(report))
    return 0 if report["starts"] else 1


def check(model: str, flags: list[str]) -> dict[str, Any]:
    """The report on a start; ``refusal`` is its error, None if it starts.

    Args:
        flags: Of ``vllm serve``.
    """
    # The engine's parts are looked at: one process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_sink.plugin import compat

    arguments = compat.parse_serve_arguments(model, flags)
    report: dict[str, Any] = {"model": arguments.model, **machine()}
    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    for name, value in CHANGES.items():
        setattr(engine_args, name, value)
    try:
        engine_args.skip_tokenizer_init = not reads_media(engine_args)
        with started(engine_args) as engine:
            report |= {"starts": True, "refusal": None, **look(engine)}
    except Exception as error:  # whatever ends the start, pydantic's errors too
        report |= {"starts": False, "refusal": message(error)}
    return report


def reads_media(engine_args: Any) -> bool:
    """Whether vLLM builds the model's processor, which asks for its tokenizer."""
    media = engine_args.create_model_config().multimodal_config
    return media is not None and not media.language_model_only


@contextlib.contextmanager
def started(engine_args: Any):
    """An engine in this process, shut down at the end."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = None
    try:
        engine = LLMEngine.from_engine_args(engine_args)
        yield engine
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def message(error: BaseException) -> str:
    """The words of an error, without pydantic's around them."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            return one_line(errors()[0]["ctx"]["error"])
    return one_line(error)


def machine() -> dict[str, Any]:
    """Facts of this machine and this vLLM."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_sink
    from vllm_sink.plugin import compat

    return {
        "vllm_sink": vllm_sink.__version__,
        "vllm": vllm.__version__,
        "vllm_is_supported": compat.is_supported(vllm.__version__),
        "torch": torch.__version__,
        "device": (
            f"CPU, {torch.get_num_threads()} threads"
            if current_platform.is_cpu()
            else current_platform.get_device_name()
        ),
    }


def look(engine: Any) -> dict[str, Any]:
    """The policy of a running engine, layer by layer."""
    from vllm_sink.attention.base import SinkImplBase
    from vllm_sink.engine import Engine
    from vllm_sink.start import checks, log_lines

    vllm_config = engine.vllm_config
    model_config = vllm_config.model_config
    found: dict[str, Any] = {
        "max_model_len": model_config.max_model_len,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "block_size": vllm_config.cache_config.block_size,
        "is_selected": checks.is_selected(vllm_config),
    }
    if not found["is_selected"]:
        return found
    config = Engine.of(vllm_config).config
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [
        layer.impl
        for layer in layers
        if isinstance(getattr(layer, "impl", None), SinkImplBase)
    ]
    scheduler = engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    lines: list[str | None] = [*log_lines.policy_lines(vllm_config, managers)]
    page_bytes = managers[0].kv_cache_spec.page_size_bytes
    lines.append(log_lines.retrieval_line(vllm_config, config, page_bytes))
    lines.append(getattr(scheduler.connector, "start_line", None))  # host memory's
    return found | {
        "num_sink_tokens": config.num_sink_tokens,
        "window_size": config.window_size,
        "sink_positions": config.sink_positions,
        "kernels": "Triton" if is_triton(impls) else "Numba and torch",
        # Workers in other processes have the layers: none is seen here.
        "attention_layers": len(impls) or None,
        "turned_layers": sum(impl.rotation is not None for impl in impls),
        "start_lines": [line for line in lines if line is not None],
    }


def is_triton(impls: list[Any]) -> bool:
    """Whether the GPU path serves the layers."""
    return any(type(impl).__module__.endswith(".gpu") for impl in impls)


def words(report: dict[str, Any]) -> str:
    """The report for people."""
    supported = "" if report["vllm_is_supported"] else ", NOT one that was tried"
    lines = [
        f"vllm-sink {report['vllm_sink']}, vLLM {report['vllm']}{supported}, torch "
        f"{report['torch']}",
        f"device: {report['device']}",
        f"model: {report['model']}",
    ]
    if not report["starts"]:
        return "\n".join([*lines, f"would not start: {report['refusal']}"])
    lines[-1] += (
        f", {report['dtype']}, max_model_len {report['max_model_len']:,}, KV blocks of "
        f"{report['block_size']} tokens"
    )
    if not report["is_selected"]:
        lines.append(
            "starts, with vLLM's own attention: --attention-backend sink is not given"
        )
        return "\n".join(lines)
    if report["attention_layers"] is None:
        return "\n".join([*lines, *report["start_lines"], "starts"])
    turned = report["turned_layers"]
    lines += [
        f"kernels: {report['kernels']}; {report['attention_layers']} attention layers",
        (
            f"sinks: distances capped in {turned} layers, whose rotation was found"
            if turned
            else "sinks: at their true distance in every layer; no query is turned"
        ),
        *report["start_lines"],
        "starts",
    ]
    return "\n".join(lines)
