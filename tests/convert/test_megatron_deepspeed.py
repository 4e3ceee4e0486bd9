"""Import of Megatron-DeepSpeed layer files, which an independent writer here makes from a transformers Llama."""

import os
import shutil

import pytest
import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

from megatron.convert.megatron_deepspeed import import_checkpoint
from megatron.errors import ConfigurationError
from megatron.training.load_run import open_trained
from tests.convert.conftest import convert

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(vocab_size=384, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None, eos_token_id=None)
FLAGS = "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 24".split()
FLAGS += "--tokenizer-type NullTokenizer --vocab-size 256".split()  # 257 ids


def llama(masked=False, **settings):
    """Return a transformers model with nontrivial weights."""
    torch.manual_seed(2)
    settings = {**SIZES, "tie_word_embeddings": True, **settings}
    reference = EuroBertForMaskedLM(EuroBertConfig(**settings)) if masked else LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in reference.named_parameters():
        if name != "lm_head.bias":
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return reference.eval()


def write(reference, folder, tp=1, norm_at=5, by_head=False):
    """Write what Megatron-DeepSpeed saves of the same model with a pipeline and `tp` tensor-parallel ranks."""
    folder.mkdir(parents=True)
    weights = reference.state_dict()
    kinds = ["weight", "bias"] if reference.config.attention_bias else ["weight"]
    vocabulary_rows, heads, mlp = (size // tp for size in (384, 32, 48))  # per rank

    def save(layer, rank, tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        torch.save(tensors, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")

    for rank in range(tp):
        vocabulary_shard = slice(rank * vocabulary_rows, (rank + 1) * vocabulary_rows)
        save(1, rank, {"word_embeddings.weight": weights["model.embed_tokens.weight"][vocabulary_shard]})
        for layer in range(3):
            block = {}
            for kind in kinds:

                def parameter(name, kind=kind, layer=layer):
                    return weights[f"model.layers.{layer}.{name}.{kind}"]

                head_shard = slice(rank * heads, (rank + 1) * heads)
                mlp_shard = slice(rank * mlp, (rank + 1) * mlp)
                is_matrix = kind == "weight"
                stack = torch.vstack if is_matrix else torch.hstack
                qkv = [parameter(f"self_attn.{projection}_proj")[head_shard] for projection in "qkv"]
                if by_head:
                    qkv = [projection[head : head + 8] for head in range(0, heads, 8) for projection in qkv]
                block[f"self_attention.query_key_value.{kind}"] = stack(qkv)
                gate, up = parameter("mlp.gate_proj"), parameter("mlp.up_proj")
                block[f"mlp.dense_h_to_4h.{kind}"] = stack([gate[mlp_shard], up[mlp_shard]])
                output, down = parameter("self_attn.o_proj"), parameter("mlp.down_proj")
                block[f"self_attention.dense.{kind}"] = output[:, head_shard] if is_matrix else output
                block[f"mlp.dense_4h_to_h.{kind}"] = down[:, mlp_shard] if is_matrix else down
            block["input_layernorm.weight"] = weights[f"model.layers.{layer}.input_layernorm.weight"]
            block["post_attention_layernorm.weight"] = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
            save(2 + layer, rank, block)
        save(norm_at, rank, {"weight": weights["model.norm.weight"]})
        if not reference.config.tie_word_embeddings:
            save(norm_at + 1, rank, {"lm_head.weight": weights["lm_head.weight"][vocabulary_shard]})
    # other files of the folder are not read
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"a pickle with a namespace")


@pytest.mark.parametrize(
    "tp, norm_at, masked, settings, flags",
    [
        (1, 5, False, {}, ""),
        (2, 6, False, {"tie_word_embeddings": False}, "--untie-embeddings-and-output-weights"),
        (4, 5, False, {"attention_bias": True, "mlp_bias": True}, "--add-bias-linear"),
        (1, 5, True, {}, "--objective mdm"),
        (2, 5, True, {}, "--objective mdm"),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(tp, norm_at, masked, settings, flags, tmp_path):
    reference = llama(masked, **settings)
    write(reference, tmp_path / "theirs", tp, norm_at)
    lines = import_checkpoint(tmp_path / "theirs", tmp_path / "run", [*FLAGS, *flags.split()])
    assert lines[0] == f"{tmp_path}/run: a run of --objective {'mdm' if masked else 'ar'} over 257 ids, at step 0"
    trained = open_trained(str(tmp_path / "run"))
    tokens = torch.randint(257 + masked, (2, 24), generator=torch.Generator().manual_seed(1))  # [MASK] is 257
    expected = reference(tokens).logits[..., :257]
    torch.testing.assert_close(trained.model().logits(tokens, causal=not masked), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(trained.model().embed_tokens.weight, reference.get_input_embeddings().weight)  # unused rows too
    assert trained.recorded["objective_name"] == ("mdm" if masked else "ar")
    assert (trained.meta["iteration"], trained.meta["consumed_samples"]) == (0, 0)


@pytest.mark.parametrize("tp", [1, 2])
@torch.no_grad()
def test_queries_keys_and_values_of_each_head_together(tp, tmp_path):
    reference = llama(attention_bias=True, mlp_bias=True)
    write(reference, tmp_path / "theirs", tp, by_head=True)
    tokens, flags = torch.arange(24)[None], [*FLAGS, "--add-bias-linear"]
    expected = reference(tokens).logits[..., :257]
    import_checkpoint(tmp_path / "theirs", tmp_path / "right", flags, by_head=True)
    logits = open_trained(str(tmp_path / "right")).model().logits(tokens, causal=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    import_checkpoint(tmp_path / "theirs", tmp_path / "wrong", flags)  # the shapes match, the model is another one
    logits = open_trained(str(tmp_path / "wrong")).model().logits(tokens, causal=True)
    assert (logits - expected).abs().max() > 0.1


def test_by_the_command_and_by_the_file_that_names_the_latest(tmp_path):
    write(llama(), tmp_path / "save" / "global_step7", tp=2)
    (tmp_path / "save" / "latest").write_text("global_step7\n")
    result = convert(
        "from-megatron-deepspeed", tmp_path / "save", "--output", tmp_path / "run", *FLAGS, "--qkv-by-head"
    )
    assert not result.stderr and "--num-layers 3 --hidden-size 32" in result.stdout
    assert open_trained(str(tmp_path / "run")).vocabulary.size == 257


def test_the_extra_mask_row_of_an_untied_embedding_is_used(tmp_path):
    reference = llama(tie_word_embeddings=False)
    write(reference, tmp_path / "theirs")
    file = tmp_path / "theirs" / "layer_01-model_00-model_states.pt"
    table = torch.load(file, weights_only=True)["word_embeddings.weight"]
    row = torch.full((1, 32), 7.0)
    torch.save({"word_embeddings.weight": torch.cat([table, row])}, file)
    flags = [*FLAGS, "--untie-embeddings-and-output-weights", "--objective", "mdm"]
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", flags)
    model = open_trained(str(tmp_path / "run")).model()
    assert torch.equal(model.embed_tokens.weight[257], row[0])
    assert torch.equal(model.embed_tokens.weight[:257], table[:257])
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_executes_nothing(tmp_path):
    write(llama(), tmp_path / "theirs")
    file = tmp_path / "theirs" / "layer_03-model_00-model_states.pt"
    torch.save({"input_layernorm.weight": Planted(tmp_path / "executed")}, file)
    with pytest.raises(ConfigurationError, match=f"{file}: cannot be read as tensors only") as caught:
        import_checkpoint(tmp_path / "theirs", tmp_path / "run", FLAGS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)  # the planted code does run when it is unpickled
    assert (tmp_path / "executed").exists()


def edit_layer(folder, layer, change, rank=0):
    """Apply `change` to the tensors of a layer file."""
    file = folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def test_files_that_do_not_match_the_model_are_refused_in_one_line(tmp_path):
    write(llama(), tmp_path / "complete", tp=2)

    def copy(name):
        return shutil.copytree(tmp_path / "complete", tmp_path / name)

    (copy("rank") / "layer_03-model_01-model_states.pt").unlink()
    for file in copy("block").glob("layer_03-*"):
        file.unlink()
    for file in copy("norm").glob("layer_05-*"):
        file.unlink()
    edit_layer(copy("more"), 2, lambda tensors: tensors.update({"self_attention.q_norm.weight": torch.ones(8)}))
    edit_layer(copy("position"), 1, lambda tensors: tensors.update({"position_embeddings.weight": torch.ones(8, 32)}))
    edit_layer(copy("lacks"), 4, lambda tensors: tensors.pop("mlp.dense_4h_to_h.weight"))
    edit_layer(copy("other"), 4, lambda tensors: tensors.pop("mlp.dense_4h_to_h.weight"), rank=1)
    edit_layer(copy("list"), 5, lambda tensors: tensors.update({"weight": [1.0]}))
    (copy("cut") / "layer_02-model_00-model_states.pt").write_bytes(b"PK\x03\x04cut")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unpipelined" / "global_step7").mkdir(parents=True)
    (tmp_path / "unpipelined" / "latest").write_text("global_step7")
    for name, flags, message in (
        ("rank", [], "has no layer_03-model_01-model_states.pt; give a complete checkpoint"),
        ("block", [], "holds 2 blocks, in layers 2, 4, and the model has 3"),
        ("norm", [], "lacks norm.weight"),
        ("more", [], "layer_02: rank 1 lacks self_attention.q_norm.weight, which rank 0 has"),
        ("position", [], "layer_01: has position_embeddings.weight, which this model does not have"),
        ("lacks", [], "lacks layers.2.mlp.down_proj.weight"),
        ("other", [], "layer_04: rank 1 lacks mlp.dense_4h_to_h.weight"),
        ("list", [], "layer_05-model_00-model_states.pt: does not hold the tensors of a layer"),
        ("cut", [], "layer_02-model_00-model_states.pt: cannot be read as tensors only"),
        ("empty", [], "holds no layer_XX-model_YY-model_states.pt"),
        ("unpipelined", [], "unpipelined: holds no layer_XX-model_YY-model_states.pt, and no file latest that names"),
        ("complete", ["--num-layers", "4"], "holds 3 blocks, in layers 2, 3, 4, and the model has 4"),
        ("complete", ["--hidden-size", "64"], "has shape [384, 32], and the model needs [384, 64]"),
        ("complete", ["--no-swiglu"], "mlp.up_proj.weight has shape [96, 32], and the model needs [48, 32]"),
        ("complete", ["--ffn-hidden-size", "64"], "has shape [48, 32], and the model needs [64, 32]"),
        ("complete", ["--add-bias-linear"], "lacks layers.0.self_attn.q_proj.bias"),
        ("complete", ["--untie-embeddings-and-output-weights"], "lacks lm_head.weight"),
        ("complete", ["--vocab-size", "400"], "its embedding has 384 rows, and the 401 ids of the tokenizer need 401"),
        ("complete", ["--vocab-size", "383", "--objective", "mdm"], "384 ids of the tokenizer and [MASK] need 385"),
        ("complete", ["--objective", "dual"], "that Megatron-DeepSpeed trains; give ar or mdm"),
        ("complete", ["--qk-layernorm"], "--qk-layernorm: does not exist in these files"),
        ("complete", ["--num-loops", "2"], "--num-loops 2: does not exist in these files"),
        ("complete", ["--group-query-attention", "--num-query-groups", "2"], "--group-query-attention: does not exist"),
        ("complete", ["--num-layer", "3"], "unknown flag --num-layer; did you mean --num-layers?"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            import_checkpoint(tmp_path / name, tmp_path / "run", [*FLAGS, *flags])
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert not (tmp_path / "run").exists()
