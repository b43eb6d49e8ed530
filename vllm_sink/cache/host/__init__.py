"""Host memory behind the pool: what is idle survives.

:mod:`.scheduler` decides which blocks are copied where, :mod:`.lookup` finds what came
to lie there, :mod:`.store` keeps account of the host's slots, :mod:`.worker` copies.
What vLLM calls is :mod:`vllm_sink.plugin.host_connector`.
"""
