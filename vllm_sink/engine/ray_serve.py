"""Ray Serve LLM's ingress, with an error event where a stream is cut.

Ray Serve 2.60 ends the HTTP response of a stream whose replica died as if it
were complete; only ``[DONE]`` is missing, which most clients don't look for.
Chosen by ``ingress_cls_config`` in scripts/serve_ray.yaml.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.llm.ingress import OpenAiIngress
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse


class SinkIngress(OpenAiIngress):
    """Ray Serve LLM's own ingress otherwise."""

    async def _get_response(self, **request: Any) -> AsyncGenerator[Any, None]:
        has_started = False
        try:
            async for response in super()._get_response(**request):
                yield response
                has_started = True
        except RayActorError:
            if has_started:
                yield ErrorResponse(
                    error=ErrorInfo(
                        message="the replica that served this request died; send "
                        "the request again",
                        type="ServiceUnavailableError",
                        code=503,
                    )
                )
            raise  # before the first event: an HTTP error; after it: no [DONE]
