#!/usr/bin/env bash
# Serve a model with attention sinks, ask it something, stream past its trained
# length and compare with stock attention.
#   bash scripts/demo.sh [MODEL] [--serve] [--text FILE]
#
# MODEL    a folder or a name on the Hub; SmolLM2-135M-Instruct if left out
# --serve  leave the server running at the end, until Ctrl-C
# --text   the text to stream; Python's own manual if left out

model='' serve=0 stream=()
while (($#)); do
    case $1 in
        --serve) serve=1 ;;
        --text) stream=(--text "${2:?--text must be followed by a file}"); shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
        -*) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
        *) model=$1 ;;
    esac
    shift
done

# What it runs needs no extras.
VLLM_SINK_EXTRAS='' source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

model=${model:-$SMOLLM2}
[[ -d $model ]] && export HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY=passive
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
vllm=$(dirname "$PYTHON")/vllm
# The repository's own modules, wherever this runs: paths are as the user gave them.
own() { PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$@"; }
log=$ROOT/.cache/serve.log
port=$("$PYTHON" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
serve_env=()
# Of two cores, vLLM's own choice would leave one idle.
cores=$("$PYTHON" -c 'import os
print(*sorted(os.sched_getaffinity(0)), sep=",")' 2>/dev/null || true)
if [[ -z ${VLLM_CPU_OMP_THREADS_BIND:-} && $cores =~ ^[0-9]+,[0-9]+$ ]]; then
    serve_env=(VLLM_CPU_OMP_THREADS_BIND="$cores")
fi
read -r trained dtype < <(own - "$model" <<'PY'
import sys
from scripts.demo_stream import fast_dtype, trained_length
print(trained_length(sys.argv[1]), fast_dtype())
PY
)
# A row of the rotary table for every position, past the trained length too.
overrides=()
if ((trained < 16384)); then
    # The flag as it is typed, quoted; nothing where the table is long enough.
    eval "overrides=($("$PYTHON" -m vllm_sink.rotation.table_length "$model" 16384 2>/dev/null))"
fi

server=''
stop_server() {
    [[ -n $server ]] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=''
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo
echo "1. Serve $(basename "$model") with 4 sinks and a window of 1,020 tokens"
command=("$vllm" serve "$model" --attention-backend sink
    --host 127.0.0.1 --port "$port" --dtype "$dtype" --enforce-eager
    --max-model-len 16384 ${overrides[@]+"${overrides[@]}"}
    --additional-config '{"sink": {"num_sink_tokens": 4, "window_size": 1020}}')
env ${serve_env[@]+"${serve_env[@]}"} "${command[@]}" >"$log" 2>&1 &
server=$!

echo
echo "2. Ask it over the OpenAI API"
"$PYTHON" "$ROOT/scripts/demo_chat.py" "$url" "$server" "$log"
((serve)) || stop_server

echo
echo "3. Stream a text longer than the trained length ($trained tokens)"
own -m scripts.demo_stream "$model" --trained-length "$trained" \
    --dtype "$dtype" \
    ${stream[@]+"${stream[@]}"}
echo
echo "Done in $SECONDS s."

if ((serve)); then
    cat <<TEXT

The server is at $url (log: $log); Ctrl-C stops it.
  curl $url/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$model", "messages": [{"role": "user", "content": "Hello!"}]}'
TEXT
    wait "$server"
fi
