"""The norms of diffusers under optimize(): which stay and why, and what becomes of the others when somebody changes them."""

import copy

import pytest
import torch
from _helpers import Source
from _modules import double_input, double_output
from torch import nn
from torch.nn.utils import parametrize

import fastvae
from fastvae import functional as FV
from fastvae.nn._fused_norms import fused_activation
from fastvae.nn.optimize import examine

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosCausalGroupNorm, CosmosResnetBlock3d
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioPixelNorm
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import MiniMaxH3VideoGroupNorm
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiChunkedGroupNorm3D
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, WanRMS_norm
from diffusers.models.normalization import RMSNorm


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Subclass(WanRMS_norm):
    pass


def changed(change) -> nn.Module:
    """A residual block of whose norms the first is changed."""
    block = WanResidualBlock(8, 4)
    change(block)
    return block


def own_forward(block):
    block.norm1.forward = block.norm1.forward


def odd_gamma(block):
    block.norm1.gamma = nn.Parameter(torch.ones(2, 4, 1, 1))


LEFT = {
    "it has hooks": lambda b: b.norm1.register_forward_hook(double_output),
    "it has a forward of its own": own_forward,
    "it is parametrized": lambda b: parametrize.register_parametrization(b.norm1, "gamma", Twice()),
    "it is a Subclass and not a WanRMS_norm": lambda b: setattr(b, "norm1", Subclass(8, images=False)),
    "it has a gamma of shape (2, 4, 1, 1) and a scale of 2.82843": odd_gamma,
    "it has a gamma of shape (8, 1, 1, 1) and a scale of 1": lambda b: setattr(b.norm1, "scale", 1.0),
    "it is used in more than one place": lambda b: setattr(b, "again", b.norm1),
}


@pytest.mark.parametrize(("reason", "change"), LEFT.items(), ids=LEFT)
def test_a_norm_that_is_more_than_its_class_stays_and_the_other_does_not(reason, change):
    findings = {finding.name: finding for finding in examine(changed(change))}
    assert findings["norm1"].reason == reason
    assert findings["norm2"].followed_by == "nonlinearity"


UNFIT = {
    "it has a weight of 2 dimensions": RMSNorm((4, 4), eps=1e-6),
    "it normalizes dimension 0": LTX2AudioPixelNorm(dim=0),
    "it normalizes dimension (2, 3)": LTX2AudioPixelNorm(dim=(2, 3)),
}


@pytest.mark.parametrize(("reason", "norm"), UNFIT.items(), ids=UNFIT)
def test_a_norm_of_other_dimensions_stays(reason, norm):
    module = nn.Sequential(norm, nn.SiLU())
    kind = type(norm)
    fastvae.optimize(module, report=None)
    assert type(norm) is kind
    assert [finding.reason for finding in examine(module)] == [reason]


def test_a_norm_around_one_with_hooks_stays():
    block = CosmosResnetBlock3d(8, 8)
    block.norm1.norm.register_forward_hook(double_output)
    assert [str(finding) for finding in examine(block)] == ["left norm1: it has hooks", "fused norm2 with F.silu"]


# What is done to a block of diffusers afterwards.


def cosmos_block() -> nn.Module:
    torch.manual_seed(0)
    return CosmosResnetBlock3d(8, 8)


def wan_block() -> nn.Module:
    torch.manual_seed(0)
    return WanResidualBlock(8, 4)


def filled(shape) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, shape[0]).view(shape))


CHANGES = {
    "a new weight": (wan_block, lambda b: setattr(b.norm1, "gamma", filled((8, 1, 1, 1)))),
    "a bias": (wan_block, lambda b: setattr(b.norm1, "bias", filled((8, 1, 1, 1)))),
    "load_state_dict": (wan_block, lambda b: b.load_state_dict({k: v + 0.1 for k, v in b.state_dict().items()})),
    "a parametrized weight": (wan_block, lambda b: parametrize.register_parametrization(b.norm1, "gamma", Twice())),
    "a weight of another dtype": (wan_block, lambda b: b.norm1.bfloat16()),
    "a hook on a norm's input": (wan_block, lambda b: b.norm1.register_forward_pre_hook(double_input)),
    "a hook on a convolution": (wan_block, lambda b: b.conv1.register_forward_hook(double_output)),
    "a hook on the norm inside": (cosmos_block, lambda b: b.norm1.norm.register_forward_hook(double_output)),
    "another norm inside": (cosmos_block, lambda b: setattr(b.norm1, "norm", nn.GroupNorm(1, 8, eps=0.5))),
    "another norm": (cosmos_block, lambda b: setattr(b, "norm1", nn.InstanceNorm3d(8))),
    "no norm": (cosmos_block, lambda b: setattr(b, "norm1", nn.Identity())),
    "a norm inside that is none": (cosmos_block, lambda b: setattr(b.norm1, "norm", nn.Tanh())),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_an_optimized_block_follows_what_is_done_to_it(make, change):
    block = make()
    optimized = fastvae.optimize(copy.deepcopy(block), report=None)
    assert fused_activation(optimized.norm1) == "silu"
    change(block)
    change(optimized)
    x = Source("cpu").normal(2, 8, 3, 4, 4)
    torch.testing.assert_close(optimized(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [cosmos_block, wan_block])
def test_in_bfloat16_and_under_autocast(make):
    block, x = make(), Source("cpu").normal(2, 8, 3, 4, 4)
    expected = block(x)
    optimized = fastvae.optimize(copy.deepcopy(block), report=None)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(optimized(x).float(), expected, rtol=0.05, atol=0.05)
    output = optimized.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def test_another_activation_where_a_norm_has_one_is_named():
    block = changed(lambda b: b.norm2.register_forward_hook(double_output))
    fastvae.optimize(block, report=None)
    block.nonlinearity = nn.Tanh()
    with pytest.raises(RuntimeError, match=r"activation: got Tanh\(\), takes SiLU alone"):
        block(Source("cpu").normal(2, 8, 3, 4, 4))


def test_optimizing_twice_changes_nothing():
    for make in (cosmos_block, wan_block):
        block = fastvae.optimize(make(), report=None)
        kinds = [type(module) for module in block.modules()]
        lines = []
        fastvae.optimize(block, report=lines.append)
        assert [type(module) for module in block.modules()] == kinds
        assert lines == []


class Traced(nn.Module):
    """Code of a user around a norm of diffusers."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.norm, self.act = CosmosCausalGroupNorm(8), act

    def forward(self, x):
        return self.act(self.norm(x))


@pytest.mark.parametrize(("act", "name"), [(nn.SiLU(), "silu"), (nn.ReLU(inplace=True), "relu"), (nn.GELU(), "gelu")], ids=str)
def test_a_norm_of_diffusers_in_code_that_can_be_traced(act, name):
    module = Traced(act)
    x = Source("cpu").normal(2, 8, 3, 4, 4)
    expected = module(x)
    assert [str(finding) for finding in examine(module)] == ["fused norm with act"]
    fastvae.optimize(module, report=None)
    assert fused_activation(module.norm) == name
    torch.testing.assert_close(module(x), expected)
    module.act = nn.Tanh()
    torch.testing.assert_close(module(x), torch.tanh(CosmosCausalGroupNorm(8)(x)))


@pytest.mark.parametrize(
    "make", [lambda: CosmosCausalGroupNorm(32), lambda: MochiChunkedGroupNorm3D(32), lambda: MiniMaxH3VideoGroupNorm(8, 32)]
)
def test_frames_are_normalised_where_they_lie(make, monkeypatch):
    """Where the channels are last in memory, the frames are taken without a copy and stay so."""
    module = nn.Sequential(make(), nn.SiLU())
    x = Source("cpu").normal(2, 32, 3, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    expected = module(x)
    fastvae.optimize(module, report=None)
    seen, operator = [], FV.group_norm_silu
    monkeypatch.setattr(FV, "group_norm_silu", lambda input, *args: seen.append(input.data_ptr()) or operator(input, *args))
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert seen == [x.data_ptr()]
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
