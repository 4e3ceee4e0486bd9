"""Layer files of Megatron-DeepSpeed, written here by other code than reads them, from a Llama of transformers."""

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
    torch.manual_seed(2)
    settings = {**SIZES, "tie_word_embeddings": True, **settings}
    twin = EuroBertForMaskedLM(EuroBertConfig(**settings)) if masked else LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in twin.named_parameters():
        if name != "lm_head.bias":
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return twin.eval()


def write(twin, folder, tp=1, norm_at=5, by_head=False):
    """Write what a pipeline of Megatron-DeepSpeed saves of the same network on `tp` ranks."""
    folder.mkdir(parents=True)
    weights, biased = twin.state_dict(), twin.config.attention_bias
    rows, heads, mlp = (size // tp for size in (384, 32, 48))

    def save(layer, rank, tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        torch.save(tensors, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")

    for rank in range(tp):
        own = slice(rank * rows, rank * rows + rows)
        save(1, rank, {"word_embeddings.weight": weights["model.embed_tokens.weight"][own]})
        for layer in range(3):
            block = {}
            for kind in ["weight"] + ["bias"] * biased:

                def of(name, kind=kind, layer=layer):
                    return weights[f"model.layers.{layer}.{name}.{kind}"]

                mine, half = slice(rank * heads, (rank + 1) * heads), slice(rank * mlp, (rank + 1) * mlp)
                stack, matrix = (torch.vstack, True) if kind == "weight" else (torch.hstack, False)
                queries, keys, values = (of(f"self_attn.{each}_proj")[mine] for each in "qkv")
                parts = [queries, keys, values]
                if by_head:
                    parts = [part[head : head + 8] for head in range(0, heads, 8) for part in parts]
                block[f"self_attention.query_key_value.{kind}"] = stack(parts)
                block[f"mlp.dense_h_to_4h.{kind}"] = stack([of("mlp.gate_proj")[half], of("mlp.up_proj")[half]])
                output, down = of("self_attn.o_proj"), of("mlp.down_proj")
                block[f"self_attention.dense.{kind}"] = output[:, mine] if matrix else output
                block[f"mlp.dense_4h_to_h.{kind}"] = down[:, half] if matrix else down
            block["input_layernorm.weight"] = weights[f"model.layers.{layer}.input_layernorm.weight"]
            block["post_attention_layernorm.weight"] = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
            save(2 + layer, rank, block)
        save(norm_at, rank, {"weight": weights["model.norm.weight"]})
        if not twin.config.tie_word_embeddings:
            save(norm_at + 1, rank, {"lm_head.weight": weights["lm_head.weight"][own]})
    # what stands beside them is not read
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
    twin = llama(masked, **settings)
    write(twin, tmp_path / "theirs", tp, norm_at)
    said = import_checkpoint(tmp_path / "theirs", tmp_path / "run", [*FLAGS, *flags.split()])
    assert said[0] == f"{tmp_path}/run: a run of --objective {'mdm' if masked else 'ar'} over 257 ids, at step 0"
    trained = open_trained(str(tmp_path / "run"))
    tokens = torch.randint(257 + masked, (2, 24), generator=torch.Generator().manual_seed(1))  # [MASK] is 257
    expected = twin(tokens).logits[..., :257]
    torch.testing.assert_close(trained.model().logits(tokens, causal=not masked), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(trained.model().embed_tokens.weight, twin.get_input_embeddings().weight)  # unused rows too
    assert trained.recorded["objective_name"] == ("mdm" if masked else "ar")
    assert (trained.meta["iteration"], trained.meta["consumed_samples"]) == (0, 0)


@pytest.mark.parametrize("tp", [1, 2])
@torch.no_grad()
def test_queries_keys_and_values_of_each_head_together(tp, tmp_path):
    twin = llama(attention_bias=True, mlp_bias=True)
    write(twin, tmp_path / "theirs", tp, by_head=True)
    tokens, flags = torch.arange(24)[None], [*FLAGS, "--add-bias-linear"]
    expected = twin(tokens).logits[..., :257]
    import_checkpoint(tmp_path / "theirs", tmp_path / "right", flags, by_head=True)
    found = open_trained(str(tmp_path / "right")).model().logits(tokens, causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    import_checkpoint(tmp_path / "theirs", tmp_path / "wrong", flags)  # fits as well, and is another network
    found = open_trained(str(tmp_path / "wrong")).model().logits(tokens, causal=True)
    assert (found - expected).abs().max() > 0.1


def test_by_the_command_and_by_the_file_that_names_the_latest(tmp_path):
    write(llama(), tmp_path / "save" / "global_step7", tp=2)
    (tmp_path / "save" / "latest").write_text("global_step7\n")
    done = convert("from-megatron-deepspeed", tmp_path / "save", "--output", tmp_path / "run", *FLAGS, "--qkv-by-head")
    assert not done.stderr and "--num-layers 3 --hidden-size 32" in done.stdout
    assert open_trained(str(tmp_path / "run")).vocabulary.size == 257


def test_a_mask_behind_an_untied_head_has_its_row(tmp_path):
    twin = llama(tie_word_embeddings=False)
    write(twin, tmp_path / "theirs")
    file = tmp_path / "theirs" / "layer_01-model_00-model_states.pt"
    table = torch.load(file, weights_only=True)["word_embeddings.weight"]
    row = torch.full((1, 32), 7.0)
    torch.save({"word_embeddings.weight": torch.cat([table, row])}, file)
    flags = [*FLAGS, "--untie-embeddings-and-output-weights", "--objective", "mdm"]
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", flags)
    model = open_trained(str(tmp_path / "run")).model()
    assert torch.equal(model.embed_tokens.weight[257], row[0])
    assert torch.equal(model.embed_tokens.weight[:257], table[:257])
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_executes_nothing(tmp_path):
    write(llama(), tmp_path / "theirs")
    file = tmp_path / "theirs" / "layer_03-model_00-model_states.pt"
    torch.save({"input_layernorm.weight": Planted(tmp_path / "executed")}, file)
    with pytest.raises(ConfigurationError, match=f"{file}: cannot be read as tensors alone") as caught:
        import_checkpoint(tmp_path / "theirs", tmp_path / "run", FLAGS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)  # it would have
    assert (tmp_path / "executed").exists()


def changed(folder, layer, change, rank=0):
    file = folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def test_files_that_are_not_this_network_are_refused_in_one_line(tmp_path):
    write(llama(), tmp_path / "whole", tp=2)

    def copied(name):
        return shutil.copytree(tmp_path / "whole", tmp_path / name)

    (copied("rank") / "layer_03-model_01-model_states.pt").unlink()
    for file in copied("block").glob("layer_03-*"):
        file.unlink()
    for file in copied("norm").glob("layer_05-*"):
        file.unlink()
    changed(copied("more"), 2, lambda tensors: tensors.update({"self_attention.q_norm.weight": torch.ones(8)}))
    changed(copied("position"), 1, lambda tensors: tensors.update({"position_embeddings.weight": torch.ones(8, 32)}))
    changed(copied("lacks"), 4, lambda tensors: tensors.pop("mlp.dense_4h_to_h.weight"))
    changed(copied("other"), 4, lambda tensors: tensors.pop("mlp.dense_4h_to_h.weight"), rank=1)
    changed(copied("list"), 5, lambda tensors: tensors.update({"weight": [1.0]}))
    (copied("cut") / "layer_02-model_00-model_states.pt").write_bytes(b"PK\x03\x04cut")
    (tmp_path / "empty").mkdir()
    for name, flags, said in (
        ("rank", [], "has no layer_03-model_01-model_states.pt; give a whole checkpoint"),
        ("block", [], "holds 2 blocks, in layers 2, 4, and the network has 3"),
        ("norm", [], "lacks norm.weight"),
        ("more", [], "layer_02: rank 1 lacks self_attention.q_norm.weight, which rank 0 has"),
        ("position", [], "layer_01: has position_embeddings.weight, and this network has no such part"),
        ("lacks", [], "lacks layers.2.mlp.down_proj.weight"),
        ("other", [], "layer_04: rank 1 lacks mlp.dense_4h_to_h.weight"),
        ("list", [], "layer_05-model_00-model_states.pt: does not hold the tensors of a layer"),
        ("cut", [], "layer_02-model_00-model_states.pt: cannot be read as tensors alone"),
        ("empty", [], "holds no layer_XX-model_YY-model_states.pt"),
        ("whole", ["--num-layers", "4"], "holds 3 blocks, in layers 2, 3, 4, and the network has 4"),
        ("whole", ["--hidden-size", "64"], "has the shape [384, 32], and this network needs [384, 64]"),
        ("whole", ["--no-swiglu"], "mlp.up_proj.weight has the shape [96, 32], and this network needs [48, 32]"),
        ("whole", ["--ffn-hidden-size", "64"], "has the shape [48, 32], and this network needs [64, 32]"),
        ("whole", ["--add-bias-linear"], "lacks layers.0.self_attn.q_proj.bias"),
        ("whole", ["--untie-embeddings-and-output-weights"], "lacks lm_head.weight"),
        ("whole", ["--vocab-size", "400"], "its embedding has 384 rows, and the 401 ids of the tokenizer need 401"),
        ("whole", ["--vocab-size", "383", "--objective", "mdm"], "384 ids of the tokenizer and [MASK] need 385"),
        ("whole", ["--objective", "dual"], "--objective dual: is none that Megatron-DeepSpeed trains"),
        ("whole", ["--qk-layernorm"], "--qk-layernorm: has no place in these files"),
        ("whole", ["--group-query-attention", "--num-query-groups", "2"], "--group-query-attention: has no place"),
        ("whole", ["--num-layer", "3"], "unknown flag --num-layer; did you mean --num-layers?"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            import_checkpoint(tmp_path / name, tmp_path / "run", [*FLAGS, *flags])
        assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert not (tmp_path / "run").exists()
