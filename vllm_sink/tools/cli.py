"""The command ``vllm-sink``, with a subcommand for each tool.

Each tool is a module with a pair of functions::

    configure(parser)      its arguments, its description, an example as epilog
    run(args) -> int       does it; the exit status. ``args.json``: print JSON alone

A tool raises ValueError or OSError for what its user must change: the message
becomes one line. So does every other error, with its kind and the model's name, as
libraries raise all kinds for a model's files; ``--traceback`` shows where. A tool's
module is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

import vllm_sink

# name -> module, and what --help says of it.
TOOLS: dict[str, tuple[str, str]] = {
    "size": ("sizing", "the KV cache of a request and how many fit, dense and sink"),
    "analyze": ("analyze", "where a model's attention goes, and the S it needs"),
    "heads": ("find_heads", "a model's retrieval heads, and how many it needs"),
    "check": ("check", "what a start would do with a policy, without reading weights"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run ``vllm-sink``; returns the exit status."""
    if arguments is None:
        arguments = sys.argv[1:]
    args = _parser(arguments).parse_args(arguments)
    try:
        return args.run(args)
    except Exception as error:  # a user's files make libraries raise any kind
        if args.traceback:
            raise
        told = one_line(error)
        if not isinstance(error, (ValueError, OSError, ImportError)):
            kind = type(error).__name__
            told = f"{args.model}: {kind}: {told} (--traceback shows where)"
        print(f"error: {told}", file=sys.stderr)
        return 1


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser; only the tool that ``arguments`` name is imported."""
    parser = argparse.ArgumentParser(
        prog="vllm-sink",
        description="Attention sinks for vLLM: sizes, heads and checks.",
        epilog="example: vllm-sink size --model MODEL --memory 40GiB",
    )
    parser.add_argument(
        "--version", action="version", version=f"vllm-sink {vllm_sink.__version__}"
    )
    tools = parser.add_subparsers(metavar="TOOL", required=True)
    for name, (module_name, summary) in TOOLS.items():
        tool = tools.add_parser(
            name,
            help=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name not in arguments[:1]:
            continue
        tool.add_argument(
            "--json", action="store_true", help="print JSON, for machines"
        )
        tool.add_argument(
            "--traceback", action="store_true", help="show where an error comes from"
        )
        module = importlib.import_module(f"vllm_sink.tools.{module_name}")
        module.configure(tool)
        assert tool.epilog, f"vllm-sink {name} must show an example as its epilog"
        tool.set_defaults(run=module.run)
    return parser


def one_line(error: BaseException) -> str:
    """The message without line breaks; the kind of error where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def print_json(value: Any) -> None:
    """Print a value as JSON, as every tool does under ``--json``."""
    print(json.dumps(value, indent=1, allow_nan=False))
