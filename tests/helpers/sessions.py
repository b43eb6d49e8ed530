"""Streaming-input sessions against an engine of several processes."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from vllm import AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


@contextlib.contextmanager
def async_engine(model: str, sinks: int, window: int, **options):
    """An ``AsyncLLM`` under (S, W)."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model,
            attention_backend="sink",
            additional_config={
                "sink": {"num_sink_tokens": sinks, "window_size": window}
            },
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            **options,
        )
    )
    try:
        yield engine
    finally:
        engine.shutdown()


@dataclass
class Session:
    """What a session was given and what it said.

    Args:
        turns: Tokens of each turn.
        answer: Tokens of each answer.
        first_prompt: The list that vLLM was given for the first turn.
        history: All tokens before the next turn: vLLM drops the last of an answer.
        scored: (history before the answer, answer, its log-probabilities) a turn.
    """

    turns: list[list[int]]
    answer: int
    history: list[int] = field(default_factory=list)
    first_prompt: list[int] = field(default_factory=list)
    scored: list[tuple[list[int], list[int], list[float]]] = field(default_factory=list)

    async def run(self, engine: AsyncLLM, name: str, after_turn=lambda: None) -> None:
        answered = asyncio.Event()

        async def inputs():
            for turn in self.turns:
                answered.clear()
                self.history += turn
                prompt = list(turn)
                self.first_prompt = self.first_prompt or prompt
                yield StreamingInput(prompt={"prompt_token_ids": prompt})
                await answered.wait()

        params = SamplingParams(
            temperature=0,
            max_tokens=self.answer,
            ignore_eos=True,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
            detokenize=False,
        )
        tokens, scores = [], []
        async for output in engine.generate(inputs(), params, name):
            for piece in output.outputs:
                tokens += piece.token_ids
                scores += [
                    entry[token].logprob
                    for entry, token in zip(
                        piece.logprobs, piece.token_ids, strict=True
                    )
                ]
            if len(tokens) == self.answer:
                self.scored.append((list(self.history), tokens, scores))
                self.history += tokens[:-1]
                tokens, scores = [], []
                after_turn()
                answered.set()
        assert not tokens, "an answer was cut"
