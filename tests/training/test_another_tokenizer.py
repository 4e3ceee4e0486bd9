"""A run is continued, evaluated and distilled with the tokenizer of its training, not with another of equal size."""

import json
import sysconfig
from pathlib import Path

import pytest

from megatron.errors import ConfigurationError
from megatron.reporting.ensemble import check_data
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from megatron.training.launcher import main
from megatron.training.load_run import open_trained
from tests.conftest import run, run_python

MODEL = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --fp32 --no-compile --train-samples 16"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Path]:
    """Two texts, each with a tokenizer of its own of 300 ids."""
    folder, library = tmp_path_factory.mktemp("corpora"), Path(sysconfig.get_path("stdlib"))
    for name in ("ast", "gzip"):
        text = (library / f"{name}.py").read_text()
        lines = [json.dumps({"text": text[start : start + 1000]}) for start in range(0, 10000, 1000)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        words = ["--output-dir", folder / name, "--input", folder / f"{name}.jsonl", "--train-tokenizer", "300"]
        done = run_python("tools/preprocess_data.py", *words, "--splits", "60", "20", "20")
        assert done.returncode == 0, done.stderr
    return [folder / "ast", folder / "gzip"]


@pytest.fixture(scope="module")
def trained(corpora) -> Path:
    run("ar", *flags(corpora[0]), "--save", corpora[0] / "run")
    return corpora[0] / "run"


def flags(corpus: Path, *further) -> list[str]:
    data = ["--train-data-path", corpus / "train", "--valid-data-path", f"validation={corpus}/validation"]
    return [*MODEL.split(), *map(str, data), "--eval-samples", "4", *map(str, further)]


@pytest.mark.parametrize("flag", ["load", "teacher", "skip-train"])
def test_it_is_refused(corpora, trained, tmp_path, capsys, flag):
    use = ["--skip-train", "--load", trained] if flag == "skip-train" else [f"--{flag}", trained]
    use += ["--train-samples", 32] if flag == "load" else []
    for corpus in corpora:
        save = [] if flag == "skip-train" else ["--save", tmp_path / corpus.name]
        code = None
        try:
            main("ar", flags(corpus, *use, *save))
        except SystemExit as end:
            code = end.code
        refused = corpus != corpora[0]
        error = capsys.readouterr().err
        assert bool(code) == refused, error
        if refused:
            named = f"--{'teacher' if flag == 'teacher' else 'load'} {trained}"
            assert f"error: {named}: was trained with another tokenizer of 300 ids" in error


def test_it_is_refused_for_members_of_an_ensemble_and_for_generation(corpora, trained):
    member = open_trained(str(trained))
    message = "was trained with another tokenizer of 300 ids"
    with pytest.raises(ConfigurationError, match=message):
        check_data([member, member], open_sources(parse("ar", flags(corpora[1]))))
    assert open_trained(str(trained)).tokenizer().hash == member.recorded["tokenizer_hash"]
    elsewhere = open_trained(str(trained), flags=["--train-data-path", str(corpora[1] / "train")])
    with pytest.raises(ConfigurationError, match="is not the tokenizer of"):
        elsewhere.tokenizer()
