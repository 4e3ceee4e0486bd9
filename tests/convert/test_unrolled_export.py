"""A run with weight-shared loops is exported as a deeper model without loops, and that export is not its run again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megatron.convert.export import RECORD, export
from megatron.convert.import_huggingface import import_folder
from megatron.errors import ConfigurationError
from megatron.training.launcher import main
from megatron.training.load_run import open_trained

LOOPS = ["--num-layers", "3", "--num-loops", "3", "--loop-layers", "1-2"]
CLASSES = {"ar": AutoModelForCausalLM, "mdm": AutoModelForMaskedLM}


@pytest.fixture(scope="module", params=CLASSES)
def exported(request, tiny, tmp_path_factory):
    """The objective of a trained run, the run, its export, and the lines that the export prints."""
    folder = tmp_path_factory.mktemp("loops")
    main(request.param, [*tiny, *LOOPS, "--exit-interval", "2", "--save", str(folder / "run")])
    trained = open_trained(str(folder / "run"))
    return request.param, trained, folder / "exported", export(trained, folder / "exported")


@torch.no_grad()
def test_logits_of_the_unrolled_export_are_those_of_the_run(exported):
    name, trained, folder, _ = exported
    model = CLASSES[name].from_pretrained(folder)
    assert model.config.num_hidden_layers == 7
    tokens = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    logits = trained.model().eval().logits(tokens, causal=name == "ar")
    torch.testing.assert_close(model(tokens).logits[..., :257], logits, rtol=1e-5, atol=1e-5)
    first, second = model.model.layers[1], model.model.layers[3]  # block 1 in two passes
    assert torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)


def test_the_card_and_the_command_say_so(exported):
    _, _, folder, lines = exported
    sentence = (
        "The run has 3 blocks, of which 1 to 2 run 3 times with the same weights (`--num-loops`); here each use is a "
        "layer with a copy of them, 7 in all."
    )
    card = (folder / "README.md").read_text()
    assert sentence in lines and sentence in card and "7 layers of width" in card


def test_an_unrolled_export_is_not_restored(exported, tmp_path):
    _, _, folder, _ = exported
    with pytest.raises(ConfigurationError, match="is the unrolled export of a run with --num-loops 3") as caught:
        import_folder(folder, tmp_path / "run")
    assert "\n" not in str(caught.value) and f"remove {RECORD} to import 7 separate layers" in str(caught.value)
