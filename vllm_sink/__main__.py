"""``python -m vllm_sink``: the ``vllm-sink`` command."""

import sys

from vllm_sink.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
