#!/usr/bin/env bash
# Install and run the tests: the fast tier, or with --all the slow one too. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-m "not slow and not gpu") extras=(--with-test) limit=900  # seconds
if [[ "${1:-}" == --smoke ]]; then
    select+=(tests/test_static.py tests/test_language.py tests/test_architecture.py tests/config/test_flags.py
        tests/config/test_sections.py tests/data/test_indexed.py tests/data/test_samples.py
        tests/objectives/test_contract.py tests/model/test_model.py)
    shift
elif [[ "${1:-}" == --all ]]; then
    select=(-m "not gpu") extras+=(--with-triton --with-fp8) limit=4500  # Triton's interpreter runs the CUDA kernels
    shift
fi
bash install.sh "${extras[@]}"
export OMP_NUM_THREADS=1
# Two workers, one file at a time each, so that the fixtures of a file are set up once; tests/conftest.py puts the longest
# files first. A failed test is repeated once, since most start processes that compete for two cores; the summary lists it
# as RERUN, with its first error. A worker that hangs where Python cannot raise prints its stacks and ends at `limit`.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
hanging=(-o "faulthandler_timeout=$limit" -o faulthandler_exit_on_timeout=true)
exec .venv/bin/python -m pytest -q "${workers[@]}" --reruns 1 -rfER "${hanging[@]}" "${select[@]}" "$@"
