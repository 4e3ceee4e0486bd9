"""The tables of results that are computed from committed records: the documented command prints them."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron.sweeps.compare import compare, markdown, read_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "results" / "techniques.md"
TABLES = re.findall(
    r"^```bash\npython tools/sweep\.py compare (.*?)\n```\n\n(.*?)(?=^[^|]|\Z)", PAGE.read_text(), re.M | re.S
)


@pytest.mark.parametrize("arguments, printed", TABLES, ids=[arguments.split()[0] for arguments, _ in TABLES])
def test_a_table_follows_from_its_records(arguments, printed):
    path, *words = shlex.split(arguments)
    options = argparse.ArgumentParser()
    options.add_argument("--baseline", nargs="+")
    options.add_argument("--variants", default="*")
    options = options.parse_args(words)
    baseline = dict(setting.split("=") for setting in options.baseline)
    settings = {"tuning": "tuning", "validation": "validation", "variants": options.variants}
    assert markdown(compare(read_table(ROOT / path), baseline, **settings)) == printed.strip()


def test_every_record_has_a_table():
    files = {path.name for path in (ROOT / "results" / "techniques").glob("*.csv")}
    assert files and files == {Path(arguments.split()[0]).name for arguments, _ in TABLES}
