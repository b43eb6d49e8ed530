"""The finder of retrieval heads: scores, needles, the fraction, pattern files.

``attention`` runs a Hugging Face model with a policy for every KV head; the other
modules stand on it. ``vllm_sink.tools.find_heads`` is the command.
"""
