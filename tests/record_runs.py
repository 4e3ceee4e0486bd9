#!/usr/bin/env python3
"""Record the bits of a fixed set of tiny runs, to compare two versions of the code on one machine.

    python tests/record_runs.py --output before.json
    python tests/record_runs.py --compare before.json

The runs cover every objective, dropout, weight averages, Muon, one and two ranks (data, tensor and pipeline parallel),
a resume, evaluation, scoring, generation and an export; about four minutes on two CPU cores. Each result is a SHA-256
of what a later tool reads: records without timings, sums by document, checkpoint shards, exported files. Only
commands are used, no module of the project, so that a renamed module changes nothing here. Last bits depend on the
machine and on PyTorch: the file is compared, never committed.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VOLATILE = ("seconds", "tokens_per_second", "mfu", "memory_bytes")
MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --fp32 --no-compile --num-workers 0"
BUDGET = "--micro-batch-size 2 --global-batch-size 8 --train-samples 93 --lr 1e-2 --init-method-std 0.1"
INTERVALS = "--log-interval 1 --eval-interval 4 --eval-samples 8 --save-interval 4"
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1 --mlp-dropout 0.1 --embedding-dropout 0.1"
RUNS = {
    "ar": "",
    "ar_dropout": f"{DROPOUT} --token-dropout 0.1 --weight-decay 0.3 --ema-decay 0.9",
    "ar_muon": "--optimizer muon --label-smoothing 0.1 --z-loss 1e-4",
    "ar_published": "--recipe published --tokenizer-type HFTokenizer",
    "mdm": "",
    "mdm_dropout": f"{DROPOUT} --mask-times iid",
    "dual": "--objective dual",
    "any_order": "--objective any-order --randmask-ratio 0.1 --stochastic-depth 0.1",
    "block_diffusion": "--objective block-diffusion",
}
TWO_RANKS = {
    "mdm_dp2": "",
    "ar_tp2": "--tensor-model-parallel-size 2",
    "mdm_pp2": "--pipeline-model-parallel-size 2",
}


def command(script: str, *arguments, ranks: int = 1) -> None:
    """Run a script of the project on one thread per rank; raises RuntimeError with its output where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, *script.split(), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def run_bits(run: Path) -> dict[str, str]:
    """Return the hash of a run's records, of its sums by document and of each of its checkpoints."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stable = [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]
    arrays = [np.load(path) for path in sorted((run / "validation").rglob("*.npz"))]
    bits = {"records": sha256(json.dumps(stable).encode())}
    bits["documents"] = sha256(*(array[name].tobytes() for array in arrays for name in sorted(array.files)))
    for checkpoint in sorted((run / "checkpoints").glob("iter_*")):
        bits[checkpoint.name] = sha256(*(path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))))
    return bits


def prepare(folder: Path) -> list[str]:
    """Write the data set and a task of lm-eval; return the data flags."""
    licence = (ROOT / "LICENSE").read_text().splitlines()
    lines = [json.dumps({"text": "\n".join(licence[start : start + 8])}) for start in range(0, len(licence), 2)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    flags = ["--output-dir", folder / "data", "--input", folder / "text.jsonl", "--splits", 80, 10, 10]
    command("tools/preprocess_data.py", *flags, "--train-tokenizer", 300)
    documents = [{"context": line.strip(), "choices": [" the Licence", " work", " of it"]} for line in licence[10:22:2]]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "choices.yaml").write_text(
        f"task: choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {folder}/choices.jsonl\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ntarget_delimiter: ''\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '0'\nmetric_list:\n  - metric: acc\n"
    )
    held_out = [f"{name}={folder}/data/{name}" for name in ("tuning", "validation")]
    return ["--train-data-path", f"{folder}/data/train", "--valid-data-path", *held_out]


def entry(name: str) -> str:
    return "pretrain_gpt.py" if name.startswith("ar") else "pretrain_mdm.py"


def record(folder: Path) -> dict[str, dict[str, str]]:
    """Train, resume, evaluate, score, generate and export below `folder`; return the hashes by name."""
    data = prepare(folder)
    common = [*MODEL.split(), *BUDGET.split(), *INTERVALS.split(), *data]
    bits = {}
    for names, ranks in ((RUNS, 1), (TWO_RANKS, 2)):
        for name, flags in names.items():
            print(name, flush=True)
            command(entry(name), *common, *flags.split(), "--save", folder / name, ranks=ranks)
            bits[name] = run_bits(folder / name)
    for name in ("ar_dropout", "mdm_dp2"):
        print(f"{name}, resumed", flush=True)
        flags = [*common, *(RUNS | TWO_RANKS)[name].split(), "--save", folder / "resumed" / name]
        ranks = 2 if name in TWO_RANKS else 1
        command(entry(name), *flags, "--exit-interval", 5, ranks=ranks)
        command(entry(name), *flags, ranks=ranks)
        bits[f"{name}, resumed"] = run_bits(folder / "resumed" / name)
    for name in ("ar", "mdm"):
        print(f"{name}: evaluation, scoring, generation, export", flush=True)
        scores, text, exported = folder / f"{name}_scores", folder / f"{name}.jsonl", folder / f"{name}_hf"
        scoring = ["--tasks", "choices", "--include_path", folder, "--output_path", scores, "--log_samples"]
        command("-m megatron.scoring.lm_eval_cli", "--pretrained", folder / name, *scoring)
        samples = [json.loads(line) for path in scores.rglob("samples_*.jsonl") for line in path.open()]
        responses = json.dumps(sorted((sample["doc_id"], sample["filtered_resps"]) for sample in samples))
        command("tools/generate.py", folder / name, "--prompt", "You may", "--max-new-tokens", 8, "--output", text)
        command("tools/convert_checkpoint.py", "to-hf", folder / name, "--output", exported)
        bits[f"{name}, downstream"] = {
            "scores": sha256(responses.encode()),
            "text": sha256(json.dumps([json.loads(line)["ids"] for line in text.open()]).encode()),
            "weights": sha256(*(path.read_bytes() for path in sorted(exported.glob("*.safetensors")))),
            "config": sha256((exported / "config.json").read_bytes()),
            "tokenizer": sha256((exported / "tokenizer.json").read_bytes()),
        }
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", type=Path, metavar="FILE", help="write the hashes")
    group.add_argument("--compare", type=Path, metavar="FILE", help="record again and compare with these hashes")
    options = parser.parse_args()
    before = json.loads(options.compare.read_text()) if options.compare else None
    with tempfile.TemporaryDirectory() as folder:
        bits = record(Path(folder))
    if before is None:
        options.output.write_text(json.dumps(bits, indent=1))
        return
    differing = [
        f"{name}: {key}"
        for name in before.keys() | bits.keys()
        for key in before.get(name, {}).keys() | bits.get(name, {}).keys()
        if before.get(name, {}).get(key) != bits.get(name, {}).get(key)
    ]
    total = sum(map(len, bits.values()))
    print("\n".join(f"DIFFERS  {line}" for line in sorted(differing)) or f"all {total} hashes are equal")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
