#!/usr/bin/env bash
# Install into .venv. Idempotent, no login, no prompt, no compilation.
#   bash install.sh [--with-test] [--help]
set -euo pipefail
cd "$(dirname "$0")"
extras=""
for argument in "$@"; do
    case "$argument" in
        --with-test) extras="[test]" ;;
        --help) sed -n '2,3s/^# \?//p' "$0"; exit 0 ;;
        *) echo "error: install.sh $argument: unknown flag; --help lists them" >&2; exit 2 ;;
    esac
done
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: python3 is older than 3.10; install a newer one" >&2; exit 2; }
python3 -c 'import venv, ensurepip' 2>/dev/null || { echo "error: python3 has no venv module; install the package python3-venv" >&2; exit 2; }
stamp=.venv/installed$extras
wanted=$(cat setup.py constraints.txt | sha256sum)
[[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && exit 0
echo "installing into .venv: torch, then this package$extras"
[[ -x .venv/bin/python ]] || python3 -m venv .venv
pip=(.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt)
command -v c++ >/dev/null || echo "no C++ compiler is installed: training runs eager"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    # without an NVIDIA driver the CPU build is enough; where its index cannot be reached, take the default one
    if command -v nvidia-smi >/dev/null || [[ -d /proc/driver/nvidia ]] ||
        ! "${pip[@]}" --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null; then
        "${pip[@]}" torch
    fi
fi
"${pip[@]}" -e ".$extras"
echo "$wanted" > "$stamp"
