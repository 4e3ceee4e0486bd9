#!/usr/bin/env bash
# Install into .venv. Idempotent; no login, no prompt, no compilation.
#   bash install.sh [--with-EXTRA ...] [--help]; EXTRA: an extra of setup.py, such as test or wandb
# PYTHON: the interpreter of the virtual environment (default: python3, 3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "error: $1" >&2
    exit 2
}

known=$(sed -n '/extras_require/,/}/s/^ *"\([a-z0-9-]*\)": \[.*/\1/p' setup.py)
requested=""
for argument in "$@"; do
    case "$argument" in
        --with-*)
            grep -qx -- "${argument#--with-}" <<< "$known" ||
                fail "install.sh $argument: unknown extra; give one of ${known//$'\n'/, }"
            requested+=",${argument#--with-}"
            ;;
        --help) sed -n '2,4s/^# \?//p' "$0"; exit 0 ;;
        *) fail "install.sh $argument: unknown flag; --help lists them" ;;
    esac
done

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python: not found; install Python 3.10 or newer, or name one: PYTHON=... bash install.sh"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is Python $version; this needs 3.10 or newer"

# The stamp records what was installed, and for which interpreter: nothing is installed twice, and extras stay.
stamp=.venv/installed
if [[ -f "$stamp" ]]; then requested+=",$(sed -n '2s/.*\[\(.*\)\]/\1/p' "$stamp")"; fi
extras=""
for extra in $known; do
    if [[ "$requested," == *",$extra,"* ]]; then extras+="${extras:+,}$extra"; fi
done
extras=${extras:+[$extras]}
fingerprint=$(cat install.sh setup.py constraints.txt | sha256sum; echo "$version $extras")
if [[ -f "$stamp" && "$(cat "$stamp")" == "$fingerprint" ]]; then exit 0; fi

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; install its package (Debian, Ubuntu: apt-get install python$version-venv)"
echo "installing torch, then this package$extras, into .venv"
.venv/bin/python -c "import pip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null ||
    "$python" -m venv --clear .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    # without an NVIDIA driver the CPU build is enough; if its index cannot be reached, the default build
    if command -v nvidia-smi >/dev/null || [[ -e /proc/driver/nvidia ]] ||
        ! "${pip[@]}" --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null; then
        "${pip[@]}" torch
    fi
fi
"${pip[@]}" --editable ".$extras"
echo "$fingerprint" > "$stamp"
