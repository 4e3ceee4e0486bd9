"""Settings that the device does not support are refused before anything is computed."""

import pytest
import torch

from megatron.errors import ConfigurationError
from megatron.training.command_line import parse
from megatron.training.environment import prepare_device

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
