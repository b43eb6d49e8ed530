"""vLLM's Ray executor on CPUs.

vLLM's own reserves a device of ``current_platform.ray_device_key`` for each
worker and passes the key to Ray as a custom resource, which Ray refuses for
``"CPU"``. Here a worker is an actor inside a placement group bundle of one
CPU, and needs nothing more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

# Marks a worker's process; see SinkCpuPlatform.ray_device_key.
WORKER_VARIABLE = "VLLM_SINK_RAY_WORKER"
# vLLM's own setting: the placement group's bundles that are workers'.
_BUNDLES = "VLLM_RAY_BUNDLE_INDICES"


class CpuRayExecutor(RayExecutorV2):
    """``--distributed-executor-backend ray`` where there are only CPUs."""

    def _init_executor(self) -> None:
        """Start workers that need no class of ours, outside the engine core's bundle.

        A node without this package couldn't unpickle a configuration that names
        this class, and would give a less clear error than the backend's member
        does (:func:`vllm_sink.plugin.compat.restore_backend_member`).

        With ``--data-parallel-backend ray`` vLLM hands in a placement group of
        one bundle for each worker and, last, one for the engine core. It tells
        them apart by the device's key, which is CPU in both here, and would
        wait for a worker too many without end.
        """
        self.parallel_config.distributed_executor_backend = "ray"
        group = self.parallel_config.placement_group
        world_size = self.parallel_config.world_size
        is_data_parallel = group is not None and group.bundle_count > world_size
        if not is_data_parallel or _BUNDLES in os.environ:
            super()._init_executor()
        else:
            os.environ[_BUNDLES] = ",".join(map(str, range(world_size)))
            try:
                super()._init_executor()
            finally:
                del os.environ[_BUNDLES]
        self._delete_queue_names()

    def _delete_queue_names(self) -> None:
        """Take the workers' response queues out of /dev/shm; both ends keep them.

        Both ends have mapped them by now. vLLM ends its Ray workers by killing them,
        and those alone would delete their queues: up to 240 MiB each would stay.
        """
        for queue in self.response_mqs:
            if queue.buffer is not None:  # of a worker on this machine
                name = queue.buffer.shared_memory.name
                Path("/dev/shm", name).unlink(missing_ok=True)

    def collective_rpc(self, *args, **kwargs) -> Any:
        """Call every worker; a clear error once one has died.

        A thread of vLLM's shuts the executor down then, maybe in the middle of
        this call, which fails in one of several ways: an assertion about follower
        nodes, an index error.
        """
        try:
            return super().collective_rpc(*args, **kwargs)
        except Exception as error:
            if not self.is_failed:
                raise
            raise RuntimeError(
                "Executor failed: a Ray worker died; start it again"
            ) from error

    def _build_runtime_env(self) -> dict:
        runtime_env = super()._build_runtime_env()
        env_vars = runtime_env["env_vars"]
        env_vars[WORKER_VARIABLE] = "1"
        # Ray gives an actor one thread unless its environment says otherwise
        # from the start; vLLM's own forwarding comes too late for OpenMP.
        if "OMP_NUM_THREADS" in os.environ:
            env_vars.setdefault("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
        return runtime_env

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {"num_gpus": 0}  # the bundle holds the CPU
