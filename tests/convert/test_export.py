"""Exports of real runs: stock classes of transformers load them and reproduce the losses that the run recorded."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from megatron.convert import export as module
from megatron.convert.card import _training
from megatron.convert.export import export
from megatron.errors import ConfigurationError
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.registry import build_objective
from megatron.training.command_line import parse
from megatron.training.datasets import open_sources
from megatron.training.launcher import main
from megatron.training.load_run import open_trained, trained_config
from tests.conftest import changed, records, run
from tests.convert.conftest import convert

BATCH = "--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --train-data-path none --seq-length 32".split()


@torch.no_grad()
def loss(model, folder, size: int = 257) -> float:
    """Return the loss of a transformers model on a run's first validation set; the softmax is over `size` ids."""
    config = trained_config(str(folder))
    data = open_sources(config).validation[0]
    objective = build_objective(config.objective, open_trained(str(folder)).vocabulary, time_block=8)
    windows = np.arange(len(data.windows))
    nats = 0.0
    count = 0
    ids = np.stack([data.windows[int(window)][0] for window in windows])  # [B, S]
    for replicate in range(1 if objective.likelihoods[0].exact else config.validation.num_mc):
        noise = EvaluationNoise(config.validation.eval_seed, data.name, replicate)
        batch = objective.likelihoods[0].evaluation(ids, noise, windows, "common")
        logits = model(batch.tokens).logits[..., :size].double().log_softmax(-1)
        nats -= float((logits.gather(-1, batch.targets[..., None])[..., 0] * batch.weights).sum())
        count += batch.count
    return nats / count


def recorded_loss(folder, name: str) -> float:
    """Return the last validation loss that a run recorded on a set."""
    return [record["loss"] for record in records(folder, "valid") if record["set"] == name][-1]


def test_an_autoregressive_run_gives_its_loss_in_plain_transformers(runs, tmp_path):
    result = convert("to-hf", runs / "ar", "--output", tmp_path / "ar", process=True)
    assert "LlamaForCausalLM, a causal language model over 257 ids in float32" in result.stdout and not result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ar")
    assert loss(model, runs / "ar") == pytest.approx(recorded_loss(runs / "ar", "tuning"), rel=1e-5)
    assert model.config.max_position_embeddings == 32 and model.config.vocab_size == 257
    generation = model.generation_config
    assert model.config.eos_token_id == generation.eos_token_id == generation.pad_token_id == 256
    model.model(torch.tensor([[256, 97]])).last_hidden_state[0, 0, 0].backward()  # without the head, which is tied
    assert model.get_input_embeddings().weight.grad[256].any()  # it learns in fine-tuning
    model.zero_grad()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ar")
    text = "na\u00efve <|endoftext|> [MASK] \U0001f600\n"
    assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer("")["input_ids"] == []
    assert tokenizer(["a", "bc"], padding=True)["input_ids"] == [[97, tokenizer.pad_token_id], [98, 99]]
    assert (tokenizer.eos_token_id, tokenizer.mask_token, len(tokenizer)) == (256, None, 257)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    generated = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= 8


def test_a_masked_diffusion_run_is_a_masked_language_model_and_no_causal_one(runs, tmp_path):
    result = convert("to-hf", runs / "mdm", "--output", tmp_path / "mdm", "--checkpoint", "best")
    folder_mode = (tmp_path / "mdm").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "mdm").iterdir()} == {folder_mode}
    assert "EuroBertForMaskedLM, a masked language model over 258 ids" in result.stdout and not result.stderr
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "mdm")
    best = json.loads((runs / "mdm" / "checkpoints" / "best.json").read_text())
    assert loss(model, runs / "mdm") == pytest.approx(best["loss"], rel=1e-5)
    assert (
        abs(loss(model, runs / "mdm", size=258) - best["loss"]) > 1e-5
    )  # the loss leaves [MASK] out, as the card says
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mdm")
    assert tokenizer.mask_token_id == model.config.mask_token_id == 257 and tokenizer.mask_token == "[MASK]"
    assert tokenizer("[MASK]")["input_ids"] == list(b"[MASK]")  # text becomes the mask token on request only
    assert tokenizer("a[MASK]", split_special_tokens=False)["input_ids"] == [97, 257]
    assert tokenizer.pad_token_id == model.config.eos_token_id == 256 and model.config.pad_token_id is None
    assert not (tmp_path / "mdm" / "generation_config.json").exists()
    with pytest.raises(ValueError, match="Unrecognized configuration class .*EuroBertConfig.* AutoModelForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mdm")


def test_the_average_and_the_causal_side_of_a_dual_run(runs, tmp_path):
    export(open_trained(str(runs / "ar")), tmp_path / "average", average=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert loss(model, runs / "ar") == pytest.approx(recorded_loss(runs / "ar", "tuning.average"), rel=1e-5)
    assert recorded_loss(runs / "ar", "tuning.average") != recorded_loss(runs / "ar", "tuning")
    card = (tmp_path / "average" / "README.md").read_text()
    assert "the average of its weights" in card and f"{recorded_loss(runs / 'ar', 'tuning.average'):.4f}" in card
    export(open_trained(str(runs / "dual")), tmp_path / "dual")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dual")
    assert loss(model, runs / "dual") == pytest.approx(recorded_loss(runs / "dual", "tuning"), rel=1e-5)
    assert "autoregressive side" in (tmp_path / "dual" / "README.md").read_text()


def test_shards_and_bf16(runs, tmp_path):
    export(open_trained(str(runs / "ar")), tmp_path / "bf16", dtype="bfloat16", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16 and len([*(tmp_path / "bf16").glob("model-*.safetensors")]) > 1
    ours = open_trained(str(runs / "ar")).model()
    assert torch.equal(model.model.embed_tokens.weight, ours.embed_tokens.weight[:257].bfloat16())
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"  # the second is the name before transformers 4.56
    extra = load_file(tmp_path / "bf16" / "extra_rows.safetensors")
    assert torch.equal(extra["embed_tokens.weight"], ours.embed_tokens.weight[257:].bfloat16())


def test_the_card_tells_what_was_trained_and_how_to_read_its_losses(runs, tmp_path):
    for name in ("ar", "mdm"):
        export(open_trained(str(runs / name)), tmp_path / name)
    ar, mdm = ((tmp_path / name / "README.md").read_text() for name in ("ar", "mdm"))
    config = json.loads((runs / "ar" / "config.json").read_text())
    front = ar.split("---")[1].split("\n")
    assert front[1:-1] == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [data-constrained, autoregressive]",
    ]
    for text in (
        config["corpus_hash"],
        f"{config['unique_tokens']:,}",
        "2,976 tokens",
        "`--token-dropout 0.1`",
        "`--ema-decay 0.8`",
        f"{6 * config['parameters'] * 2976:.3g} FLOPs",
        f"| tuning | {recorded_loss(runs / 'ar', 'tuning'):.4f} ± ",
    ):
        assert text in ar, text
    assert "≤" not in ar and "upper bound" not in ar
    assert f"| tuning | ≤ {recorded_loss(runs / 'mdm', 'tuning'):.4f} ± " in mdm and "an upper bound" in mdm
    assert "from 4 Monte-Carlo samples" in mdm and "logits[..., :257]" in mdm and "from-hf mdm" in mdm


def test_the_card_lists_every_technique_and_its_teachers(runs):
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-loops 2 --optimizer muon --teacher T "
    flags += (
        "--distill-weight 0.7 --meta-gradient-norm 0.5 --meta-gradient-style lr --lr-decay-style cyclic --lr-cycles 4"
    )
    trained = open_trained(str(runs / "ar"))
    config = replace(parse("ar", [*flags.split(), *BATCH]), data=trained.config.data)
    teacher = {"checkpoint": "/elsewhere/runs/seed_1/checkpoints/iter_20", "iteration": 20, "parameters": 5e5}
    recorded = trained.recorded | {"teachers": [teacher | {"weights": "ab12", "flops": 3e9}]}
    card = "\n".join(_training(replace(trained, config=config, recorded=recorded)))
    assert "Distilled from seed_1, step 20: 0.50M parameters, weights `ab12`, 3e+09 FLOPs" in card
    listed = card[card.index("not at their default: ") :].splitlines()[0]
    expected = "num-loops 2`, `--lr-decay-style cyclic`, `--lr-cycles 4`, `--meta-gradient-norm 0.5`, "
    assert (
        listed.endswith(f"`--{expected}`--meta-gradient-style lr`, `--distill-weight 0.7`") and "/elsewhere" not in card
    )


def test_the_code_in_the_card_of_a_masked_model_runs(runs, tmp_path, monkeypatch):
    export(open_trained(str(runs / "mdm")), tmp_path / "mdm")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (tmp_path / "mdm" / "README.md").read_text(), re.DOTALL):
        exec(block, names)
    text = b"Replace what is"
    tokens = torch.tensor([[*text, 257]])
    with torch.no_grad():
        logits = open_trained(str(runs / "mdm")).model().logits(tokens, causal=False)[0, -1]
    torch.testing.assert_close(names["probabilities"][0, -1], logits.softmax(-1))
    answers = [answer["token"] for answer in names["answers"] if answer["token"] != 257]
    assert answers == logits.topk(len(answers)).indices.tolist()


def test_what_two_processes_saved_is_exported_alike(tiny, tmp_path):
    # at a small step size, where Adam does not amplify gradients that are rounding only and differ between layouts
    short = [*tiny, "--train-samples", 24, "--lr", 1e-4]
    main("ar", [*map(str, short), "--save", str(tmp_path / "one")])
    run("ar", *short, "--save", tmp_path / "two", "--tensor-model-parallel-size", 2, processes=2)
    assert len([*(tmp_path / "two" / "checkpoints").rglob("shard-*.safetensors")]) == 2
    for name in ("one", "two"):
        export(open_trained(str(tmp_path / name)), tmp_path / f"{name}_hf")
    first, second = (load_file(tmp_path / f"{name}_hf" / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_a_run_whose_data_are_gone_is_exported_by_the_file_of_its_tokenizer(runs, tmp_path):
    moved = changed(
        runs / "ar",
        tmp_path / "run",
        data={"tokenizer_type": "HFTokenizer", "train_data_path": [f"{tmp_path}/gone/train"]},
    )
    result = convert("to-hf", moved, "--output", tmp_path / "hf", check=False)
    assert result.returncode == 2 and not (tmp_path / "hf").exists()
    assert result.stderr.startswith(
        f"error: {tmp_path}/gone/train.json: is missing or names no tokenizer, and the tokenizer of {moved}"
    )
    result = convert("to-hf", moved, "--output", tmp_path / "hf", "--tokenizer-model", tmp_path / "x", check=False)
    assert result.stderr.startswith(f"error: --tokenizer-model {tmp_path}/x: no such file")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(runs, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, "model_card", fail)  # called after all weights are written
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError) as caught:
        export(open_trained(str(runs / "ar")), tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    assert error is KeyboardInterrupt or f"--output {tmp_path}/out: could not be written" in str(caught.value)


def test_what_a_killed_export_left_is_no_hindrance(runs, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00009-of-00009.safetensors").write_text("half")
    export(open_trained(str(runs / "ar")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [*(tmp_path / "out").glob("model-0*")]


def test_what_cannot_be_exported_is_refused_in_one_line(runs, tmp_path):
    out = tmp_path / "out"
    settings = {
        "order": dict(objective={"objective": "any-order"}, objective_name="any-order"),
        "block": dict(objective={"objective": "block-diffusion"}, objective_name="block-diffusion"),
        "targets": dict(objective={"target_positions": True}),
        "ahead": dict(objective={"target_positions": True, "target_offset_max": 3}),
        "backwards": dict(objective={"right_to_left_ratio": 1.0}),
        "gelu": dict(model={"swiglu": False}),
    }
    messages = {
        "order": "--objective any-order predicts in random orders",
        "block": "--objective block-diffusion attends to each text",
        "targets": "--target-positions gives the model target positions",
        "ahead": "--target-positions gives the model target positions",
        "backwards": "--right-to-left-ratio 1.0 trained the model",
        "gelu": "--no-swiglu: the transformers classes",
    }
    for name, sections in settings.items():
        other = changed(runs / "ar", tmp_path / name, **sections)
        with pytest.raises(ConfigurationError) as caught:
            export(open_trained(other), out)
        assert messages[name] in str(caught.value) and "\n" not in str(caught.value) and not out.exists()
    mixed = changed(runs / "ar", tmp_path / "mixed", objective={"right_to_left_ratio": 0.5})
    export(open_trained(mixed), tmp_path / "mixed_hf")  # it is evaluated from left to right
    for arguments, message in (
        (dict(run=runs / "mdm", average=True), f"{runs}/mdm: holds no average"),
        (dict(run=runs / "ar", max_shard_size="5Gib"), "--max-shard-size 5Gib: is not a size"),
        (dict(run=runs / "ar", output=runs / "ar" / "config.json" / "x"), "cannot be written (Not a directory)"),
    ):
        trained = open_trained(str(arguments.pop("run")))
        output = arguments.pop("output", out)
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            export(trained, output, **arguments)
        assert not out.exists()
    result = convert("to-hf", runs / "ar", "--output", tmp_path / "mixed_hf", check=False)
    assert result.returncode == 2 and not result.stdout
    assert (
        result.stderr
        == f"error: --output {tmp_path}/mixed_hf: exists already; name a new folder, or move this one away\n"
    )
