"""The KV cache of a request: spec, block manager, caches of heads, counters."""
