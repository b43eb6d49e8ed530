"""Ray nodes for the tests: local, loopback only, ended with the test.

No ``ray stop``: it ends processes by name, other people's too.
"""

import contextlib
import gc
import os
import subprocess
import sys

import ray

from vllm_sink.plugin.ray_executor import CpuRayExecutor

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lets its workers wait for all other programs (15): for minutes, beside tests.
    "RAY_worker_niceness": "0",
    # After ray.shutdown, nothing may start a cluster by itself.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "VLLM_HOST_IP": "127.0.0.2",
}
# A Ray of its own, also where one runs already. Ray replaces 127.0.0.1 by an address
# of the network; it leaves this one alone.
INIT = dict(
    address="local",
    _node_ip_address="127.0.0.2",
    include_dashboard=False,
    object_store_memory=100 * 2**20,
)
NODE = f"""
import ray, sys
context = ray.init(num_cpus=int(sys.argv[1]), **{INIT!r})
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@contextlib.contextmanager
def earlier_cluster(monkeypatch, directory, *import_first, num_cpus=2):
    """Join a cluster that was started by another process, in a clean environment.

    Args:
        directory: The driver's working directory, which Ray puts on the workers'
            path: not the repository.
        import_first: Folders at the head of the node's import path.
    """
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(directory)
    paths = [*map(str, import_first), os.environ.get("PYTHONPATH")]
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **SETTINGS,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, str(num_cpus)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = node.stdout.readline().strip()
        assert address, f"the node ended with {node.wait(30)}"
        ray.init(address=address, log_to_driver=False)
        yield
    finally:
        # An engine that could not start would do this when Python exits.
        for thing in gc.get_objects():
            if isinstance(thing, CpuRayExecutor):
                thing.shutdown()
        ray.shutdown()
        node.stdin.close()
        node.wait(30)
