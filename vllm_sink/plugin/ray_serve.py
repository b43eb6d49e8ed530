"""An ingress and a router for Ray Serve LLM; scripts/serve_ray.yaml names them.

Ray Serve 2.60 ends the HTTP response of a stream whose replica died as if it
were complete; only ``[DONE]`` is missing, which most clients don't look for
(``ingress_cls_config``). Its router by prefix divides by the length of the text that
it reads in a prompt: a prompt of token ids has none, the router fails, Serve asks it
again without end, and the client waits (``request_router_config``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.request_router import PrefixCacheAffinityRouter
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


class SinkRouter(PrefixCacheAffinityRouter):
    """Ray Serve LLM's router by prefix, which takes prompts of token ids, too."""

    def _extract_text_from_request(self, pending_request: Any) -> str:
        """A text, never an empty one; requests without a prompt share one."""
        try:
            return super()._extract_text_from_request(pending_request) or " "
        except ValueError:  # neither messages nor a prompt: embeddings of one, say
            return " "

    def _coerce_to_text(self, value: Any) -> str:
        """A text of which equal ids at the front are an equal prefix."""
        if isinstance(value, int):
            return f"{value} "
        return super()._coerce_to_text(value)
