"""Imports of transformers folders: exports are restored bit for bit, others compute what transformers computes."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    EuroBertConfig,
    EuroBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron.convert.export import export
from megatron.convert.import_huggingface import import_folder
from megatron.data.tokenizer import train_tokenizer
from megatron.errors import ConfigurationError
from megatron.reporting.ensemble import open_members
from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.launcher import main
from megatron.training.load_run import open_trained
from tests.conftest import records
from tests.convert.conftest import convert

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=40, vocab_size=300, initializer_range=0.3)


def same_weights(first, second) -> bool:
    """Return whether two runs have equal weights."""
    states = [trained.model().state_dict() for trained in (first, second)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


# ------------------------------------------------------------------------------ round trip


def evaluation_records(objective, run, capsys, *flags) -> list[dict]:
    """Evaluate a run and return its records."""
    capsys.readouterr()  # discard what packages print at import, such as DeepSpeed with accelerate
    main(objective, ["--skip-train", "--load", str(run), *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name, objective", [("ar", "ar"), ("mdm", "mdm"), ("dual", "ar")])
def test_there_and_back(name, objective, runs, tmp_path, capsys):
    before = open_trained(str(runs / name))
    export(before, tmp_path / "hf", max_shard_size="20KB")
    if name == "ar":
        result = convert("from-hf", tmp_path / "hf", "--output", tmp_path / "back")
        assert not result.stderr and f"{tmp_path}/back: the run ar as it was at step 12" in result.stdout
    else:
        import_folder(tmp_path / "hf", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf"]
    after = open_trained(str(tmp_path / "back"))
    assert same_weights(before, after)  # [MASK] and the unused rows too
    assert {**after.recorded, "imported": None, "branched_from": None} == {**before.recorded, "imported": None}
    assert after.recorded["imported"]["iteration"] == 12 and after.recorded["imported"]["consumed_samples"] == 93
    assert (after.meta["iteration"], after.meta["consumed_samples"]) == (0, 0)
    assert after.meta["time_block"] == before.meta["time_block"]
    assert replace(after.config, checkpoint=before.config.checkpoint) == before.config
    last = [record for record in records(runs / name, "valid") if record["iteration"] == 12]
    expected = {record["set"]: record["loss"] for record in last if not record["set"].endswith(".average")}
    evaluation = evaluation_records(objective, tmp_path / "back", capsys)
    assert {record["set"]: record["loss"] for record in evaluation} == expected


def test_an_imported_run_continues_with_a_fresh_optimizer_and_joins_an_ensemble(runs, tiny, tmp_path):
    for average in (False, True):
        export(open_trained(str(runs / "ar")), tmp_path / f"hf{average}", average=average)
        import_folder(tmp_path / f"hf{average}", tmp_path / f"back{average}")
    state = {}
    for path in (tmp_path / "backTrue" / "checkpoints" / "iter_0000000").glob("*.safetensors"):
        state |= load_file(path)
    moments = [tensor for name, tensor in state.items() if name.startswith("optimizer.")]
    assert len(moments) == 2 * sum(name.startswith("model.") for name in state) and not any(map(torch.any, moments))
    averages = [name for name in state if name.startswith("average.")]
    assert averages and all(torch.equal(state[n], state[n.replace("average.", "model.")]) for n in averages)
    assert not same_weights(*(open_trained(str(tmp_path / f"back{average}")) for average in (False, True)))
    flags = [*tiny, "--ema-decay", "0.8", "--token-dropout", "0.1", "--load", str(tmp_path / "backTrue")]
    main("ar", [*flags, "--save", str(tmp_path / "longer")])
    first, *_, last = records(tmp_path / "longer", "train")
    assert (first["iteration"], first["consumed_samples"], last["consumed_samples"]) == (1, 8, 93)
    from_scratch = records(runs / "ar", "train")[0]
    assert last["loss"] < first["loss"] < from_scratch["loss"] - 0.5
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["branched_from"].endswith("iter_0000000")
    members = [str(path) for path in (runs / "ar", tmp_path / "backFalse", tmp_path / "longer")]
    assert len(open_members(members, "latest", [])) == 3
    # imported runs and their branches can be exported
    export(open_trained(str(tmp_path / "backFalse")), tmp_path / "again")
    assert f"Imported from {tmp_path}/hfFalse; the figures" in (tmp_path / "again" / "README.md").read_text()
    export(open_trained(str(tmp_path / "longer")), tmp_path / "branch")
    assert "Branched from " in (tmp_path / "branch" / "README.md").read_text()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hfFalse", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_missing_vocabulary_rows_are_initialised_and_reported(runs, tmp_path):
    before = open_trained(str(runs / "mdm"))
    export(before, tmp_path / "hf")
    (tmp_path / "hf" / "extra_rows.safetensors").unlink()
    lines = import_folder(tmp_path / "hf", tmp_path / "back")
    assert "extra_rows.safetensors is missing: vocabulary rows 258 to 383 are newly initialised" in lines
    old, new = (open_trained(str(run)).model().state_dict() for run in (runs / "mdm", tmp_path / "back"))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(old[name][:258], new[name][:258]) and not torch.equal(old[name][258:], new[name][258:])
        assert new[name][258:].std() == pytest.approx(0.02, rel=0.1)


def test_an_export_without_its_record_is_a_folder_like_any_other(runs, tmp_path):
    for name in ("ar", "mdm"):
        export(open_trained(str(runs / name)), tmp_path / name)
        (tmp_path / name / "training_run.json").unlink()
        lines = import_folder(tmp_path / name, tmp_path / f"{name}_back")
        assert lines[0].startswith(f"{tmp_path}/{name}_back: a run of --objective {name} over 257 ids, at step 0")
        old, new = (open_trained(str(run)) for run in (runs / name, tmp_path / f"{name}_back"))
        assert new.tokenizer().encode("a[MASK]<|endoftext|>") == list(b"a[MASK]<|endoftext|>")
        assert new.tokenizer().eod == 256 and new.vocabulary == old.vocabulary
        tokens = torch.arange(256)[None, :20] + 238  # [MASK] among them
        tokens = tokens if name == "mdm" else tokens - 1
        assert torch.equal(*(trained.model().logits(tokens, causal=name == "ar") for trained in (old, new)))


# -------------------------------------------------------------------------- folders that are not exports


def foreign(path, kind="llama", **settings):
    """Write a transformers folder with nontrivial parameters and return its model."""
    torch.manual_seed(5)
    families = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "eurobert": (EuroBertConfig, EuroBertForMaskedLM),
    }
    config, model = families[kind]
    reference = model(
        config(**{**SIZES, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, **settings})
    ).eval()
    for name, parameter in reference.named_parameters():
        if name != "lm_head.bias":
            parameter.data += 0.1 * torch.randn(parameter.shape)
    reference.save_pretrained(path, max_shard_size="30KB")
    return reference


def test_a_sequence_length_of_0_is_not_the_default(tmp_path):
    foreign(tmp_path / "hf", "llama")
    with pytest.raises(ConfigurationError, match="--seq-length 0: must be at least 2"):
        import_folder(tmp_path / "hf", tmp_path / "run", seq_length=0)


FOREIGN = {
    "llama": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-6),
    "llama tied": dict(tie_word_embeddings=True, head_dim=10),
    "llama biased": dict(attention_bias=True, mlp_bias=True),
    "llama large vocabulary": dict(vocab_size=384),
    "qwen3": dict(head_dim=12, tie_word_embeddings=True),
    "eurobert last": dict(mask_token_id=299, mlp_bias=True, attention_bias=True),
    "eurobert between": dict(mask_token_id=17, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", FOREIGN)
@torch.no_grad()
def test_a_folder_made_by_others_computes_the_same(name, tmp_path):
    kind, settings = name.split()[0], FOREIGN[name]
    reference = foreign(tmp_path / "hf", kind, **settings)
    lines = import_folder(tmp_path / "hf", tmp_path / "run", seq_length=24)
    trained = open_trained(str(tmp_path / "run"))
    size, mask = trained.vocabulary.size, settings.get("mask_token_id")
    assert size == (299 if mask == 299 else settings.get("vocab_size", 300))
    assert trained.config.data.seq_length == 24 and trained.recorded["objective_name"] == ("mdm" if mask else "ar")
    assert any("NullTokenizer" in line for line in lines)
    tokens = torch.randint(settings.get("vocab_size", 300), (2, 24), generator=torch.Generator().manual_seed(1))
    ours = tokens.clone()
    if mask:
        tokens[:, ::3] = mask
        ours = torch.where(tokens == mask, trained.vocabulary.mask_id, tokens)
    logits = trained.model().logits(ours, causal=not mask)
    torch.testing.assert_close(logits, reference(tokens).logits[..., :size], rtol=1e-5, atol=1e-5)
    export(trained, tmp_path / "again")
    exported = type(reference).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(exported(ours).logits[..., :size], logits, rtol=1e-5, atol=1e-5)
    assert "Data: unknown" in (tmp_path / "again" / "README.md").read_text()
    assert (mask == 17) == ("[MASK] is id 300 here: its row is that of their mask token, 17" in lines)


@torch.no_grad()
def test_old_spellings_half_precision_and_a_tokenizer(tmp_path):
    train_tokenizer(["the quick brown fox " * 3], 270, tmp_path / "tokenizer.json")
    rope = {"rope_type": "default", "rope_theta": 777.0}
    reference = foreign(tmp_path / "fp32", tie_word_embeddings=True, rope_parameters=rope)
    reference.bfloat16().save_pretrained(tmp_path / "hf")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "mlp_bias", "attention_bias", "dtype"):
        del config[name]
    config |= {"rope_theta": 777.0, "rope_scaling": None, "torch_dtype": "bfloat16", "auto_map": {"AutoModel": "x.Y"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "x.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    lines = import_folder(tmp_path / "hf", tmp_path / "run")
    trained = open_trained(str(tmp_path / "run"))
    assert trained.vocabulary.size == trained.tokenizer().vocabulary_size < 300  # their padding ids are dropped
    assert f"vocabulary rows 300 to {trained.vocabulary.padded_size - 1} are newly initialised" in lines
    assert not (tmp_path / "executed").exists()
    tokens = torch.randint(trained.vocabulary.size, (1, 30), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits[..., : trained.vocabulary.size]
    torch.testing.assert_close(trained.model().logits(tokens, causal=True), expected, rtol=1e-5, atol=1e-5)


REFUSED = {
    "model_type gpt2 cannot be imported": dict(model_type="gpt2"),
    'hidden_act "gelu"': dict(hidden_act="gelu"),
    'rope_scaling {"rope_type": "linear", "factor": 2.0}': dict(
        rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    'rope_parameters {"rope_type": "llama3"': dict(
        rope_parameters={
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        }
    ),
    'rope_scaling {"type": "dynamic", "factor": 2.0}': dict(
        rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}
    ),
    'rope_scaling {"rope_type": null, "type": "linear", "factor": 2.0}': dict(
        rope_parameters=None, rope_scaling={"rope_type": None, "type": "linear", "factor": 2.0}
    ),
    'rope_scaling {"factor": 4.0}': dict(rope_parameters=None, rope_scaling={"factor": 4.0}),
    'rope_parameters {"rope_type": "yarn"': dict(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0},
    ),
    'rope_parameters {"full_attention": {"rope_type": "default"': dict(
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5.0}}
    ),
    "rope_theta 500.0 cannot be imported: rope_parameters or rope_scaling has 10000.0": dict(rope_theta=500.0),
    "partial_rotary_factor 0.5": dict(partial_rotary_factor=0.5),
    "sliding_window 8": dict(sliding_window=8),
    "attention_bias true": dict(attention_bias=True),
    "mlp_bias true": dict(mlp_bias=True),
    "quantization_config {": dict(quantization_config={"quant_method": "x"}),
    "transformers refuses it": dict(num_hidden_layers="two"),
    "lacks layers.2.input_layernorm.weight and": dict(num_hidden_layers=3),
    "has a parameter that the model does not have: layers.1.": dict(num_hidden_layers=1),
    "mlp.gate_proj.weight has shape [48, 32], and the model needs [50, 32]": dict(intermediate_size=50),
    "embed_tokens.weight has 300 rows, and config.json has vocab_size 299": dict(vocab_size=299),
    "lm_head.weight differs from the embedding": dict(tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "hf"
    foreign(folder)
    return folder


@pytest.mark.parametrize("message", REFUSED)
def test_what_our_model_cannot_express_is_refused_by_name_and_value(message, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | REFUSED[message]))
    with pytest.raises(ConfigurationError) as caught:
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


UNSCALED = {
    "type": dict(rope_scaling={"type": "default"}),
    "rope_type": dict(rope_scaling={"rope_type": "default"}),
    "both": dict(rope_scaling={"type": "default", "rope_type": "default", "factor": 1.0}),
    "null": dict(rope_scaling=None),
    "empty": dict(rope_scaling={}),
    "linear": dict(rope_scaling={"type": "linear", "factor": 1.0}),
    "new name": dict(rope_parameters={"type": "default", "rope_theta": 500.0}),
    "new name, linear": dict(rope_parameters={"rope_type": "linear", "factor": 1, "rope_theta": 500.0}),
    "both names": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_scaling={"type": "default"}),
}


@pytest.mark.parametrize("name", UNSCALED)
@torch.no_grad()
def test_rotary_positions_that_nothing_scales_are_imported_in_every_spelling(name, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0} | UNSCALED[name]))
    import_folder(tmp_path / "hf", tmp_path / "run")
    model = open_trained(str(tmp_path / "run")).model()
    assert model.config.rotary_base == 500.0
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(model.logits(tokens, causal=True), expected, rtol=1e-5, atol=1e-5)


def test_qwen3_and_eurobert_with_what_we_lack_are_refused(tmp_path):
    foreign(tmp_path / "window", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    foreign(tmp_path / "bias", "qwen3", attention_bias=True)
    reference = foreign(tmp_path / "head", "eurobert", mlp_bias=True, attention_bias=True, mask_token_id=3)
    reference.lm_head.bias.data[5] = 1.0
    shutil.rmtree(tmp_path / "head")
    reference.save_pretrained(tmp_path / "head")
    foreign(tmp_path / "mask", "eurobert", mask_token_id=300)
    for name, message in (
        ("window", "use_sliding_window true"),
        ("bias", "attention_bias true"),
        ("head", "lm_head.bias is not zero"),
        ("mask", "mask_token_id 300 is not a row"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            import_folder(tmp_path / name, tmp_path / "run")


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_dangerous_folders(llama, runs, tmp_path):
    for name in ("bin", "outside", "cut", "config", "none"):
        shutil.copytree(llama, tmp_path / name)
    for path in (tmp_path / "bin").glob("model*"):
        path.unlink()
    torch.save({"x": Planted(tmp_path / "executed")}, tmp_path / "bin" / "pytorch_model.bin")
    index = tmp_path / "outside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../llama/model.safetensors"}}))
    first = next((tmp_path / "cut").glob("model-*"))
    os.truncate(first, first.stat().st_size // 2)
    (tmp_path / "config" / "config.json").write_text("[1")
    (tmp_path / "none" / "config.json").unlink()
    for name, message in (
        ("bin", "pytorch_model.bin is a pickle, which can execute code and is not read"),
        ("outside", "names ../llama/model.safetensors, which is not a file of this folder"),
        ("cut", f"{first.name}: cannot be read as safetensors"),
        ("config", "config.json: cannot be read as JSON"),
        ("none", "config.json: no such file; give a transformers folder"),
        ("absent", "config.json: no such file; give a transformers folder"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            import_folder(tmp_path / name, tmp_path / "run")
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()
    export(open_trained(str(runs / "ar")), tmp_path / "hf")
    record = json.loads((tmp_path / "hf" / "training_run.json").read_text())
    without_plan = {name: value for name, value in record["config"].items() if name != "plan"}
    for change, message in (
        ({"config": {}}, "training_run.json: is damaged ('vocabulary_size')"),
        ({"config": without_plan}, "training_run.json: is damaged ('plan')"),
        (
            {"config": record["config"] | {"objective_name": "mdm"}},
            "describes a LlamaForCausalLM, and training_run.json a run",
        ),
        ({"config": record["config"] | {"vocabulary_size": 200}}, "vocab_size 257 is not the 200 ids of"),
        (
            {"config": record["config"] | {"model": record["config"]["model"] | {"rotary_base": 5.0}}},
            "describe different models (rotary_base 10000.0 and 5.0)",
        ),
    ):
        (tmp_path / "hf" / "training_run.json").write_text(json.dumps(record | change))
        with pytest.raises(ConfigurationError) as caught:
            import_folder(tmp_path / "hf", tmp_path / "run")
        assert message in str(caught.value)
    with pytest.raises(ConfigurationError, match="--output .*: exists already"):
        import_folder(llama, tmp_path / "hf")
    assert CheckpointStore(tmp_path).complete() == []
