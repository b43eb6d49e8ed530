"""A process that deploys scripts/serve_ray.yaml on a Ray of its own, until stdin ends.

    python -m tests.soak.ray_app MODEL PORT ENGINE_KWARGS

``ENGINE_KWARGS`` is JSON and goes over the file's. Prints ``ready`` once it answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.helpers.ray_nodes import INIT, SETTINGS

CONFIG = Path(__file__).parents[2] / "scripts" / "serve_ray.yaml"


def main(model: str, port: str, engine_kwargs: str) -> None:
    os.environ.update(SETTINGS)
    import ray
    from ray import serve

    from scripts.serve_ray import deploy, read_config

    config = read_config(CONFIG, model)
    config["http_options"]["port"] = int(port)
    (application,) = config["applications"]
    (llm,) = application["args"]["llm_configs"]
    llm["model_loading_config"]["model_id"] = "model"
    llm["engine_kwargs"].update(json.loads(engine_kwargs))
    ray.init(num_cpus=6, log_to_driver=False, **INIT)
    try:
        deploy(config)
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
