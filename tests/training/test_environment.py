"""What the machine cannot do is refused before anything is computed."""

import pytest
import torch

from megatron.errors import ConfigurationError
from megatron.training.command_line import parse
from megatron.training.environment import _take_flash_attention, prepare_device

NETWORK = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--flash-attention", "FA3"]


def refusal(prepare, device: str, *flags: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        prepare(parse("ar", [*NETWORK, *flags]), torch.device(device))
    assert str(caught.value).startswith("--flash-attention FA3: ")
    return str(caught.value)


def test_flash_attention_needs_what_it_runs_on():
    assert "needs an NVIDIA GPU" in refusal(prepare_device, "cpu")
    dropout = refusal(_take_flash_attention, "cuda", "--bf16", "--attention-dropout", "0.1")
    assert "has no dropout" in dropout and "--attention-dropout 0.1" in dropout


def test_flash_attention_that_is_not_installed_is_named():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert "flash_attn_interface" in refusal(_take_flash_attention, "cuda", "--bf16")
    assert (
        torch.backends.cuda.cudnn_sdp_enabled() == before and torch.nn.attention.current_flash_attention_impl() is None
    )
