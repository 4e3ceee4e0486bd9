#!/usr/bin/env bash
# Install into .venv and check the machine. Idempotent; no login, no prompt; only --with-apex compiles.
#   bash install.sh [--cpu | --cuda] [--with-EXTRA ...] [--with-apex] [--help]
#   --cpu, --cuda   the build of torch, on x86-64 and AArch64; default: --cuda where there is an NVIDIA driver
#   --with-EXTRA    an extra of setup.py, such as test or wandb
#   --with-apex     NVIDIA's apex from source, for its AdamW on CUDA; needs git, g++ and nvcc of torch's CUDA version
# PYTHON: the interpreter of the virtual environment (default: python3, 3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")"
APEX=git+https://github.com/NVIDIA/apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d # 2026-07-08

fail() {
    echo "error: $1" >&2
    exit 2
}

known=$(sed -n '/extras_require/,/}/s/^ *"\([a-z0-9-]*\)": \[.*/\1/p' setup.py; echo apex)
requested="" build=""
for argument in "$@"; do
    case "$argument" in
        --cpu | --cuda)
            [[ "${build:-${argument#--}}" == "${argument#--}" ]] ||
                fail "install.sh $argument: excludes --$build; drop one"
            build=${argument#--}
            ;;
        --with-*)
            grep -qx -- "${argument#--with-}" <<< "$known" ||
                fail "install.sh $argument: unknown extra; give one of ${known//$'\n'/, }"
            requested+=",${argument#--with-}"
            ;;
        --help) sed -n '2,7s/^# \?//p' "$0"; exit 0 ;;
        *) fail "install.sh $argument: unknown flag; --help lists them" ;;
    esac
done

python=${PYTHON:-python3}
command -v "$python" >/dev/null ||
    fail "$python: not found; install Python 3.10 or newer, or name one: PYTHON=... bash install.sh"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is Python $version; this needs 3.10 or newer"

# The stamp records what was installed, and for which interpreter: nothing is installed twice, and extras stay.
stamp=.venv/installed
if [[ -f "$stamp" ]]; then requested+=",$(sed -n '2s/.*\[\(.*\)\]/\1/p' "$stamp")"; fi
names=""
for extra in $known; do
    if [[ "$requested," == *",$extra,"* ]]; then names+="${names:+,}$extra"; fi
done
fingerprint=$(cat install.sh setup.py constraints.txt | sha256sum; echo "$version ${names:+[$names]}")

torch() { .venv/bin/python -c "import torch; print($1)" 2>/dev/null; }
if [[ "$build" == cuda && "$(torch torch.version.cuda)" == None ]]; then
    fail "install.sh --cuda: .venv has torch for the CPU; remove .venv, and run this again"
fi
fallback=.venv/pypi_torch_for_cpu # the index of CPU builds failed
if [[ "$build" == cpu && ! -e "$fallback" && "$(torch torch.version.cuda)" == [0-9]* ]]; then
    fail "install.sh --cpu: .venv has torch for CUDA; remove .venv, and run this again"
fi
if [[ -f "$stamp" && "$(cat "$stamp")" == "$fingerprint" ]]; then exit 0; fi

if command -v nvidia-smi >/dev/null || [[ -e /proc/driver/nvidia ]]; then build=${build:-cuda}; fi
nvcc=$(command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" || command -v /usr/local/cuda/bin/nvcc || true)
if [[ ",$names," == *,apex,* ]]; then
    [[ "$build" != cpu ]] || fail "install.sh --with-apex: excludes --cpu, apex is for CUDA; drop one"
    [[ "$build" == cuda ]] ||
        fail "install.sh --with-apex: is for CUDA, and this machine has no NVIDIA driver; drop it, or add --cuda"
    [[ -n "$nvcc" ]] || fail "install.sh --with-apex: nvcc: not found; install the CUDA toolkit, or set CUDA_HOME"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; install its package (Debian, Ubuntu: apt-get install python$version-venv)"
echo "installing torch, then this package${names:+[$names]}, into .venv"
.venv/bin/python -c "import pip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null ||
    "$python" -m venv --clear .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
if [[ -z "$(torch torch.version.cuda)" ]]; then
    # PyPI's builds are for CUDA, on AArch64 too; they serve CPUs as well
    index=https://download.pytorch.org/whl/cpu
    if [[ "$build" == cuda ]]; then
        "${pip[@]}" torch
    elif ! reason=$("${pip[@]}" --retries 0 --timeout 10 --index-url "$index" torch 2>&1); then
        echo "$index: pip failed (${reason##*$'\n'}); installing the larger torch of PyPI instead" >&2
        "${pip[@]}" torch
        touch "$fallback"
    fi
fi
grep -v ^torch== constraints.txt > .venv/constraints.txt # what is there stays, if setup.py allows its version
pip[-1]=.venv/constraints.txt
extras=$(tr , '\n' <<< "$names" | grep -vx apex | paste -sd, || true)
"${pip[@]}" --editable ".${extras:+[$extras]}"
if [[ ",$names," == *,apex,* ]] && ! .venv/bin/python -c 'import torch, amp_C' 2>/dev/null; then
    cuda=$(torch torch.version.cuda)
    release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    [[ "$cuda" == "$release" ]] ||
        fail "install.sh --with-apex: $nvcc is CUDA $release, and torch's $cuda; set CUDA_HOME to that toolkit"
    echo "building NVIDIA's apex, which takes minutes"
    "${pip[@]}" ninja packaging setuptools wheel
    CUDA_HOME=${nvcc%/bin/nvcc} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${pip[@]}" --no-build-isolation "$APEX"
fi
echo "$fingerprint" > "$stamp"
.venv/bin/python -m megatron.check || echo "installed; lines marked FAILED say what prevents training" >&2
