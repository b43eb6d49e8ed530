#!/usr/bin/env bash
# Serve a model with attention sinks on Ray: replicas behind one OpenAI API.
#   bash scripts/serve_ray.sh [CONFIG] [--port N] [--once]
#
# CONFIG    a Ray Serve config; scripts/serve_ray.yaml if left out: two replicas
#           of SmolLM2-135M-Instruct on the CPU
# --port N  where to listen, on 127.0.0.1; the config's if left out
# --once    stop after the first answer instead of at Ctrl-C

case " $* " in
    *" -h "* | *" --help "*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
esac
VLLM_SINK_EXTRAS=ray source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# Ray's own choice is one thread a replica.
cores=$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
export OMP_WAIT_POLICY=passive
exec "$PYTHON" "$ROOT/scripts/serve_ray.py" --smollm2 "$SMOLLM2" "$@"
