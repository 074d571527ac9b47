"""Tiled decoding gives the image that decoding as a whole gives, in memory that does not grow with the image."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from _helpers import TOLERANCES, Source
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvae
from fastvae.compat import patch_diffusers
from fastvae.models import AE, VAE, VQVAE, VQVAE2, ImageVAE
from fastvae.models.networks import Attention
from fastvae.models.networks.vq_convolutional import ResidualBlock as VQResidualBlock
from fastvae.nn import GroupNormSiLU, NormActConv2d, RMSNormSiLU, UpsampleConv2d

# The tolerance of float32: layers add in another order in a tile than in the image.
CLOSE = {"rtol": 0, "atol": 1e-5}


def image_vae(channels=(8, 16), blocks: int = 1, **options) -> ImageVAE:
    torch.manual_seed(0)
    options = {"groups": 4, "precision": "float32", **options}
    model = ImageVAE.residual(3, channels, blocks, **options).eval()
    return with_drawn_norms(model)


def with_drawn_norms(model: nn.Module) -> nn.Module:
    """Draws the weights and biases of its normalisations, which begin as 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | RMSNormSiLU):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def of_layers(*layers: nn.Module) -> AE:
    """A model of which ``layers`` are the decoder."""
    return AE(nn.Identity(), with_drawn_norms(nn.Sequential(*layers))).eval()


def latent(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Source("cpu", dtype).normal(*shape)


@torch.no_grad()
def whole(model: nn.Module, z: Tensor) -> Tensor:
    return model.decode(z)


# Tiles against the whole.


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("tile", [4, 7, 16])
@pytest.mark.parametrize(
    ("channels", "blocks", "shape"),
    [((8,), 1, (9, 7)), ((8,), 2, (9, 7)), ((8, 16), 1, (7, 5)), ((4, 8, 16), 1, (3, 5))],
    ids=["1 level", "2 blocks", "2 levels", "3 levels"],
)
def test_tiles_equal_the_whole(channels, blocks, shape, tile, budget):
    model, z = image_vae(channels, blocks), latent(2, 4, *shape)
    image = fastvae.tiled(model).decode(z, tile, budget=budget)
    torch.testing.assert_close(image, whole(model, z), **CLOSE)
    assert image.stride() == whole(model, z).stride()


def test_tiles_of_one_pixel():
    model, z = image_vae((4,), groups=2), latent(1, 4, 5, 4)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 1, budget=0), whole(model, z), **CLOSE)


def test_an_image_of_one_tile_is_decoded_as_a_whole():
    model, z = image_vae(), latent(2, 4, 5, 7)
    for tile in (14, 512):
        assert torch.equal(fastvae.tiled(model).decode(z, tile), whole(model, z))
    assert torch.equal(fastvae.tiled(model).decode(z), whole(model, z))


def test_attention_sees_the_whole_latent_image():
    model, z = image_vae(attention=True), latent(2, 4, 6, 7)
    for budget in (0, None):
        torch.testing.assert_close(fastvae.tiled(model).decode(z, 5, budget=budget), whole(model, z), **CLOSE)


def test_attention_in_a_branch_of_a_residual_block():
    """There no map is stored for it, so each tile computes it anew."""
    torch.manual_seed(0)
    block = VQResidualBlock(4, 4)
    block.layers = nn.Sequential(nn.GroupNorm(2, 4), Attention(4, 2))
    model, z = of_layers(nn.Conv2d(4, 4, 3, padding=1), block, nn.Conv2d(4, 3, 3, padding=1)), latent(1, 4, 6, 5)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 4, budget=0), whole(model, z), **CLOSE)


@pytest.mark.parametrize("layers", [{"activation": "relu"}, {"dropout": 0.5}, {"spectral_norm": True}, {"memory": "lean"}], ids=str)
def test_options_of_the_network(layers):
    model, z = image_vae(**layers), latent(1, 4, 6, 5)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 8), whole(model, z), **CLOSE)


def test_a_mean_far_from_zero_keeps_its_digits():
    """Of the sum of squares, less that of the mean, nothing would be left."""
    norm = nn.GroupNorm(2, 8)
    z = 1e4 + latent(1, 8, 12, 12)
    image = fastvae.tiled(of_layers(nn.Identity(), norm)).decode(z, 5, budget=0)
    expected = F.group_norm(z.double(), 2, norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(image.double(), expected, rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_have_statistics_of_their_own():
    model, z = image_vae(), latent(3, 4, 6, 6) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1)
    image = fastvae.tiled(model).decode(z, 5)
    for i in range(3):
        torch.testing.assert_close(image[i : i + 1], fastvae.tiled(model).decode(z[i : i + 1], 5), **CLOSE)
    assert fastvae.tiled(model).decode(z[:0], 5).shape == (0, 3, 12, 12)


# Layers.

LAYERS = {
    "kernel 5": lambda: [nn.Conv2d(4, 6, 5, padding=2)],
    "kernel 3 x 1": lambda: [nn.Conv2d(4, 6, (3, 1), padding=(1, 0))],
    "dilation": lambda: [nn.Conv2d(4, 6, 3, padding=2, dilation=2)],
    "groups": lambda: [nn.Conv2d(4, 8, 3, padding=1, groups=4)],
    "no padding": lambda: [nn.Conv2d(4, 6, 3)],
    "valid": lambda: [nn.Conv2d(4, 6, 3, padding="valid")],
    "same": lambda: [nn.Conv2d(4, 6, (4, 3), padding="same")],
    "padding beyond the kernel": lambda: [nn.Conv2d(4, 6, 1, padding=2)],
    "transposed 4": lambda: [nn.ConvTranspose2d(4, 6, 4, 2, 1)],
    "transposed 3": lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)],
    "transposed 2": lambda: [nn.ConvTranspose2d(4, 6, 2, 2)],
    "transposed, cropped": lambda: [nn.ConvTranspose2d(4, 6, 2, 2, 1)],
    "transposed, dilated": lambda: [nn.ConvTranspose2d(4, 6, 3, 3, 2, dilation=2)],
    "transposed, stride 1": lambda: [nn.ConvTranspose2d(4, 6, 5, 1, 2)],
    "UpsampleConv2d": lambda: [UpsampleConv2d(4, 6)],
    "nearest": lambda: [nn.Upsample(scale_factor=2)],
    "nearest 2 x 3": lambda: [nn.Upsample(scale_factor=(2.0, 3.0))],
    "UpsamplingNearest2d": lambda: [nn.UpsamplingNearest2d(scale_factor=3)],
    "GroupNorm": lambda: [nn.GroupNorm(2, 4), nn.Tanh()],
    "GroupNorm without parameters": lambda: [GroupNormSiLU(2, 4, affine=False)],
    "GroupNorm and GELU": lambda: [GroupNormSiLU(2, 4, activation="gelu")],
    "GroupNorm and ReLU": lambda: [GroupNormSiLU(2, 4, activation="relu")],
    "NormActConv2d": lambda: [NormActConv2d(2, 4, 6, 3, padding=1)],
    "RMSNormSiLU": lambda: [RMSNormSiLU(4, bias=True)],
    "BatchNorm2d": lambda: [nn.BatchNorm2d(4)],
    "spectral norm": lambda: [spectral_norm(nn.Conv2d(4, 6, 3, padding=1))],
    "weight norm": lambda: [weight_norm(nn.ConvTranspose2d(4, 6, 4, 2, 1))],
    "nested": lambda: [nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Dropout2d(0.5)), nn.LeakyReLU()],
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_in_tiles_of_every_size(name):
    """Between convolutions, so that tiles begin at odd positions and at even ones, and take their halo from tiles."""
    torch.manual_seed(0)
    layers = LAYERS[name]()
    z = latent(1, 4, 6, 5)
    between = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)
    model = of_layers(*between, nn.Conv2d(between(z).shape[1], 2, 3, padding=1))
    expected = whole(model, z)
    for tile in range(1, max(expected.shape[2:])):
        torch.testing.assert_close(fastvae.tiled(model).decode(z, tile, budget=0), expected, **CLOSE)


def test_a_subclass_with_the_forward_of_its_base_is_known():
    class Drawn(nn.Conv2d):
        def reset_parameters(self):
            nn.init.normal_(self.weight)
            nn.init.zeros_(self.bias)

    model, z = of_layers(Drawn(4, 4, 3, padding=1), nn.ReLU()), latent(1, 4, 6, 5)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 4), whole(model, z), **CLOSE)


def test_an_optimized_decoder():
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)
    model, z = of_layers(*layers, nn.GroupNorm(1, 3), nn.SiLU(), nn.Conv2d(3, 3, 1)), latent(1, 4, 6, 5)
    expected = whole(model, z)
    fastvae.optimize(model, memory="lean", report=None)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 5), expected, **CLOSE)


# Models.


def test_quantized_models_take_indices():
    torch.manual_seed(0)
    model = VQVAE.conv(3, num_codes=8, dim=4, channels=8, hidden=4, blocks=1)
    indices = torch.randint(8, (2, 7, 5))
    torch.testing.assert_close(fastvae.tiled(model).decode(indices, 9), model.decode(indices), **CLOSE)
    model = VQVAE2.conv(3, num_codes=8, dim=4, channels=8, hidden=4, blocks=1)
    levels = torch.randint(8, (2, 3, 4)), torch.randint(8, (2, 6, 8))
    torch.testing.assert_close(fastvae.tiled(model).decode(levels, 9), model.decode(levels), **CLOSE)


def test_what_a_model_does_behind_its_decoder_is_done():
    torch.manual_seed(0)
    model = AE(nn.Identity(), nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)), recon_loss="bce_with_logits")
    z = latent(1, 4, 6, 5)
    torch.testing.assert_close(fastvae.tiled(model).decode(z, 3), model.decoder(z).sigmoid(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    """In 16 bits each of some twenty feature maps is rounded, in tiles as in the whole, and now and then to the other neighbour."""
    model, z = image_vae().to(dtype), latent(1, 4, 6, 7, dtype=dtype)
    image = fastvae.tiled(model).decode(z, 7, budget=0)
    assert image.dtype == dtype
    tolerance = 20 * TOLERANCES[dtype]["rtol"]
    torch.testing.assert_close(image.double(), whole(image_vae().double(), z.double()), rtol=0, atol=tolerance)


def test_the_precision_of_the_model_holds_in_tiles():
    model, z = image_vae(precision="bfloat16"), latent(1, 4, 6, 7)
    image = fastvae.tiled(model).decode(z, 7)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, whole(model, z), rtol=0, atol=20 * TOLERANCES[torch.bfloat16]["rtol"])
    assert not torch.allclose(image, whole(image_vae(), z), rtol=0, atol=1e-4)


def test_a_model_in_training_is_read():
    model, z = image_vae(dropout=0.9), latent(1, 4, 6, 5)
    expected = whole(model, z)
    model.train()
    image = fastvae.tiled(model).decode(z.requires_grad_(), 8)
    torch.testing.assert_close(image, expected, **CLOSE)
    assert not image.requires_grad
    assert all(module.training for module in model.modules())


def test_the_model_stays_as_it_is_and_is_looked_at_anew():
    model, z = image_vae(), latent(1, 4, 6, 5)
    decoder, text, tiled = model.decoder, repr(model), fastvae.tiled(model)
    tiled.decode(z, 5)
    assert model.decoder is decoder
    assert repr(model) == text
    model.decoder = image_vae(channels=(4, 8)).decoder
    torch.testing.assert_close(tiled.decode(z, 5), whole(model, z), **CLOSE)
    # A method of the instance would decode as a whole.
    model.decode = lambda z: None
    assert tiled.decode(z, 5) is not None


# Passes and memory.


class CountedConv2d(nn.Conv2d):
    calls = 0

    def _conv_forward(self, *arguments):
        self.calls += 1
        return super()._conv_forward(*arguments)


def test_a_pass_for_each_norm_and_one_for_the_image():
    first, last = CountedConv2d(4, 4, 3, padding=1), CountedConv2d(4, 3, 3, padding=1)
    model = of_layers(first, nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), GroupNormSiLU(2, 4), last)
    calls = {}
    for budget in (0, 4 * 4 * 12 * 12 - 1, 4 * 4 * 12 * 12):
        first.calls = last.calls = 0
        fastvae.tiled(model).decode(latent(1, 4, 12, 12), 6, budget=budget)
        calls[budget] = first.calls, last.calls
    # Four tiles; a map that may be stored is computed once, as a whole.
    assert list(calls.values()) == [(4 * 3, 4), (4 * 3, 4), (1, 1)]


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operators took at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def forget(_):
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def working_memory(model: nn.Module, z: Tensor, tile: int | None, **options) -> int:
    """The bytes of a decoding beside those of the image."""
    with LiveBytes() as live, torch.no_grad():
        image = model.decode(z) if tile is None else fastvae.tiled(model).decode(z, tile, **options)
    image = getattr(image, "sample", image)
    return live.peak - image.numel() * image.element_size()


def test_memory_is_flat_from_256_to_1024_pixels():
    model = image_vae((4, 8))
    tiled, plain = ([working_memory(model, latent(1, 4, n // 2, n // 2), tile) for n in (256, 1024)] for tile in (64, None))
    # The model itself copies the latent image into its memory layout.
    copied = 4 * 4 * (512**2 - 128**2)
    assert tiled[1] - tiled[0] == copied
    assert plain[1] - copied > 50 * (tiled[1] - copied)


def test_a_budget_bounds_the_feature_maps_that_are_stored():
    model, z = image_vae((4, 8)), latent(1, 4, 64, 64)
    feature_map = 4 * 8 * 64**2
    memory = [working_memory(model, z, 16, budget=budget) for budget in (0, feature_map)]
    assert memory[1] - memory[0] <= 2 * feature_map


# Errors.


class Shifted(nn.Conv2d):
    def forward(self, input):
        return super().forward(input.roll(1, -1))


UNKNOWN = [
    (nn.InstanceNorm2d(4), r"decoder\.1\.0, InstanceNorm2d.* is not known, tiled decoding takes .*Conv2d"),
    (Shifted(4, 4, 1), r"decoder\.1\.0, Shifted.* is not known"),
    (nn.Conv2d(4, 4, 3, stride=2), "makes the image smaller, takes stride 1"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode 'circular', takes 'zeros'"),
    (nn.Upsample(scale_factor=2, mode="bilinear"), "takes mode 'nearest' with an integer scale_factor"),
    (nn.Upsample(scale_factor=1.5), "takes mode 'nearest' with an integer scale_factor"),
    (nn.Upsample(size=9), "takes mode 'nearest' with an integer scale_factor"),
    (nn.BatchNorm2d(4, track_running_stats=False), "has no running statistics"),
    (RMSNormSiLU(4, dim=-1), "normalises dimension -1, takes 1"),
]


@pytest.mark.parametrize(("module", "message"), UNKNOWN, ids=[message[-25:] for _, message in UNKNOWN])
def test_a_module_that_cannot_be_tiled_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        fastvae.tiled(AE(nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(module))))


def test_hooks_and_replaced_forwards_would_see_tiles():
    for name in ("0", "1.norm1", "1.conv2", "1"):
        model = image_vae()
        handle = model.decoder.get_submodule(name).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=rf"decoder\.{name}, .* has hooks, which may look beyond a tile"):
            fastvae.tiled(model)
        handle.remove()
        tiled = fastvae.tiled(model)
        model.decoder.forward = model.decoder.forward
        with pytest.raises(ValueError, match=r"decoder, .* has a forward of its own"):
            tiled.decode(latent(1, 4, 5, 5), 4)


def test_what_is_no_image_model():
    with pytest.raises(ValueError, match="vae: got Linear, takes a module with a submodule `decoder`"):
        fastvae.tiled(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decoder\.\S+, Linear.* is not known"):
        fastvae.tiled(VAE.mlp(4, (3,), 2))
    model = of_layers(nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match=r"z: got shape \(4, 5, 5\), takes \(batch, channels, height, width\)"):
        fastvae.tiled(model).decode(latent(4, 5, 5))
    for tile in (0, 2.5, True):
        with pytest.raises(ValueError, match="tile: got"):
            fastvae.tiled(model).decode(latent(1, 4, 5, 5), tile)
    with pytest.raises(ValueError, match="budget: got -1"):
        fastvae.tiled(model).decode(latent(1, 4, 5, 5), budget=-1)


# diffusers.


def autoencoder_kl(levels: int = 2, **options) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )
    return with_drawn_norms(vae).eval()


KL_OPTIONS = [{}, {"mid_block_add_attention": False}, {"act_fn": "gelu", "use_post_quant_conv": False}, {"layers_per_block": 2}]


@pytest.mark.parametrize("options", KL_OPTIONS, ids=str)
def test_autoencoder_kl(options):
    vae, z = autoencoder_kl(**options), latent(2, 4, 9, 7)
    expected = whole(vae, z).sample
    for tile, budget in ((7, None), (10, 0)):
        result = fastvae.tiled(vae).decode(z, tile, budget=budget)
        assert type(result) is type(vae.decode(z[:, :, :2, :2]))
        torch.testing.assert_close(result.sample, expected, **CLOSE)


def test_a_block_whose_sum_is_scaled():
    vae, z = autoencoder_kl(), latent(1, 4, 6, 7)
    vae.decoder.up_blocks[1].resnets[0].output_scale_factor = 2.0
    torch.testing.assert_close(fastvae.tiled(vae).decode(z, 8).sample, whole(vae, z).sample, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"memory": "lean"}], ids=str)
def test_a_patched_autoencoder_kl(options):
    vae, z = autoencoder_kl(), latent(1, 4, 6, 7)
    expected = whole(vae, z).sample
    patch_diffusers(vae, **options)
    torch.testing.assert_close(fastvae.tiled(vae).decode(z, 8, return_dict=False)[0], expected, **CLOSE)


def test_the_tiling_of_diffusers_has_seams():
    """It is off in a tiled decoding, and on again for diffusers itself."""
    vae, z = autoencoder_kl(), latent(2, 4, 20, 20)
    expected = whole(vae, z).sample
    vae.enable_tiling()
    vae.enable_slicing()
    torch.testing.assert_close(fastvae.tiled(vae).decode(z, 16).sample, expected, **CLOSE)
    assert (whole(vae, z).sample - expected).abs().max() > 0.1


def test_memory_of_an_autoencoder_kl_grows_with_the_latent_image_alone():
    vae, memory = autoencoder_kl(3), {}
    for size in (24, 48):
        memory[size] = working_memory(vae, latent(1, 4, size, size), 32, budget=0)
    # Attention takes some feature maps of the latent's size and 16 channels.
    assert memory[48] - memory[24] <= 4 * 4 * 16 * (48**2 - 24**2)
    assert working_memory(vae, latent(1, 4, 48, 48), None) > 5 * memory[48]


def test_a_vq_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae, z = diffusers.VQModel(**blocks, norm_num_groups=4).eval(), latent(1, 3, 6, 7)
    torch.testing.assert_close(fastvae.tiled(vae).decode(z, 8).sample, whole(vae, z).sample, **CLOSE)


UNKNOWN_OF_DIFFUSERS = [
    (lambda vae: setattr(vae.decoder.up_blocks[0].resnets[0], "norm1", nn.InstanceNorm2d(16)), r"up_blocks\.0\.resnets\.0\.norm1"),
    (lambda vae: setattr(vae.decoder.mid_block.resnets[0], "time_emb_proj", nn.Linear(2, 2)), "takes a time embedding"),
    (lambda vae: setattr(vae.decoder.mid_block.resnets[0], "upsample", nn.Upsample(2)), "changes the size of the image"),
    (lambda vae: setattr(vae.decoder.up_blocks[0].upsamplers[0], "norm", nn.LayerNorm(2)), "is not an upsampling by repetition"),
]


@pytest.mark.parametrize(("change", "message"), UNKNOWN_OF_DIFFUSERS, ids=[message for _, message in UNKNOWN_OF_DIFFUSERS])
def test_a_block_of_diffusers_that_cannot_be_tiled_is_named(change, message):
    vae = autoencoder_kl()
    change(vae)
    with pytest.raises(ValueError, match=f"vae: decoder.*{message}"):
        fastvae.tiled(vae)


def test_a_block_that_optimize_has_rewritten_is_not_taken_for_its_class():
    """A norm that stays is followed by its activation there, and the other one not."""
    vae = autoencoder_kl()
    block = vae.decoder.mid_block.resnets[0]
    shared = copy.copy(vae)
    shared.again = block.norm1
    patch_diffusers(shared)
    assert type(block).__name__ == "ResnetBlock2D"
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0, ResnetBlock2D, is not known"):
        fastvae.tiled(vae)
