"""The measurement, on the loaded model, of the table that rotates each layer.

Runs when vLLM first asks the backend for a layer's KV cache spec: the model is
loaded (adapters and drafters too) and nothing was profiled, compiled or captured,
on both model runners. Every rank does the same, with its own heads.

Two forwards of a few tokens: one at small positions, which leaves the tables that
fit and tells how many rows they have, and one up to the last position, where
whatever depends on the length shows.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_sink.engine import BACKEND_NAME, Engine
from vllm_sink.rotation.candidates import misfit, tables_of, tolerance
from vllm_sink.rotation.exact import make_exact, trained_length
from vllm_sink.rotation.head_counts import check_head_counts
from vllm_sink.rotation.probe import (
    Seen,
    difference,
    probe,
)
from vllm_sink.rotation.table import RotaryTable, Unknown

logger = init_logger("vllm.plugins.sink")

_NEAR = [0, 1, 2, 3, 7]

# What may explain a layer, the likeliest first; None: it is not rotated.
Candidates = list[RotaryTable | None]


def measure_loaded_model(engine: Engine) -> None:
    """Measure the rotation of each layer of an engine's loaded model, once.

    vLLM asks layer by layer: all are looked over again only if there are more.
    """
    registered = engine.vllm_config.compilation_config.static_forward_context
    engine.once(f"measured {len(registered)} layers", lambda: _measure(engine))


def _measure(engine: Engine) -> None:
    """Measure where queries are turned, and where positions exceed the trained length.

    The model's tables are made exact there.
    """
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(
            engine.vllm_config, Attention
        ).items()
        if layer.get_attn_backend().get_name() == BACKEND_NAME
    }
    check_head_counts(engine, layers)
    trained = trained_length(engine)
    if engine.vllm_config.model_config.max_model_len > trained or _turns_queries(
        engine
    ):
        measure_rotations(engine, layers)


def _turns_queries(engine: Engine) -> bool:
    """Whether any query is ever turned."""
    config = engine.config
    policies = [config.policy, config.retrieval_policy]
    budget = min(policy.budget for policy in policies if policy is not None)
    reached = budget < engine.vllm_config.model_config.max_model_len
    return reached and config.sink_positions == "cache" and config.num_sink_tokens > 0


def measure_rotations(engine: Engine, layers: dict[str, Any]) -> None:
    """Measure ``layers`` that are not in ``engine.rotations`` yet, and add them."""
    models: dict[int, tuple[torch.nn.Module, dict[str, Any]]] = {}
    for name, layer in layers.items():
        if layer in engine.rotations:
            continue
        chain = engine.ancestors(layer)
        if chain:
            models.setdefault(id(chain[-1]), (chain[-1], {}))[1][name] = layer
        else:
            engine.rotations[layer] = Unknown("the module that owns it was not seen")
    for root, members in models.values():
        start = time.perf_counter()
        found = measure_model(engine, root, members)
        for name, layer in members.items():
            engine.rotations[layer] = found[name]
        logger.info(
            "Rotation of %s measured in %.2f s: %s",
            type(root).__name__,
            time.perf_counter() - start,
            _summary(found),
        )


def measure_model(
    engine: Engine, root: torch.nn.Module, layers: dict[str, Any]
) -> dict[str, RotaryTable | Unknown | None]:
    """The table that rotates each of ``layers`` of the model ``root``."""
    why = _multidimensional(engine.vllm_config)
    if why is None:
        try:
            return _Measurement(engine, root, layers).run()
        except Exception as error:
            logger.exception("The forward that measures the rotation failed")
            why = f"the forward that measures it failed: {error!r}"
    return dict.fromkeys(layers, Unknown(why))


def _multidimensional(vllm_config: VllmConfig) -> str | None:
    """Reason that positions are multi-dimensional (images, audio), or None."""
    model = vllm_config.model_config
    media = model.multimodal_config
    if not model.uses_mrope or media is None or media.language_model_only:
        return None
    return (
        "its positions are multi-dimensional where images or audio may come; pass "
        "--language-model-only to serve text alone"
    )


class _Measurement:
    """The measurement of one model."""

    def __init__(
        self, engine: Engine, root: torch.nn.Module, layers: dict[str, Any]
    ) -> None:
        self.engine = engine
        self.root = root
        self.layers = layers
        self.vllm_config = engine.vllm_config
        self.dtype = self.vllm_config.model_config.dtype
        self.tolerance = tolerance(self.dtype)
        self.modules = [
            (name, module)
            for name, module in root.named_modules()
            if next(module.buffers(recurse=False), None) is not None
        ]
        self.tables: dict[int, list[RotaryTable]] = {}  # by head size

    def run(self) -> dict[str, RotaryTable | Unknown | None]:
        length = self.vllm_config.model_config.max_model_len
        near = [p for p in _NEAR if p < length]
        candidates = {name: self._candidates(name) for name in self.layers}
        alone = self._probe(near)
        fits = self._fit(alone, near, candidates)
        far = far_positions(self._positions_to_read(fits, length))
        kept = {name: fit for name, fit in fits.items() if isinstance(fit, list)}
        beside = self._probe(far)
        fits.update(self._fit(beside, far, kept))
        for name in kept:
            change = difference(alone[name], beside[name])
            if change > self.tolerance:
                fits[name] = Unknown(
                    "it changes at position 0 with the positions beside it, by "
                    f"{change:.1%}"
                )
        self._agree_with_shared_keys(fits)
        self._make_exact(fits, far)
        stored: dict[RotaryTable, RotaryTable] = {}
        found: dict[str, RotaryTable | Unknown | None] = {}
        for name, fit in fits.items():
            if isinstance(fit, Unknown):
                found[name] = fit
                continue
            table = fit[0]
            if table is not None and table not in stored:
                stored[table] = table.stored(length)
            found[name] = None if table is None else stored[table]
        return found

    def _candidates(self, name: str) -> Candidates:
        """None (not rotated), then the model's tables, those of the owner first."""
        layer = self.layers[name]
        size = layer.head_size
        if size not in self.tables:
            self.tables[size] = list(tables_of(self.modules, size, self.dtype))
        owned = {id(module) for module in self.engine.ancestors(layer)[0].modules()}
        tables = sorted(self.tables[size], key=lambda t: id(t.module) not in owned)
        return [None, *tables]

    def _positions_to_read(
        self, fits: dict[str, Candidates | Unknown], length: int
    ) -> int:
        """The number of positions that every table in use has a row for."""
        rows = [length]
        for fit in fits.values():
            if isinstance(fit, list):
                longest = [table.num_rows if table else None for table in fit]
                if None not in longest:
                    rows.append(max(n for n in longest if n is not None))
            else:  # it may read any
                for tables in self.tables.values():
                    rows += [t.num_rows for t in tables if t.num_rows is not None]
        return min(rows)

    def _probe(self, positions: list[int]) -> dict[str, Seen]:
        return probe(self.root, self.layers, self.vllm_config, positions)

    def _fit(
        self,
        seen: dict[str, Seen],
        positions: list[int],
        candidates: dict[str, Candidates],
    ) -> dict[str, Candidates | Unknown]:
        """The candidates of each layer that explain what was seen."""
        return {
            name: self._fitting(seen[name], torch.tensor(positions), some)
            for name, some in candidates.items()
        }

    def _fitting(
        self, seen: Seen, positions: torch.Tensor, candidates: Candidates
    ) -> Candidates | Unknown:
        if seen.noise > self.tolerance:
            return Unknown(
                "one token at one position reaches it in different ways, "
                f"{seen.noise:.1%} of its length apart"
            )
        misfits = []
        for table in candidates:
            query = misfit(seen.query, positions, table)
            key = (0.0, 0) if seen.key is None else misfit(seen.key, positions, table)
            misfits.append((table, query, key))
        fits = [
            table
            for table, query, key in misfits
            if max(query[0], key[0]) <= self.tolerance
        ]
        if fits:
            return fits
        queries = self._describe([(table, query) for table, query, _ in misfits])
        if seen.key is None:
            return Unknown(f"its queries are {queries}")
        keys = self._describe([(table, key) for table, _, key in misfits])
        return Unknown(f"its queries are {queries}, its keys {keys}")

    def _describe(
        self, misfits: list[tuple[RotaryTable | None, tuple[float, int]]]
    ) -> str:
        table, (distance, position) = min(misfits, key=lambda fit: fit[1][0])
        what = "not rotated" if table is None else f"rotated by {table.name}"
        if distance <= self.tolerance:
            return what
        return (
            f"explained by no table (the closest: {what}, which at position "
            f"{position} is off by {distance:.1%})"
        )

    def _make_exact(
        self, fits: dict[str, Candidates | Unknown], positions: list[int]
    ) -> None:
        """Give the tables in use exact angles past the trained length."""
        model = self.vllm_config.model_config
        length, trained = model.max_model_len, trained_length(self.engine)
        if length <= trained:
            return
        exact: dict[str, RotaryTable] = {}
        chosen: dict[str, Candidates] = {}
        for name, fit in fits.items():
            table = fit[0] if isinstance(fit, list) else None
            if table is None:
                continue
            if table.name not in exact:
                made = make_exact(self.root, table, trained, length)
                exact[table.name] = made or table
            chosen[name] = [exact[table.name]]
        if chosen:
            fits.update(self._fit(self._probe(positions), positions, chosen))

    def _agree_with_shared_keys(self, fits: dict[str, Candidates | Unknown]) -> None:
        """Give layers that read another layer's keys the rotation of those."""
        for name, layer in self.layers.items():
            if layer.impl.writes_cache:
                continue
            target = layer.impl.reads_keys_of
            mine = fits[name]
            if isinstance(mine, Unknown):
                continue
            theirs = fits.get(target, Unknown("it is in another model"))
            if isinstance(theirs, list) and theirs[0] in mine:
                fits[name] = [theirs[0]]
            else:
                fits[name] = Unknown(
                    f"its queries are rotated by {_name(mine[0])}, but not the keys "
                    f"that it shares with {target}"
                )


def far_positions(count: int) -> list[int]:
    """Positions up to the last of ``count``; the first is 0."""
    some = {0, 1, count // 31, count // 7, count // 2, count - 2, count - 1}
    return sorted(p for p in some if 0 <= p < count)


def _name(table: RotaryTable | None) -> str:
    return "no table" if table is None else table.name


def _summary(found: dict[str, RotaryTable | Unknown | None]) -> str:
    """The number of layers by table, for the log."""
    counts: dict[str, int] = {}
    for one in found.values():
        if isinstance(one, RotaryTable):
            what = f"by {one.name}"
        else:
            what = "not rotated" if one is None else "unknown"
        counts[what] = counts.get(what, 0) + 1
    return ", ".join(f"{count} {what}" for what, count in counts.items())
