"""Which tokens and blocks a request retains: pure arithmetic, no vLLM.

::

    position   0 .. S-1 | S ........ n-W | n-W+1 ............ n-1 | n
               sinks    | gap (evicted)  | rest of the window     | next query

Everything is counted for the *next* query, at position ``n`` when ``n``
tokens have been processed: it sees keys ``n-W+1 .. n``, so the window is
``W`` tokens including the query's own.
"""

from __future__ import annotations

from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


@dataclass(frozen=True)
class RetentionPolicy:
    """The sink policy of one group of layers (StreamingLLM, arXiv 2309.17453).

    Args:
        num_sink_tokens: S, the first tokens, kept for the request's life.
        window_size: W, the last tokens, the query's own included.
    """

    num_sink_tokens: int
    window_size: int

    @property
    def budget(self) -> int:
        """S + W: the tokens a request retains."""
        return self.num_sink_tokens + self.window_size

    def clipped(self, max_model_len: int) -> RetentionPolicy:
        """S and W capped at ``max_model_len``, so they fit in int32."""
        return RetentionPolicy(
            min(self.num_sink_tokens, max_model_len),
            min(self.window_size, max_model_len),
        )

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at position ``query`` attends to ``key``."""
        return key <= query and (
            key < self.num_sink_tokens or query - key < self.window_size
        )

    def window_start(self, num_tokens: int) -> int:
        """First position of the window of the next query, at ``num_tokens``."""
        return max(0, num_tokens - self.window_size + 1)

    def num_sink_blocks(self, block_size: int) -> int:
        """Blocks that hold a sink token; the last may hold others too."""
        return cdiv(self.num_sink_tokens, block_size)

    def gap_blocks(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        """Half-open range of block indices that are wholly in the gap.

        Args:
            num_tokens: Tokens processed; the next query is at this position.
            block_size: Tokens a block.
        """
        first = self.num_sink_blocks(block_size)
        return first, max(first, self.window_start(num_tokens) // block_size)

    def max_blocks(
        self, max_in_flight_tokens: int, max_model_len: int, block_size: int
    ) -> int:
        """Most blocks that one request holds at any time.

        ``ceil(S/B) + ceil((W - 1 + in_flight)/B) + 1``: the last one because a
        window need not start at a block's first slot.
        """
        windowed = cdiv(self.window_size - 1 + max_in_flight_tokens, block_size)
        return min(
            self.num_sink_blocks(block_size) + windowed + 1,
            cdiv(max_model_len, block_size),
        )

    def blocks_before_hit(self, block_size: int) -> int:
        """Contiguous blocks that a prefix hit needs at its end."""
        return cdiv(self.window_size - 1, block_size)
