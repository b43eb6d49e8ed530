"""A Ray Serve config, run on this machine alone; see serve_ray.sh.

On a cluster use Ray's own ``serve deploy scripts/serve_ray.yaml``.
"""

import argparse
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"


def read_config(path: Path, model: str | None = None) -> dict[str, Any]:
    """The Serve config in ``path``, SmolLM2 taken from the folder ``model``."""
    import yaml

    config = yaml.safe_load(path.read_text())
    for application in config["applications"]:
        for llm in application["args"]["llm_configs"]:
            source = llm["model_loading_config"]
            if model and source["model_source"] == HUB_NAME:
                source["model_source"] = model
                os.environ["HF_HUB_OFFLINE"] = "1"
    return config


def deploy(config: dict[str, Any]) -> None:
    """Start Serve and every application; returns when they answer.

    Raises:
        RuntimeError: An application failed; Serve's status, its message inside.
    """
    from ray import serve
    from ray.serve._private.utils import import_attr

    serve.start(http_options=config["http_options"])
    for application in config["applications"]:
        build = import_attr(application["import_path"])
        serve.run(
            build(application["args"]),
            name=application["name"],
            route_prefix=application["route_prefix"],
        )


def ask(url: str) -> None:
    """Put a question to the first model at ``url`` and print all of it."""
    # Never through a proxy: the server is on the loopback interface.
    send = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with send(url + "/v1/models", timeout=60) as reply:
        model = json.load(reply)["data"][0]["id"]
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps(
        {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    )
    header = {"Content-Type": "application/json"}
    print(f"\n$ curl {url}/v1/chat/completions \\")
    print(f"    -H 'Content-Type: application/json' -d '{body}'")
    request = urllib.request.Request(
        url + "/v1/chat/completions", body.encode(), header
    )
    with send(request, timeout=300) as reply:
        print(reply.read().decode(), flush=True)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="serve_ray.sh")
    here = Path(__file__).parent
    parser.add_argument("config", type=Path, nargs="?", default=here / "serve_ray.yaml")
    parser.add_argument("--port", type=int)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--smollm2", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f"CONFIG must be a file, got {args.config}")
    config = read_config(args.config, args.smollm2)
    config["http_options"]["port"] = args.port or config["http_options"]["port"]
    url = f"http://127.0.0.1:{config['http_options']['port']}"

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray import serve

    try:
        # Ray counts CPUs to place actors: two for each replica, one for the
        # ingress. A laptop has fewer; the operating system shares them out.
        # A Ray of its own, also where one runs already.
        ray.init(
            address="local",
            num_cpus=max(5, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
        )
        # After ray.init, which sets its own; and a shell's background job would
        # ignore Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        start = time.monotonic()
        print(f"Starting {args.config.name} on {url} (logs: {log_folder()})")
        deploy(config)
        print(f"Ready after {time.monotonic() - start:.0f} s")
        ask(url)
        while not args.once:
            print("Serving until Ctrl-C", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("Stopping the replicas and this machine's Ray", flush=True)
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def log_folder() -> str:
    """The folder into which Serve's processes log."""
    import ray

    return os.path.join(
        ray._private.worker._global_node.get_session_dir_path(), "logs", "serve"
    )


if __name__ == "__main__":
    main()
