"""tools/generate.py on training runs: its output, its records and its one-line errors."""

import codecs
import gzip
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import zstandard

from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import ConfigurationError
from megatron.generation.generate import generate
from megatron.generation.requests import Prompt, Request, read_request
from megatron.generation.sampling import Sampling
from megatron.generation.texts import MASK_SYMBOL, visible
from megatron.training.launcher import main
from megatron.training.load_run import open_trained
from tests.conftest import ROOT, environment
from tools.convert_checkpoint import main as convert
from tools.generate import main as write
from tools.generate import work


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """An AR run with averaged weights, an MDM run, and two runs that generation does not support."""
    root = tmp_path_factory.mktemp("runs")
    main("ar", [*tiny, "--ema-decay", "0.9", "--save", str(root / "ar")])
    main("mdm", [*tiny, "--save", str(root / "mdm")])
    main("ar", [*tiny, "--objective", "any-order", "--train-samples", "8", "--save", str(root / "any")])
    main("ar", [*tiny, "--target-positions", "--train-samples", "8", "--save", str(root / "targets")])
    return root


def command(*arguments, standard_input: str | None = None) -> subprocess.CompletedProcess:
    words = list(map(str, [sys.executable, ROOT / "tools" / "generate.py", *arguments]))
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, input=standard_input)


@pytest.fixture
def written(capsys, monkeypatch):
    """Run the command in this process; return its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            write()
            code = 0
        except SystemExit as exit_info:
            code = exit_info.code
        return code, *capsys.readouterr()

    return run


def test_next_tokens_of_standard_input_and_of_a_file(runs, tmp_path, written):
    completed = command(runs / "ar", "--max-new-tokens", "10", standard_input="def main(")
    assert completed.returncode == 0, completed.stderr
    trained = open_trained(str(runs / "ar"))
    model, tokenizer = trained.model(), trained.tokenizer()
    ids = generate(model, "ar", [tokenizer.encode("def main(")], Sampling(max_new_tokens=10), eod=tokenizer.eod)[0]
    assert completed.stdout == f"def main({tokenizer.decode(ids)}\n" and completed.stderr == ""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "def f(x):\\n"}\n')
    flags = "--max-new-tokens 12 --temperature 1 --top-k 50 --top-p 0.95 --num-samples 2 --seed 7 --average".split()
    flags += ["--checkpoint", "best", "--prompt-file", tmp_path / "prompts.jsonl"]
    code, printed, errors = written(
        runs / "ar", *flags, "--output", tmp_path / "new" / "texts.jsonl", "--batch-size", "3"
    )
    assert code == 0 and not errors
    records = [json.loads(line) for line in (tmp_path / "new" / "texts.jsonl").read_text().splitlines()]
    assert not [*tmp_path.rglob("*.partial")]
    assert [(record["prompt"], record["sample"]) for record in records] == [
        *[("import ", sample) for sample in (0, 1)],
        *[("def f(x):\n", sample) for sample in (0, 1)],
    ]
    model = open_trained(str(runs / "ar"), "best").model(average=True)
    prompts = [tokenizer.encode(record["prompt"]) for record in records]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_k=50, top_p=0.95, seed=7)
    assert [record["ids"] for record in records] == generate(model, "ar", prompts, sampling, eod=tokenizer.eod)
    for record in records:
        assert record["text"] == tokenizer.decode(record["ids"])
        assert (
            record["settings"]["top_k"] == 50
            and record["settings"]["average"]
            and record["settings"]["iteration"] == 12
        )
    assert "".join(re.split(r"--- text \d of 4\n", printed)) == "".join(f"{record['whole']}\n" for record in records)
    assert len({record["text"] for record in records}) > 2


def test_gaps_are_filled_step_by_step(runs, tmp_path, written):
    flags = ["--infill", "def f(x):\n    return {{5}}\n{{3}}", "--steps", "4", "--show-steps"]
    code, printed, errors = written(runs / "mdm", *flags, "--output", tmp_path / "texts.jsonl")
    (record,) = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    steps = errors.splitlines()
    assert [step.count(MASK_SYMBOL) for step in steps] == [6, 4, 2, 0] and steps[0].startswith(
        "step    1: def f(x):\\n    "
    )
    assert printed == f"{record['text']}\n" and len(record["ids"]) == len("def f(x):\n    return \n") + 8
    first, second = record["gaps"]
    assert code == 0 and record["text"] == f"def f(x):\n    return {first}\n{second}"
    assert record["settings"]["steps"] == 4 and "max_new_tokens" not in record["settings"]
    # with --gap, braces are text
    code, printed, _ = written(runs / "mdm", "--prompt", "def {{2}}", "--gap", "4", "--suffix", "(x):")
    assert code == 0 and printed.startswith("def {{2}}") and printed.endswith("(x):\n")


def test_masked_diffusion_answers_a_prompt(runs, written):
    flags = [runs / "mdm", "--prompt", "import ", "--max-new-tokens", "12", "--temperature", "1"]
    texts = [written(*flags, *more)[1] for more in ([], ["--seed", "1"], ["--steps", "3"])]
    assert len(set(texts)) == 3 and all(text.startswith("import ") for text in texts)
    assert written(*flags)[1] == texts[0]
    errors = written(*flags, "--show-steps", "--block-length", "4", "--order", "margin")[2]
    assert errors.splitlines()[0].count(MASK_SYMBOL) == 11
    code, printed, _ = written(runs / "mdm", "--prompt", "", "--max-new-tokens", "8", "--dtype", "bfloat16")
    assert code == 0 and printed.endswith("\n")


def test_a_file_of_text_is_one_prompt_as_it_stands(runs, tmp_path, written):
    (tmp_path / "prompt.txt").write_bytes(b"def f():\r\n    x\n")
    flags = ["--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", "4"]
    assert written(runs / "ar", *flags)[1].startswith("def f():\r\n    x\n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"infill": "a{{1}}{{0}}b"}\n')
    first, second = read_request(Request(prompt_file=str(tmp_path / "lines.jsonl")))
    assert first == Prompt("a\u2028b", ("a\u2028b",), False)
    assert second == Prompt("a{{1}}{{0}}b", ("a", 1, "", 0, "b"), True)


@pytest.mark.parametrize("ending", ["", ".gz", ".GZ", ".zst"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_prompt_files_are_read_as_preprocessing_reads_text(tmp_path, mark, ending):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending.lower()]
    lines = b'{"prompt": "bo k\xc3\xa4ti"}\r\n\r\n{"prompt": "x"}'
    for name, data in (("a.txt", "bo käti\r\n".encode()), ("B.JSONL", lines), ("c", b"{}")):
        (tmp_path / f"{name}{ending}").write_bytes(compress(mark + data))
    prompts = [read_request(Request(prompt_file=f"{tmp_path}/{name}{ending}")) for name in ("a.txt", "B.JSONL", "c")]
    assert [[prompt.text for prompt in file] for file in prompts] == [["bo käti\r\n"], ["bo käti", "x"], ["{}"]]


def test_standard_input_may_begin_with_a_byte_order_mark(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"bo kati\r\n")))
    assert [prompt.text for prompt in read_request(Request())] == ["bo kati\r\n"]


def test_what_is_not_there_yet_is_shown():
    assert (
        visible([97, 257, 257, 98, 10, 99, 257], ByteTokenizer(), 257)
        == f"a{MASK_SYMBOL}{MASK_SYMBOL}b\\nc{MASK_SYMBOL}"
    )
    assert visible([257], ByteTokenizer(), 257) == MASK_SYMBOL


PROMPT = ("--prompt", "a", "--max-new-tokens", "8")
# command lines and the start of their messages; @ is a folder with the files below, capital letters are runs
REFUSED = (
    ([], "RUN: required and not given; name a folder"),
    (["@", *PROMPT], "@: holds no run and is no checkpoint"),
    (["AR", "--promt", "a"], "unknown flag --promt; did you mean --prompt?"),
    (["AR", *PROMPT, "--temperature", "warm"], "--temperature warm: is not a number"),
    (["AR", *PROMPT, "--top-k", "4"], "--top-k 4: has no effect on greedy decoding"),
    (["AR", *PROMPT, "--seed", "4"], "--seed 4: has no effect on greedy decoding; give a --temperature"),
    (["AR", *PROMPT, "--num-samples", "2"], "--num-samples 2: all would be equal"),
    (["AR", *PROMPT, "--num-samples", "0"], "--num-samples 0: must be at least 1"),
    (["AR", *PROMPT, "--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["AR", *PROMPT, "--steps", "4"], "--steps: acts in masked diffusion, and AR was trained with --objective ar"),
    (["AR", *PROMPT, "--order", "confidence"], "--order: acts in masked diffusion, and"),
    (["AR", *PROMPT, "--remask=0.0"], "--remask: acts in masked diffusion, and"),
    (["AR", *PROMPT, "--show-steps"], "--show-steps: acts in masked diffusion, and"),
    (["AR", "--infill", "a{{2}}"], "--objective ar: such a model predicts the next token"),
    (["AR", "--prompt", "a", "--gap", "2", "--suffix", "b"], "--objective ar: such a model predicts the next token"),
    (["AR", *PROMPT, "--infill", "a{{2}}"], "--prompt and --infill: both are the text to continue"),
    (["AR", *PROMPT, "--gap", "2"], "--prompt, --gap and --suffix: are given together"),
    (["MDM", "--suffix", "b", "--gap", "2"], "--prompt, --gap and --suffix: are given together"),
    (["MDM", "--prompt", "a", "--suffix", "b", "--gap", "0"], "--gap 0: must be at least 1"),
    (
        ["MDM", "--infill", "a{{2}}", "--max-new-tokens", "8"],
        "--max-new-tokens: has no effect, the gaps have their own lengths",
    ),
    (["MDM", "--infill", "a"], "--infill: a text has no gap"),
    (
        ["MDM", "--infill", "a{{32}}"],
        "--infill: a text has 33 tokens, gaps included, and this model",
    ),
    (
        ["MDM", "--infill", "a{{1}}{{99999999999999999999}}"],
        "--infill: a text has 100000000000000000000 tokens in its gaps, and this model was trained on 32",
    ),
    (["MDM", *PROMPT, "--steps", "9"], "--steps 9: is more than --max-new-tokens 8"),
    (["MDM", "--prompt", "a"], "--max-new-tokens 128: leaves no room for a prompt in the 32 tokens of --seq-length"),
    (["MDM", *PROMPT, "--show-steps", "--num-samples", "2", "--temperature", "1"], "--show-steps: shows one text"),
    (["MDM", *PROMPT, "--average"], "MDM: holds no average of its weights"),
    (["AR", *PROMPT, "--device", "tpu"], "--device tpu: is not available; this machine has cpu and 0 cuda"),
    (["AR", *PROMPT, "--device", "cuda"], "--device cuda: is not available"),
    (["AR", *PROMPT, "--device", "cuda:0"], "--device cuda:0: is not available"),
    (["AR", *PROMPT, "--device", "cuda:x"], "--device cuda:x: is not available"),
    (["AR", *PROMPT, "--dtype", "int8"], "--dtype int8: is not one of float32, bfloat16"),
    (["AR", *PROMPT, "--checkpoint", "first"], "--checkpoint first: is not one of latest, best"),
    (["ANY", *PROMPT], "--objective any-order: such a model is given the position"),
    (["TARGETS", *PROMPT], "--target-positions: such a model is given the position"),
    (["RULED", "--prompt", "", "--max-new-tokens", "8"], "--eod-mask-loss: this model was not trained to"),
    (["AR", "--prompt-file", "@/no.txt"], "--prompt-file @/no.txt: cannot be read"),
    (["AR", "--prompt-file", "@/bytes.txt"], "--prompt-file @/bytes.txt: is not UTF-8"),
    (["AR", "--prompt-file", "@/late.txt"], "--prompt-file @/late.txt: is not UTF-8"),
    (["AR", "--prompt-file", "@/half.jsonl"], "--prompt-file @/half.jsonl: line 1 is not text"),
    (
        ["AR", "--prompt-file", "@/cut.txt.gz"],
        "--prompt-file @/cut.txt.gz: is damaged or truncated",
    ),
    (["AR", "--prompt", "a\udcff"], "--prompt is not text"),
    (["MDM", "--infill", "a{{2}}\udcff"], "--infill is not text"),
    (["MDM", "--prompt", "a", "--gap", "2", "--suffix", "\udcff"], "--suffix is not text"),
    (["AR", "--prompt-file", "@/bad.jsonl"], "--prompt-file @/bad.jsonl: line 2 is neither"),
    (["AR", "--prompt-file", "@/two.jsonl"], "--prompt-file @/two.jsonl: line 1 is neither"),
    (
        ["AR", "--prompt-file", "@/broken.jsonl"],
        "--prompt-file @/broken.jsonl: line 1 is not JSON",
    ),
    (["AR", "--prompt-file", "@/none.jsonl"], "--prompt-file @/none.jsonl: has no line"),
    (
        ["MDM", "--prompt-file", "@/both.jsonl"],
        "--prompt-file @/both.jsonl: has prompts and",
    ),
)
FILES = {
    "bad.jsonl": b'{"prompt": "a"}\n{"text": "b"}\n',
    "both.jsonl": b'{"prompt": "a"}\n{"infill": "b{{2}}"}\n',
    "two.jsonl": b'{"prompt": 3}',
    "none.jsonl": b"",
    "broken.jsonl": b"{",
    "half.jsonl": b'{"prompt": "\\ud800"}',
    "bytes.txt": b"\xff\xfe",
    "late.txt": b"caf\xe9",
    "cut.txt.gz": gzip.compress(b"a prompt")[:-1],
}


@pytest.fixture(scope="module")
def refused_input(runs, tmp_path_factory):
    """Return a function that replaces @ and the names of runs in a text."""
    folder = tmp_path_factory.mktemp("refused")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    shutil.copytree(runs / "ar", folder / "ruled")
    recorded = json.loads((folder / "ruled" / "config.json").read_text())
    recorded["data"]["eod_mask_loss"] = True
    (folder / "ruled" / "config.json").write_text(json.dumps(recorded))
    paths = {name.upper(): str(runs / name) for name in ("ar", "mdm", "any", "targets")}
    paths |= {"RULED": str(folder / "ruled"), "@": str(folder)}
    return lambda text: re.sub(rf"@|\b({'|'.join(paths)})\b", lambda match: paths[match[0]], text)


@pytest.mark.parametrize("arguments, message", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_would_not_act_is_refused(arguments, message, refused_input):
    with pytest.raises(ConfigurationError) as caught:
        work([refused_input(word) for word in arguments])
    assert str(caught.value).startswith(refused_input(message)) and "\n" not in str(caught.value)


def test_standard_input_without_a_prompt_is_refused(runs, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(ConfigurationError, match="^--prompt: required and not given"):
        work([str(runs / "ar")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ConfigurationError, match="^standard input: is not UTF-8"):
        work([str(runs / "ar")])


def test_the_command_reports_a_refusal_and_exits_with_code_2(runs, written):
    code, printed, message = written(runs / "ar", *PROMPT, "--steps", "4")
    assert code == 2 and message.startswith("error: --steps: acts in masked") and not printed


@pytest.mark.parametrize("output", ["file/texts.jsonl", "."])
def test_a_file_that_cannot_be_written_is_reported_before_the_work(output, runs, tmp_path, written):
    (tmp_path / "file").write_text("")
    flags = ["--prompt", "a", "--max-new-tokens", "8", "--output", tmp_path / output]
    code, printed, message = written(runs / "ar", *flags)
    assert code == 1 and message.startswith("error: ") and "could not be written" in message and not printed


@pytest.mark.parametrize("program", [write, convert])
def test_several_processes_are_refused(program, runs, tmp_path, monkeypatch, capsys):
    """Every process would print all texts and write the same folder."""
    before, after = (["x"], ["--prompt", "x"]) if program is write else (["x", "to-hf"], [])
    output = tmp_path / "written.jsonl"
    monkeypatch.setattr(sys, "argv", [*before, str(runs / "ar"), *after, "--output", str(output)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        program()
    printed, message = capsys.readouterr()
    assert exit_info.value.code == 2 and not printed and not output.exists()
    assert message.startswith("error: WORLD_SIZE=2: this command runs in one process; start it with python, ")
    assert message.count("\n") == 1
