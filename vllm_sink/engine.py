"""The record of an engine: its configuration, and what was found out about it.

A setting travels ``--additional-config`` -> :class:`Engine` -> spec -> block manager.
The record is made where the engine's first module is built
(:mod:`vllm_sink.start.hook`), from vLLM's configuration, in every process that loads
a model. Rooms above write into it what they find out; nothing about an engine is
kept anywhere else::

    start/       the checks passed, which module holds which, what was logged
    rotation/    how each layer's keys are rotated
    cache/       the groups of heads of two policies
    attention/   the backend classes of the engine's layers, its scratch memory

A process may hold several engines, one after another or at once; each has a record.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vllm_sink.policy.config import SinkConfig
from vllm_sink.settings.resolve import resolve

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

T = TypeVar("T")
# The name by which vLLM knows the attention backend.
BACKEND_NAME = "SINK"


class Engine:
    """The record of one engine in one process; lives as long as its configuration.

    Attributes:
        is_checked: Nothing in the configuration had to be refused.
        when_loaded: Called once, with the record and the spec of any group under the
            policy, when the model is loaded and nothing has been served.
        backends: (backend class, whether for retrieval heads) -> the same, bound to
            this engine.
        rotations: Attention layer -> what was measured of it; see
            :func:`vllm_sink.rotation.table.find_rotation`.
        scratch: (device, elements) -> memory that its layers share.
    """

    # id of vLLM's compilation config -> record. A drafter is built under a copy of
    # the configuration that shares this part, in which all layers are registered.
    _records: ClassVar[dict[int, Engine]] = {}

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = weakref.ref(vllm_config)
        self._config = resolve(vllm_config)
        self._parents: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()
        self._head_groups: Callable[[], Any] = lambda: None
        self._known: dict[str, Any] = {}
        self._is_loaded = False
        self.is_checked = False
        self.when_loaded: tuple[Callable[[Engine, AttentionSpec], None], ...] = ()
        self.backends: dict[tuple[type, bool], type] = {}
        self.rotations: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()
        self.scratch: MutableMapping[Any, Any] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Engine:
        """The record of the engine that ``vllm_config`` describes, made if need be.

        Raises:
            ValueError: The ``sink`` section can't be read, by name.
        """
        owner = vllm_config.compilation_config
        known = cls._records.get(id(owner))
        if known is None:
            known = cls._records[id(owner)] = cls(vllm_config)
            weakref.finalize(owner, cls._records.pop, id(owner), None)
        elif known._vllm_config() is None:  # vLLM went on with a copy
            known._vllm_config = weakref.ref(vllm_config)
        return known

    @property
    def vllm_config(self) -> VllmConfig:
        """vLLM's configuration of the served model, not its drafter's copy."""
        vllm_config = self._vllm_config()
        assert vllm_config is not None, "an engine's configuration outlives its layers"
        return vllm_config

    @property
    def config(self) -> SinkConfig:
        """The policy's settings, clipped to the longest request.

        Clipped anew each time: ``--max-model-len -1`` is settled after the layers
        are built.
        """
        model = self.vllm_config.model_config
        if model is None:
            return self._config
        return self._config.clipped(model.max_model_len)

    # -- modules --------------------------------------------------------------

    def note_parent(self, parent: torch.nn.Module, child: torch.nn.Module) -> None:
        """Remember which module holds ``child``."""
        self._parents[child] = weakref.ref(parent)

    def ancestors(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The modules that hold ``module``, from its owner to the whole model."""
        chain: list[torch.nn.Module] = []
        while (parent := self._parents.get(module)) is not None:
            module = parent()
            if module is None or module in chain:
                break
            chain.append(module)
        return chain

    # -- heads of two policies --------------------------------------------------

    @property
    def head_groups(self) -> Any:
        """:class:`vllm_sink.cache.head_caches.HeadGroups`, or None without."""
        return self._head_groups()

    @head_groups.setter
    def head_groups(self, groups: Any) -> None:
        # Held by the layers, which they hold in turn.
        self._head_groups = weakref.ref(groups)

    def once(self, name: str, work_out: Callable[[], T]) -> T:
        """The value of ``work_out``, which is called for a ``name`` once."""
        if name not in self._known:
            self._known[name] = work_out()
        return self._known[name]

    # -- start ----------------------------------------------------------------

    def finish_loading(self, spec: AttentionSpec) -> None:
        """Call :attr:`when_loaded`, once.

        Raises:
            ValueError: A layer doesn't obey the policy, by name.
        """
        if not self._is_loaded:
            for call in self.when_loaded:
                call(self, spec)
            self._is_loaded = True
