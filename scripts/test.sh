#!/usr/bin/env bash
# The whole test suite, in two lanes side by side: engines on real and random models in
# one, what Triton's interpreter and compiler do in the other. Every part runs; the exit
# status tells if any failed.
#   bash scripts/test.sh [arguments for pytest tests]

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 VLLM_SINK_TEST_MODEL=$SMOLLM2

LOGS=$ROOT/.cache/test-logs
rm -rf "$LOGS"
mkdir -p "$LOGS"
part() { # NAME COMMAND...
    local name=$1 start=$SECONDS status=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || { status="FAILED ($?)"; touch "$LOGS/failed"; }
    printf '%-26s %-12s %5ds\n' "$name" "$status" $((SECONDS - start)) >>"$LOGS/summary"
}

engines() {
    # One thread each: the other lane has the other core.
    part "tests" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests \
        --ignore=tests/kernels --ignore=tests/kernels_aot --ignore=tests/gpu_path \
        --ignore=tests/runner_v2 --ignore=tests/zoo \
        --ignore=tests/tools/test_heads_zoo.py "$@"
}

triton() {
    # The next vLLM's scheduler core on the same torch: what the manager stands on.
    part "vLLM $VLLM_NEXT, Python part" make_next_vllm_runnable
    part "manager, vLLM $VLLM_NEXT" env PYTHONPATH="$NEXT_VLLM" \
        VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" "$PYTHON" -m pytest \
        tests/cache/test_block_manager.py tests/cache/test_block_manager_machine.py \
        tests/cache/test_groups.py tests/engine/test_groups.py
    # Processes of their own: Triton reads TRITON_INTERPRET once, when imported.
    part "kernels, interpreted" env TRITON_INTERPRET=1 "$PYTHON" -m pytest tests/kernels
    part "gpu path, interpreted" env TRITON_INTERPRET=1 "$PYTHON" -m pytest \
        tests/gpu_path
    part "runner V2, vLLM $VLLM_CPU" env TRITON_INTERPRET=1 \
        VLLM_SINK_EXPECT_VLLM="$VLLM_CPU" "$PYTHON" -m pytest tests/runner_v2
    # vLLM caches what it finds out about a model's class: not for both versions.
    part "runner V2, vLLM $VLLM_NEXT" env TRITON_INTERPRET=1 \
        PYTHONPATH="$NEXT_VLLM" VLLM_CACHE_ROOT="$ROOT/.cache/vllm-$VLLM_NEXT" \
        VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" "$PYTHON" -m pytest tests/runner_v2
    part "kernels, compiled" "$PYTHON" -m pytest tests/kernels_aot
    # The Triton that the next vLLM's torch pins compiles otherwise.
    part "Triton $TRITON_NEXT" fetch_next_triton
    part "kernels, Triton ${TRITON_NEXT%.*}" env PYTHONPATH="$NEXT_TRITON" \
        VLLM_SINK_EXPECT_TRITON="$TRITON_NEXT" "$PYTHON" -m pytest tests/kernels_aot
    part "zoo" "$PYTHON" -m pytest tests/zoo
    # vLLM decorates the class in transformers of a model that its Transformers backend
    # has served (Hunyuan): Hugging Face alone can't make one in that process any more.
    part "zoo, the finder" "$PYTHON" -m pytest tests/tools/test_heads_zoo.py
    part "soak, three minutes" "$PYTHON" -m tests.soak --minutes 3 --seed 1 --clients 40
}

part "ruff check" "$PYTHON" -m ruff check .
part "ruff format" "$PYTHON" -m ruff format --check .
part "mypy" "$PYTHON" -m mypy
OMP_NUM_THREADS=1 triton >"$LOGS/triton" 2>&1 &
engines "$@"
wait $!
cat "$LOGS/triton"

printf '\n== summary (%ds)\n' "$SECONDS"
cat "$LOGS/summary"
[[ ! -e $LOGS/failed ]]
