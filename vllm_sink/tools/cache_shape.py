"""The shape of a model's KV cache: its kinds of layers, as vLLM groups them.

Layers of one kind share a spec: a window of their own or none, KV heads, head size.
vLLM's pool has blocks of one size. Layers that are all full (or all have one window)
are one group, whose block holds some tokens of every layer. Else each kind is divided
into groups of equally many layers, whose blocks are as large as the largest kind's: a
kind with a smaller page holds more tokens in its block, or leaves the rest empty.
(``get_kv_cache_groups``, with layers outermost in the layout: the CPU's.)
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sink.policy.layout import RetentionPolicy, cdiv


@dataclass(frozen=True)
class LayerKind:
    """Layers that share a KV cache spec, on one GPU of the group.

    Args:
        num_layers: How many.
        window: Tokens of a window of their own, which they keep; 0: full attention,
            the policy's.
        num_kv_heads: KV heads of one GPU.
        head_size: Elements of one K (or V) vector.
        state_bytes: Bytes of the state of one layer, in place of keys and values.
        num_states: Blocks that a request holds of it, whatever its length.
        num_checkpoints: Blocks that it holds besides while it prefills.
    """

    num_layers: int
    window: int
    num_kv_heads: int
    head_size: int
    state_bytes: int = 0
    num_states: int = 0
    num_checkpoints: int = 0

    @property
    def is_governed(self) -> bool:
        """Whether the policy acts on it."""
        return not self.window and not self.state_bytes


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's KV cache on one GPU of the group.

    Args:
        kinds: Its layers.
        bytes_per_value: Bytes of one element.
    """

    kinds: tuple[LayerKind, ...]
    bytes_per_value: int

    @property
    def num_full_layers(self) -> int:
        return sum(kind.num_layers for kind in self.kinds if kind.is_governed)

    @property
    def num_sliding_layers(self) -> int:
        return sum(kind.num_layers for kind in self.kinds if kind.window)

    def layer_bytes(self, kind: LayerKind) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * kind.num_kv_heads * kind.head_size * self.bytes_per_value

    @property
    def full_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all full-attention layers."""
        return sum(
            kind.num_layers * self.layer_bytes(kind)
            for kind in self.kinds
            if kind.is_governed
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return sum(kind.num_layers * self.layer_bytes(kind) for kind in self.kinds)

    @property
    def is_one_group(self) -> bool:
        """Whether all layers share one block table."""
        return len({(kind.window, kind.state_bytes) for kind in self.kinds}) == 1

    @property
    def has_states(self) -> bool:
        return any(kind.state_bytes for kind in self.kinds)

    def attention_block_size(self, block_size: int) -> int:
        """The block size of attention layers, whose pages no state's exceeds."""
        states = max(kind.state_bytes for kind in self.kinds)
        if not states:
            return block_size
        layer = max(map(self.layer_bytes, self.kinds))
        return block_size * cdiv(states, block_size * layer)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one layer's page, of :meth:`attention_block_size` tokens."""
        return block_size * max(map(self.layer_bytes, self.kinds))

    @property
    def num_tables(self) -> int:
        """Kinds with block tables of their own, of the first kinds."""
        return 1 if self.is_one_group else len(self.kinds)

    @property
    def layers_per_group(self) -> int:
        """Layers that share a block table where there are several groups.

        The smallest kind's number of layers, or the largest's when all are within
        half of each other; short groups are padded.
        """
        counts = [kind.num_layers for kind in self.kinds]
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    def num_groups(self, kind: LayerKind) -> int:
        """Block tables of this kind's layers."""
        return 1 if self.is_one_group else cdiv(kind.num_layers, self.layers_per_group)

    def tokens_per_block(self, kind: LayerKind, block_size: int) -> int:
        """Tokens in a block of this kind's groups."""
        if self.is_one_group or kind.state_bytes:
            return block_size
        ratio, rest = divmod(
            max(map(self.layer_bytes, self.kinds)), self.layer_bytes(kind)
        )
        return block_size if rest else block_size * ratio

    def pool_block_bytes(self, block_size: int) -> int:
        """Bytes of one block of the pool: of one group's layers."""
        if self.is_one_group:
            return block_size * self.bytes_per_token
        block_size = self.attention_block_size(block_size)
        return self.layers_per_group * self.page_bytes(block_size)

    def request_blocks(
        self,
        policy: RetentionPolicy | None,
        num_tokens: int,
        in_flight_tokens: int,
        block_size: int,
    ) -> int:
        """Most pool blocks that one request of ``num_tokens`` holds.

        Args:
            policy: The policy of the full-attention layers; None is dense.
            num_tokens: Length of the request, prompt and answer.
            in_flight_tokens: Its tokens scheduled and not yet settled.
            block_size: Tokens a block, of the kind with the largest page.
        """
        blocks = 0
        block_size = self.attention_block_size(block_size)
        for kind in self.kinds[: self.num_tables]:
            if kind.state_bytes:
                is_prefill = in_flight_tokens > 1
                states = kind.num_states + kind.num_checkpoints * is_prefill
                blocks += self.num_groups(kind) * states
                continue
            size = self.tokens_per_block(kind, block_size)
            own = RetentionPolicy(0, kind.window) if kind.window else policy
            held = cdiv(num_tokens, size)
            if own is not None:
                held = own.max_blocks(in_flight_tokens, num_tokens, size)
            blocks += self.num_groups(kind) * held
        return blocks
