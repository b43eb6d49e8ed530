#!/usr/bin/env bash
# The whole test suite. Every part runs; the exit status tells if any failed.
#   bash scripts/test.sh [arguments for pytest tests]

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 VLLM_SINK_TEST_MODEL=$SMOLLM2

summary=()
failed=0
part() { # NAME COMMAND...
    local name=$1 start=$SECONDS status=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || { status="FAILED ($?)"; failed=1; }
    summary+=("$(printf '%-22s %-12s %5ds' "$name" "$status" $((SECONDS - start)))")
}

part "ruff check" "$PYTHON" -m ruff check .
part "ruff format" "$PYTHON" -m ruff format --check .
part "mypy" "$PYTHON" -m mypy
# Without OMP_NUM_THREADS vLLM takes one thread for an engine in this process.
part "tests" env OMP_NUM_THREADS="$(nproc)" "$PYTHON" -m pytest tests --ignore=tests/kernels \
    --ignore=tests/kernels_aot --ignore=tests/gpu_path --ignore=tests/runner_v2 "$@"
# The next vLLM's scheduler core on the same torch: what the manager stands on.
part "vLLM $VLLM_NEXT, Python part" make_next_vllm_runnable
part "manager, vLLM $VLLM_NEXT" env PYTHONPATH="$NEXT_VLLM" \
    VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" "$PYTHON" -m pytest \
    tests/cache/test_block_manager.py tests/cache/test_block_manager_machine.py
# Processes of their own: Triton reads TRITON_INTERPRET once, when imported.
if [[ -d tests/kernels ]]; then
    part "kernels, interpreted" env TRITON_INTERPRET=1 "$PYTHON" -m pytest tests/kernels
fi
if [[ -d tests/gpu_path ]]; then
    part "gpu path, interpreted" env TRITON_INTERPRET=1 "$PYTHON" -m pytest tests/gpu_path
fi
if [[ -d tests/runner_v2 ]]; then
    part "runner V2, vLLM $VLLM_CPU" env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
        VLLM_SINK_EXPECT_VLLM="$VLLM_CPU" "$PYTHON" -m pytest tests/runner_v2
    # vLLM caches what it finds out about a model's class: not for both versions.
    part "runner V2, vLLM $VLLM_NEXT" env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
        PYTHONPATH="$NEXT_VLLM" VLLM_CACHE_ROOT="$ROOT/.cache/vllm-$VLLM_NEXT" \
        VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" "$PYTHON" -m pytest tests/runner_v2
fi
if [[ -d tests/kernels_aot ]]; then
    part "kernels, compiled" "$PYTHON" -m pytest tests/kernels_aot
    # The Triton that the next vLLM's torch pins compiles otherwise.
    part "Triton $TRITON_NEXT" fetch_next_triton
    part "kernels, Triton ${TRITON_NEXT%.*}" env PYTHONPATH="$NEXT_TRITON" \
        VLLM_SINK_EXPECT_TRITON="$TRITON_NEXT" "$PYTHON" -m pytest tests/kernels_aot
fi

printf '\n== summary (%ds)\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
