#!/usr/bin/env bash
# Set up and run the tests: the fast tier, or with --all the slow one too. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-m "not slow and not gpu")
if [[ "${1:-}" == --all ]]; then select=(-m "not gpu"); shift; fi
bash install.sh --with-test
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q "${select[@]}" "$@"
