"""The tables of results that are computed from committed records: the documented command prints them."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron.sweeps.commands import compare

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "results" / "techniques.md", ROOT / "results" / "study.md"]
BLOCK = r"^```bash\npython tools/sweep\.py compare ((?:\\\n|.)*?)\n```\n\n(.*?)(?=^[^|]|\Z)"
TABLES = [table for page in PAGES for table in re.findall(BLOCK, page.read_text(), re.M | re.S)]


@pytest.mark.parametrize("arguments, printed", TABLES, ids=[arguments.split()[0] for arguments, _ in TABLES])
def test_a_table_follows_from_its_records(arguments, printed, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = argparse.ArgumentParser()
    options.add_argument("table", type=Path)
    options.add_argument("--variants", default="*")
    for flag in ("--baseline", "--where", "--best-over"):
        options.add_argument(flag, nargs="+", default=())
    options = options.parse_args(shlex.split(arguments), argparse.Namespace(tuning="tuning", validation="validation"))
    assert compare(options) == 0
    assert capsys.readouterr().out == printed.rstrip() + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_record_has_a_table(page):
    files = {str(path.relative_to(ROOT)) for path in page.with_suffix("").glob("*.csv")}
    assert files and files <= {arguments.split()[0] for arguments, _ in TABLES}
