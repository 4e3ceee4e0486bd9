"""Settings that the device does not support are refused before anything is computed."""

import pytest
import torch

from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer
from megatron.training.command_line import parse
from megatron.training.environment import prepare_device
from megatron.training.load_run import Trained
from megatron.training.saver import Saver, folder_name
from tests.distributed import joined

NETWORK = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--bf16"]


def refusal(version: str, *flags: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        prepare_device(parse("ar", [*NETWORK, "--flash-attention", version, *flags]), torch.device("cuda"))
    assert str(caught.value).startswith(f"--flash-attention {version}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_flash_attention_is_refused_on_a_cpu():
    config = parse("ar", [*NETWORK, "--flash-attention", "FA3"])
    with pytest.raises(ConfigurationError, match="needs an NVIDIA GPU"):
        prepare_device(config, torch.device("cpu"))


@pytest.mark.parametrize("version, capability", [("FA3", (8, 0)), ("FA3", (10, 0)), ("FA4", (12, 0))])
def test_flash_attention_is_refused_on_gpus_it_has_no_kernels_for(version, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert f"compute capability {capability[0]}.x" in refusal(version)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--attention-dropout 0.1", "--attention-dropout 0.1"),
        ("--reset-attention-mask", "--reset-attention-mask"),
        ("--randmask-ratio 0.5", "--randmask-ratio 0.5"),
        ("--objective block-diffusion", "--objective block-diffusion"),
        ("--kv-channels 12", "not 12"),
    ],
)
def test_flash_attention_is_refused_beside_what_it_does_not_have(flags, word, hopper):
    assert word in refusal("FA4", *flags.split())


def test_flash_attention_that_is_not_installed_is_named(hopper):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert "flash_attn_interface" in refusal("FA3")
    assert (
        torch.backends.cuda.cudnn_sdp_enabled() == before and torch.nn.attention.current_flash_attention_impl() is None
    )


@pytest.fixture
def cudnn():
    """Enable cuDNN attention before and after the test."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    "flags, enabled",
    [
        ("", True),
        ("--attention-dropout 0.1", True),
        ("--reset-attention-mask", False),
        ("--randmask-ratio 0.5", False),
        ("--objective block-diffusion", False),
    ],
)
def test_cudnn_attention_is_off_where_batches_have_masks(flags, enabled, cudnn):
    """Its gradients under a mask tensor can be NaN."""
    prepare_device(parse("ar", [*NETWORK, *flags.split()]), torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_cudnn_attention_is_off_for_a_loaded_model(cudnn, tmp_path):
    """Scoring and generation have many shapes, and cuDNN plans each."""
    config, meta = parse("ar", NETWORK), {"iteration": 1, "permanent": False}
    weights = Transformer(config.model, Vocabulary(97)).state_dict()
    with joined() as ranks, Saver(tmp_path, ranks) as saver:
        saver.save({f"model.{name}": weight for name, weight in weights.items()}, meta, lambda: None)
    folder = tmp_path / folder_name(1)
    trained = Trained(name="", config=config, recorded={"vocabulary_size": 97}, checkpoint=folder, meta=meta)
    torch.testing.assert_close(trained.model().state_dict(), weights)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
