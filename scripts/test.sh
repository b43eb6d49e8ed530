#!/usr/bin/env bash
# The tests, in parts that two workers take from one queue.
#   bash scripts/test.sh            the whole gate: at most 30 minutes on two cores
#   bash scripts/test.sh --quick    what most mistakes break, in at most 4 minutes
#   bash scripts/test.sh --changed [REVISION]   tests that import what differs from
#                                   REVISION (origin/main if it is left out)
# Every part runs whatever became of the others; the exit status tells if any failed.
# What a part printed is in .cache/test-logs.

mode=${1:-}
case $mode in
'' | --quick) (($# < 2)) ;;
--changed) (($# < 3)) ;;
*) false ;;
esac || {
    echo "error: arguments must be none, --quick or --changed [REVISION], got $*;" \
        "for some tests run python -m pytest" >&2
    exit 2
}
revision=${2:-}

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 VLLM_SINK_TEST_MODEL=$SMOLLM2
# One thread each: the other worker has the other core.
export OMP_NUM_THREADS=1

LOGS=$ROOT/.cache/test-logs
rm -rf "$LOGS"
mkdir -p "$LOGS"

NAMES=() COMMANDS=() CHANGED=()
if [[ $mode == --changed ]]; then
    mapfile -t CHANGED < <("$PYTHON" -m tests.changed ${revision:+"$revision"})
    echo "${#CHANGED[@]} test files reach what changed"
fi

add() { # NAME COMMAND...
    NAMES+=("$1")
    COMMANDS+=("$(printf '%q ' "${@:2}")")
}

# Adds a pytest process; of its paths only what reaches a change, if that is asked.
tests() { # NAME [VARIABLE=VALUE]... [-OPTION]... PATH...
    local name=$1 word file variables=() options=() paths=() left_out=()
    for word in "${@:2}"; do
        case $word in
        --ignore=*) left_out+=("${word#*=}") options+=("$word") ;;
        -*) options+=("$word") ;;
        *=*) variables+=("$word") ;;
        *) paths+=("$word") ;;
        esac
    done
    if [[ $mode == --changed ]]; then
        local chosen=()
        for file in "${CHANGED[@]}"; do
            [[ " ${left_out[*]} " == *" $file "* ]] && continue
            for word in "${paths[@]}"; do
                [[ $file == "$word" || $file == "$word"/* ]] && chosen+=("$file")
            done
        done
        ((${#chosen[@]})) || return 0
        paths=("${chosen[@]}")
    fi
    add "$name" env "${variables[@]}" "$PYTHON" -m pytest --durations=20 \
        --durations-min=2 "${options[@]}" "${paths[@]}"
}

static_checks() {
    add "ruff check" "$PYTHON" -m ruff check .
    add "ruff format" "$PYTHON" -m ruff format --check .
    add "mypy" "$PYTHON" -m mypy
}

quick() {
    static_checks
    tests "CPU attention" tests/attention/test_cpu_attention.py \
        tests/attention/test_cpu_step.py
    tests "policy, block manager" tests/policy tests/cache/test_block_manager.py \
        tests/cache/test_block_manager_machine.py tests/cache/test_spec.py
    tests "an engine" -k64-absolute tests/attention/test_exact.py
    tests "kernels, a part" TRITON_INTERPRET=1 "-kedge or features or effect or reference" \
        tests/kernels/test_attention.py tests/kernels/test_reference.py
}

# The longest first, so that the workers end together.
whole() {
    local processes=(tests/engine/test_{ray,ray_serve,server,heads_parallel}.py)
    tests "engine, processes" "${processes[@]}"
    tests "engine" "${processes[@]/#/--ignore=}" tests/engine
    tests "attention" tests/attention
    tests "cache, evals, soak's parts" tests/cache tests/evals tests/soak
    tests "tools" --ignore=tests/tools/test_heads_zoo.py tests/tools
    # Processes of their own: Triton reads TRITON_INTERPRET once, when imported.
    # vLLM caches what it finds out about a model's class: not for both versions.
    tests "runner V2, vLLM $VLLM_NEXT" TRITON_INTERPRET=1 PYTHONPATH="$NEXT_VLLM" \
        VLLM_CACHE_ROOT="$ROOT/.cache/vllm-$VLLM_NEXT" \
        VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" tests/runner_v2
    tests "runner V2, vLLM $VLLM_CPU" TRITON_INTERPRET=1 \
        VLLM_SINK_EXPECT_VLLM="$VLLM_CPU" "-mnot power" tests/runner_v2
    tests "kernels, interpreted" TRITON_INTERPRET=1 tests/kernels
    tests "zoo" tests/zoo
    [[ $mode == --changed ]] || {
        add "soak" "$PYTHON" -m tests.soak --minutes 2 --seed 1 --clients 40
        add "soak, host memory" "$PYTHON" -m tests.soak --minutes 1 --seed 3 \
            --clients 40 --host-cache
    }
    tests "kernels, compiled" tests/kernels_aot
    # The Triton that the next vLLM's torch pins compiles otherwise.
    tests "kernels, Triton ${TRITON_NEXT%.*}" PYTHONPATH="$NEXT_TRITON" \
        VLLM_SINK_EXPECT_TRITON="$TRITON_NEXT" tests/kernels_aot
    tests "gpu path, interpreted" TRITON_INTERPRET=1 tests/gpu_path
    # vLLM decorates the class in transformers of a model that its Transformers backend
    # has served (Hunyuan): Hugging Face alone can't make one in that process any more.
    tests "policy, the finder's zoo" tests/policy tests/tools/test_heads_zoo.py
    # The next vLLM's scheduler core on the same torch: what the manager stands on.
    tests "manager, vLLM $VLLM_NEXT" PYTHONPATH="$NEXT_VLLM" \
        VLLM_SINK_EXPECT_VLLM="$VLLM_NEXT" tests/cache/test_block_manager.py \
        tests/cache/test_block_manager_machine.py tests/cache/test_groups.py \
        tests/cache/test_slots.py tests/cache/test_slots_planned.py \
        tests/cache/test_workers.py tests/cache/test_workers_beside.py \
        tests/cache/test_free_order.py tests/cache/test_prefix_hits.py \
        tests/cache/test_host_copies.py tests/cache/test_host_worker.py \
        tests/engine/test_groups.py
    static_checks
}

part() { # INDEX
    local name=${NAMES[$1]} log=$LOGS/$1.log start=$SECONDS status=ok cpu last TIMEFORMAT='%U %S'
    { time eval "${COMMANDS[$1]}" >"$log" 2>&1; } 2>"$LOGS/$1.time" ||
        { status="FAILED ($?)"; touch "$LOGS/failed"; }
    cpu=$(awk '{ printf "%d", $1 + $2 }' "$LOGS/$1.time")
    last=$(tail -n 1 "$log" | tr -d '=')
    printf '%-28s %-12s %5ds %5ds of CPU time  %s\n' \
        "$name" "$status" $((SECONDS - start)) "$cpu" "${last:0:60}" | tee -a "$LOGS/summary"
    [[ $status == ok ]] || sed "s/^/    /" "$log"
}

worker() { # Parts that no other worker has taken, in order.
    local index
    for index in "${!NAMES[@]}"; do
        mkdir "$LOGS/$index.taken" 2>/dev/null || continue
        part "$index"
    done
}

if [[ $mode != --quick ]]; then
    make_next_vllm_runnable || touch "$LOGS/failed"
    fetch_next_triton || touch "$LOGS/failed"
fi
case $mode in
--quick) quick ;;
*) whole ;;
esac
worker &
worker
wait

printf '\n== the slowest tests\n'
grep -hE '^ *[0-9.]+s (call|setup|teardown) ' "$LOGS"/*.log | sort -rn |
    head -n 20 || true
printf '\n== summary (%ds)\n' "$SECONDS"
cat "$LOGS/summary"
[[ ! -e $LOGS/failed ]]
