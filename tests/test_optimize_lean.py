"""``fastvae.optimize(memory="lean")``: the same bits with less memory, and modules that change afterwards."""

import copy
import inspect
import pickle
import textwrap

import pytest
import torch
from _helpers import kept_bytes
from torch import nn

import fastvae
from fastvae.compat import patch_diffusers
from fastvae.nn import GroupNormSiLU


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Dropout(0.0)
    )


def relu() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))


def gelu() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.0))


def block(**options) -> nn.Module:
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    options = {"in_channels": 8, "out_channels": 16, "groups": 4, "temb_channels": None} | options
    return nn.ModuleDict({"block": resnet.ResnetBlock2D(**options)})["block"]


class BlockStep(nn.Module):
    """A residual block without a time embedding."""

    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, x):
        return self.block(x, None)


class AutoencoderStep(nn.Module):
    """An autoencoder of diffusers, from images to images."""

    def __init__(self):
        super().__init__()
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        self.vae = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **levels)

    def forward(self, x):
        return self.vae(x).sample


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [output.detach(), x.grad, *gradients]


def assert_same(actual, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


MODELS = {
    "sequential": (sequential, (2, 3, 8, 8)),
    "ReLU": (relu, (2, 3, 8, 8)),
    "GELU": (gelu, (2, 3, 8, 8)),
    "residual block": (BlockStep, (2, 8, 8, 8)),
    "autoencoder": (AutoencoderStep, (1, 3, 16, 16)),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model that is fused, one that is lean too, and a batch."""
    make, shape = MODELS[request.param]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return fastvae.optimize(make(), report=None), fastvae.optimize(make(), memory="lean", report=None), x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_bits(pair, layout, training):
    fused, lean, x = pair
    assert list(fused.state_dict()) == list(lean.state_dict())
    x = x.contiguous(memory_format=layout)
    assert_same(results(lean.train(training), x), results(fused.train(training), x))


def test_less_is_kept(pair):
    fused, lean, x = pair
    kept = [kept_bytes(lambda model=model: model(x), x, *model.parameters()) for model in (fused, lean)]
    assert kept[1] < 0.8 * kept[0]


def test_a_second_time_and_in_copies(pair):
    fused, lean, x = pair
    expected = results(fused, x)
    kinds = [type(module) for module in lean.modules()]
    fastvae.optimize(lean, memory="lean", report=None)
    assert [type(module) for module in lean.modules()] == kinds
    for twin in (lean, copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert_same(results(twin, x), expected)


def test_hooks_and_other_modules_afterwards(pair):
    fused, lean, x = pair
    for model in (fused, lean):
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        convolutions[1].register_forward_hook(lambda module, inputs, output: output * 2)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda module, inputs, output: output + 1)
        norms = [name for name, module in model.named_modules() if isinstance(module, GroupNormSiLU)]
        last = model.get_submodule(norms[-1])
        model.set_submodule(norms[-1], nn.Sequential(copy.deepcopy(last), nn.Tanh()))
    assert_same(results(lean, x), results(fused, x))


@pytest.mark.parametrize(
    ("options", "temb"),
    [({"temb_channels": 6}, True), ({"dropout": 0.5}, False), ({"up": True}, False), ({"down": True}, False)],
    ids=["time embedding", "dropout", "up", "down"],
)
def test_a_block_that_does_more_runs_its_own_code(options, temb):
    x, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 6) if temb else None
    outputs = []
    for memory in ("full", "lean"):
        model = fastvae.optimize(block(**options), memory=memory, report=None)
        torch.manual_seed(2)
        outputs.append(model(x, embedding))
    assert torch.equal(*outputs)


def test_a_block_in_evaluation_mode_drops_nothing_and_does_in_training_mode():
    x, outputs = torch.randn(2, 8, 8, 8), []
    for memory in ("full", "lean"):
        model = fastvae.optimize(block(dropout=0.5).eval(), memory=memory, report=None)
        torch.manual_seed(2)
        outputs.append((model(x, None), model.train()(x, None)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_the_report_names_what_keeps_one_input():
    lines: list[str] = []
    fastvae.optimize(sequential(), memory="lean", report=lines.append)
    assert lines == ["fused 1 with 2", "left 4: no SiLU, ReLU or GELU follows it", "1 and 3 keep one input"]
    lines.clear()
    patch_diffusers(AutoencoderStep().vae, memory="lean", report=lines.append)
    assert "encoder.down_blocks.0.resnets.0.norm1 and conv1 keep one input" in lines
    assert "decoder.conv_norm_out and conv_out keep one input" in lines


def test_an_encoder_of_another_release_stays_as_it_is(monkeypatch):
    vae = AutoencoderStep().vae
    source = textwrap.dedent(inspect.getsource(type(vae.encoder).forward)).replace("return sample", "return sample * 1.0")
    names = dict(type(vae.encoder).forward.__globals__)
    exec(source, names)
    monkeypatch.setattr(type(vae.encoder), "forward", names["forward"])
    lines: list[str] = []
    patch_diffusers(vae, memory="lean", report=lines.append)
    assert "fused encoder.conv_norm_out with conv_act" in lines
    assert not [line for line in lines if line.startswith("encoder.conv_norm_out and")]
    assert vae.encode(torch.randn(1, 3, 16, 16)).latent_dist.mean.isfinite().all()


def test_a_shortcut_keeps_no_copy():
    x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    models = [fastvae.optimize(BlockStep(), memory=memory, report=None) for memory in ("full", "lean")]
    kept = [kept_bytes(lambda model=model: model(x), x, *model.parameters()) for model in models]
    # The copy of x, and what each of the two convolutions takes.
    assert kept[0] - kept[1] == x.nbytes + x.nbytes + 2 * x.nbytes
    assert_same(*(results(model, x.detach()) for model in models))


def test_memory_takes_two_words():
    with pytest.raises(ValueError, match="memory: got 'half', takes one of 'full', 'lean'"):
        fastvae.optimize(sequential(), memory="half")
