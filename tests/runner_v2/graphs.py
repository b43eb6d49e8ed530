"""CUDA graphs without a GPU: forwards with what was captured, on live buffers.

A CUDA graph replays the kernels of a forward whose metadata was made for a dummy
batch: all that may change between two replays is the contents of the runner's
buffers. Here vLLM's own manager chooses the graphs, prepares what is captured and
dispatches the batches; only the recording differs: the forward is kept and run
again instead of its kernels.
"""

from collections import Counter
from types import SimpleNamespace

SIZES = [1, 2, 4, 8, 16, 24, 32, 40]


def replay_graphs(llm, mode: str, monkeypatch) -> Counter:
    """From now on ``llm`` runs under graphs; their uses are counted.

    Args:
        mode: vLLM's ``cudagraph_mode`` by name: ``FULL_DECODE_ONLY``, ``FULL``
            (one graph a size for any batch), ``FULL_AND_PIECEWISE`` (the default on
            CUDA: decode in full graphs, the rest padded and its attention eager).

    Returns:
        How often each kind of graph ran: "decode", "mixed" or "piecewise".
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils

    from tests.helpers.engine import model_runner

    def capture(manager, create_forward_fn, progress_bar_desc=""):
        full = manager._capture_descs.get(CUDAGraphMode.FULL, [])
        for desc in full:
            create_forward_fn(desc, warmup=True)
            forward = create_forward_fn(desc, warmup=False)
            manager.graphs[desc] = SimpleNamespace(
                replay=lambda forward=forward: forward(CUDAGraphMode.NONE)
            )
        manager._graphs_captured = True

    runner = model_runner(llm)
    config = runner.vllm_config.compilation_config
    monkeypatch.setattr(config, "cudagraph_capture_sizes", SIZES)
    monkeypatch.setattr(config, "max_cudagraph_capture_size", SIZES[-1])
    # Builders of states ask in each step whether a graph holds on to their buffers.
    monkeypatch.setattr(config, "cudagraph_mode", CUDAGraphMode[mode])
    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    monkeypatch.setattr(cudagraph_utils, "has_compiled_submodule", lambda model: True)
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", object())
    manager = cudagraph_utils.ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode[mode], runner.decode_query_len
    )
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        use_aux_hidden_state_outputs=runner.use_aux_hidden_state_outputs,
    )
    used: Counter = Counter()
    dispatch = manager.dispatch

    def count(*args, **kwargs):
        desc = dispatch(*args, **kwargs)
        if desc.cg_mode == CUDAGraphMode.FULL:
            used["mixed" if desc.uniform_token_count is None else "decode"] += 1
        elif desc.cg_mode == CUDAGraphMode.PIECEWISE:
            used["piecewise"] += 1
        return desc

    monkeypatch.setattr(manager, "dispatch", count)
    monkeypatch.setattr(runner, "cudagraph_manager", manager)
    return used
