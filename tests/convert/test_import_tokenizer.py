"""Imported tokenizers: ids and end-of-document token are the same in the run and in its export."""

import json
import shutil
from dataclasses import replace

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron.convert.export import export
from megatron.convert.import_huggingface import import_folder
from megatron.convert.import_tokenizer import adopt_tokenizer
from megatron.convert.read_huggingface import read_folder
from megatron.data.tokenizer import END, HFTokenizer
from megatron.training.load_run import open_trained
from tests.convert.test_converted_tokenizer import LINES, TEXTS
from tests.convert.test_import import foreign

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]  # ids 280 to 282


def write_llama3(folder, special=LLAMA3, **config) -> dict[str, int]:
    """Write a byte-level tokenizer like Llama 3's, special tokens after 280 text tokens; return the special ids."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    library.add_special_tokens(list(special))
    begin = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], library.token_to_id(special[0]))]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    options = {"clean_up_tokenization_spaces": False, **config}
    PreTrainedTokenizerFast(tokenizer_object=library, **options).save_pretrained(folder)
    return {name: library.token_to_id(name) for name in special}


def write_fields(folder, **files):
    """Set fields in the JSON files of a folder; None removes a field."""
    for name, fields in files.items():
        path = folder / f"{name}.json"
        contents = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps({field: value for field, value in contents.items() if value is not None}))


def plain_ids(tokenizer, text: str) -> list[int]:
    """Return the ids of a text, without added tokens and with special tokens read as text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3") / "hf"
    foreign(folder, eos_token_id=281, bos_token_id=280)
    write_llama3(folder, bos_token=LLAMA3[0], eos_token=LLAMA3[1])
    return folder


ENDS = {
    "an id": ({"config": {"eos_token_id": 282}}, 282),
    "a list": ({"config": {"eos_token_id": [281, 299, 282]}}, 281),
    "a list whose first id is unknown": ({"config": {"eos_token_id": [299, 282]}}, 282),
    "generation_config": (
        {"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [282, 281]}},
        282,
    ),
    "a name": ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<|eot_id|>"}}, 282),
    "a token with options": (
        {
            "config": {"eos_token_id": None},
            "tokenizer_config": {"eos_token": {"content": "<|eot_id|>", "lstrip": False, "special": True}},
        },
        282,
    ),
    "special_tokens_map": (
        {
            "config": {"eos_token_id": None},
            "tokenizer_config": {"eos_token": None},
            "special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}},
        },
        282,
    ),
    "an id of text": ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "<|eot_id|>"}}, 282),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_document_is_the_one_that_the_folder_names(name, llama3, tmp_path):
    shutil.copytree(llama3, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    files, end = ENDS[name]
    write_fields(tmp_path / "hf", **files)
    theirs = AutoTokenizer.from_pretrained(llama3)
    tokenizer, line = adopt_tokenizer(replace(read_folder(llama3), path=tmp_path / "hf"), tmp_path)
    assert tokenizer.eod == end and line.startswith(f"{LLAMA3[end - 280]} (id {end}) ends a document: eos_token")
    for text in [*TEXTS, "".join(LLAMA3)]:
        assert tokenizer.encode(text) == plain_ids(theirs, text), text


def adopt(folder, llama3, tmp_path):
    """Return what adopt_tokenizer returns for the tokenizer in `folder`."""
    return adopt_tokenizer(replace(read_folder(llama3), path=folder), tmp_path)


def test_endoftext_ends_a_document_where_the_folder_names_no_other(llama3, tmp_path):
    for name, eos, end in (
        ("other", 282, "<|eot_id|>"),
        ("among", [282, 281], END),
        ("text", 2, END),
        ("none", None, END),
    ):
        ids = write_llama3(tmp_path / name, [LLAMA3[0], END, "<|eot_id|>"])
        write_fields(tmp_path / name, config={"eos_token_id": eos})
        tokenizer, line = adopt(tmp_path / name, llama3, tmp_path)
        assert tokenizer.eod == ids[end] and line.startswith(f"{end} (id {ids[end]}) ends a document")
        unchanged = (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / name / "tokenizer.json").read_bytes()
        assert unchanged == (end == END)  # no needless edits, so the hash still matches existing data


def test_a_tokenizer_without_an_end_is_left_out_and_the_reason_given(llama3, tmp_path):
    write_llama3(tmp_path / "none")
    write_fields(tmp_path / "none", config={"eos_token_id": 2})
    tokenizer, line = adopt(tmp_path / "none", llama3, tmp_path)
    assert tokenizer is None and not (tmp_path / "tokenizer.json").exists()
    assert f"{tmp_path}/none/tokenizer.json: has no {END}, and no special token that ends a document" in line
    assert "(eos_token_id 2 of config.json)" in line
    (tmp_path / "none" / "tokenizer.json").write_text('{"added_tokens": ["x"]}')
    tokenizer, line = adopt(tmp_path / "none", llama3, tmp_path)
    assert tokenizer is None and line == f"{tmp_path}/none/tokenizer.json: is not a tokenizer.json"
    shutil.copytree(llama3, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    lines = import_folder(tmp_path / "hf", tmp_path / "run")
    assert f"{tmp_path}/hf: has no tokenizer.json and no tokenizer.model; its 300 ids are used as they are" in lines[1]
    assert lines[1].endswith("(--tokenizer-type NullTokenizer), not eos_token_id 281")


def test_an_end_that_is_no_special_token_yet_never_comes_out_of_text(llama3, tmp_path):
    shutil.copytree(llama3, tmp_path / "hf")
    state = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = False
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(state))
    tokenizer, _ = adopt(tmp_path / "hf", llama3, tmp_path)
    assert tokenizer.eod == 281 and 281 not in tokenizer.encode("<|end_of_text|>")
    assert tokenizer.encode("<|eot_id|>") == [282]  # not special, as in the original


def test_a_llama_3_goes_to_a_run_and_back_with_its_tokenizer(llama3, tmp_path):
    theirs = AutoTokenizer.from_pretrained(llama3)
    lines = import_folder(llama3, tmp_path / "run", seq_length=24)
    assert "<|end_of_text|> (id 281) ends a document: eos_token_id 281 of config.json" in lines
    trained = open_trained(str(tmp_path / "run"))
    assert (trained.tokenizer().eod, trained.vocabulary.size) == (281, 283)
    assert (
        HFTokenizer(str(tmp_path / "run" / "tokenizer.json")).eod == 281
    )  # the same for data tokenized with this file
    export(trained, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert model.config.eos_token_id == 281
    for config in (model.generation_config, tokenizer):
        assert config.eos_token_id == config.pad_token_id == 281
    assert tokenizer.eos_token == "<|end_of_text|>" == theirs.eos_token
    assert "separated by `<|end_of_text|>`" in (tmp_path / "again" / "README.md").read_text()
    import_folder(tmp_path / "again", tmp_path / "restored")
    (tmp_path / "again" / "training_run.json").unlink()
    import_folder(tmp_path / "again", tmp_path / "adopted")
    ours = [open_trained(str(tmp_path / name)).tokenizer() for name in ("run", "restored", "adopted")]
    assert [tokenizer.eod for tokenizer in ours] == [281] * 3
    for text in [*TEXTS, "".join(LLAMA3)]:
        ids = plain_ids(theirs, text)
        assert tokenizer(text, verbose=False)["input_ids"] == ids
        assert all(tokenizer.encode(text) == ids for tokenizer in ours)


def test_a_masked_model_keeps_its_end_and_gets_its_mask(tmp_path):
    foreign(tmp_path / "hf", "eurobert", eos_token_id=281, bos_token_id=280, mask_token_id=282)
    write_llama3(tmp_path / "hf", [*LLAMA3[:2], "<|mask|>"], eos_token=LLAMA3[1], mask_token="<|mask|>")
    lines = import_folder(tmp_path / "hf", tmp_path / "run")
    assert "[MASK] is id 283 here: its row is that of their mask token, 282" in lines
    export(open_trained(str(tmp_path / "run")), tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    config = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").config
    assert tokenizer.eos_token_id == config.eos_token_id == tokenizer.pad_token_id == 281
    assert tokenizer.mask_token_id == config.mask_token_id == 283


def test_a_sentencepiece_model_alone_travels_too(tmp_path):
    foreign(tmp_path / "hf", eos_token_id=2)
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "hf" / "tokenizer"), vocab_size=280, minloglevel=2
    )
    lines = import_folder(tmp_path / "hf", tmp_path / "run")
    assert "id 2, the end-of-sentence piece of tokenizer.model, ends a document" in lines
    trained = open_trained(str(tmp_path / "run"))
    export(trained, tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.eos_token_id == trained.tokenizer().eod == 2 and trained.vocabulary.size == 280
    assert all(tokenizer(text, verbose=False)["input_ids"] == trained.tokenizer().encode(text) for text in TEXTS)
