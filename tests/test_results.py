"""The tables of results that are computed from committed records: the documented command prints them."""

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
    flags = {word: words[index + 1] for index, word in enumerate(words) if word.startswith("--")}
    baseline = dict([flags.pop("--baseline").split("=")])
    sets = {"tuning": "tuning", "validation": "validation"}
    more = {name.removeprefix("--"): value for name, value in flags.items()}
    assert markdown(compare(read_table(ROOT / path), baseline, **{**sets, **more})) == printed.strip()


def test_every_record_has_a_table():
    files = {path.name for path in (ROOT / "results" / "techniques").glob("*.csv")}
    assert files and files == {Path(arguments.split()[0]).name for arguments, _ in TABLES}
