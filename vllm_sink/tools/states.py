"""The states of a layer that has them in place of keys, or beside: their size.

A gated delta net (Qwen3-Next, Qwen3.5) or a Mamba 2 (Falcon-H1, Nemotron-H) has one of
its convolution and a recurrent one, of each layer and request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Blocks of states that a request holds, by whether prefixes are cached: the state at
# the end of the last full block stays until the next one is computed from it.
NUM_STATES = {False: 1, True: 2}
# What a layer is called, by what it keeps. Others (MLP, experts) keep nothing.
WITH_STATES = ("linear_attention", "mamba", "hybrid")
WITH_KEYS = ("full_attention", "attention", "hybrid", "sliding_attention")
BESIDE = (*WITH_STATES, "attention", "mlp", "moe")
# The sizes of the models' configurations: heads, their size, groups, state, kernel.
MAMBA = {
    "falcon_h1": (
        "mamba_n_heads",
        "mamba_d_head",
        "mamba_n_groups",
        "mamba_d_state",
        "mamba_d_conv",
    ),
    "nemotron_h": (
        "mamba_num_heads",
        "mamba_head_dim",
        "n_groups",
        "ssm_state_size",
        "conv_kernel",
    ),
}
DELTA = tuple(
    f"linear_{name}"
    for name in (
        "num_key_heads",
        "key_head_dim",
        "num_value_heads",
        "value_head_dim",
        "conv_kernel_dim",
    )
)


@dataclass(frozen=True)
class States:
    """The states of one layer of the whole model, in values.

    Args:
        convolved: Channels of the convolution, without ``groups``.
        groups: Groups of channels besides: their number, and values of one.
        kernel: Tokens that the convolution sees.
        recurrent: Values of the recurrent state.
        writes_within: A prompt's step writes a state within it, beside its last.
    """

    convolved: int
    groups: tuple[int, int]
    kernel: int
    recurrent: int
    writes_within: bool

    def num_bytes(self, ranks: int, bytes_per_value: int, recurrent_bytes: int) -> int:
        """Bytes on one of so many GPUs; each has a whole group at least."""
        count, size = self.groups
        if count % ranks:
            count = max(count, ranks)
        channels = (self.convolved + count * size) // ranks
        recurrent = self.recurrent // ranks
        return (
            channels * (self.kernel - 1) * bytes_per_value + recurrent * recurrent_bytes
        )


def names_of(text: Any) -> tuple[str, ...]:
    """Settings of a decoder's configuration that its states' sizes follow from.

    None where it has no states, or ones that aren't counted.
    """
    model_type = getattr(text, "model_type", None)
    if model_type in MAMBA:
        return MAMBA[model_type]
    return DELTA if getattr(text, DELTA[1], None) else ()


def states_of(text: Any) -> States:
    """The states of a layer; of a configuration that has :func:`names_of`."""
    names = names_of(text)
    sizes = [getattr(text, name) for name in names]
    if names == DELTA:
        key_heads, key_size, value_heads, value_size, kernel = sizes
        values = value_heads * value_size
        channels = 2 * key_heads * key_size + values
        return States(channels, (0, 0), kernel, values * key_size, False)
    heads, size, groups, state, kernel = sizes
    values = heads * size
    return States(values, (groups, 2 * state), kernel, values * state, True)
