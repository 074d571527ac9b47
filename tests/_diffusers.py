"""The autoencoders of diffusers, which has to be installed, on tiny configurations: for tests and for tools/diffusers_table.py."""

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A class on a configuration.

    Args:
        cls: its name in diffusers.
        shape: of the input.
        options: of the class.
        call: what it is called with besides.
        attributes: set on the model, which offers no option for them.
        variant: tells two configurations of a class apart.
    """

    cls: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.cls} ({self.variant})" if self.variant else self.cls

    @property
    def checkpoints(self) -> bool:
        """Whether the class offers gradient checkpointing."""
        return getattr(diffusers, self.cls)._supports_gradient_checkpointing

    @property
    def keeps_float32(self) -> bool:
        """Whether parts of the class stay in float32 when the rest is loaded in another dtype."""
        return bool(getattr(diffusers, self.cls)._keep_in_fp32_modules)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**self.options)
        for name, value in self.attributes.items():
            setattr(model, name, value)
        return model

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))

    def results(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The output, and the gradients of the input and of the parameters for a random gradient of the output."""
        x = self.input().to(next(model.parameters()).dtype).requires_grad_()
        torch.manual_seed(2)
        output = model(x, **self.call).sample
        incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
        leaves = {"input": x, **dict(model.named_parameters())}
        gradients = torch.autograd.grad(output, list(leaves.values()), incoming, allow_unused=True)
        return output.detach(), dict(zip(leaves, gradients, strict=True))


IMAGE, VIDEO, LONGER_VIDEO = (1, 3, 16, 16), (1, 3, 5, 16, 16), (1, 3, 9, 16, 16)
LEVELS_2D = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 8}
STABLE_DIFFUSION = LEVELS_2D | {"block_out_channels": (16, 32)}
LATENTS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
FOUR_LEVELS = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4}
WAN = LATENTS | {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
HUNYUAN = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "spatial_compression_ratio": 2,
    "temporal_compression_ratio": 2,
}  # fmt: skip
LTX = {
    "latent_channels": 4, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False), "patch_size": 1,
}  # fmt: skip
LTX2 = {
    "latent_channels": 4, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8, 16), "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 3, "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True), "decoder_inject_noise": (False,) * 3,
    "downsample_type": ("spatial", "temporal", "conv", "conv"), "upsample_residual": (True, True), "upsample_factor": (2, 2),
    "upsample_type": ("temporal", "spatial"), "patch_size": 1,
}  # fmt: skip
DC = {
    "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}  # fmt: skip

CASES = (
    Case("AutoencoderKL", IMAGE, STABLE_DIFFUSION),
    Case("AsymmetricAutoencoderKL", IMAGE, LEVELS_2D | {"down_block_out_channels": (16, 32), "up_block_out_channels": (16, 32)}),
    Case("VQModel", IMAGE, STABLE_DIFFUSION | {"num_vq_embeddings": 16}),
    Case("AutoencoderKLFlux2", IMAGE, STABLE_DIFFUSION | {"layers_per_block": 1, "latent_channels": 4}),
    Case(
        "AutoencoderKLTemporalDecoder", (2, 3, 16, 16), {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2},
        {"num_frames": 2},
    ),
    Case("AutoencoderTiny", IMAGE, {
        "encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }),
    Case("ConsistencyDecoderVAE", IMAGE, {
        "encoder_block_out_channels": (16, 32), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2, "encoder_norm_num_groups": 8,
        "encoder_layers_per_block": 1, "decoder_block_out_channels": (16, 32), "decoder_layers_per_block": 1, "decoder_norm_num_groups": 8,
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2, "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }),
    Case("AutoencoderKLHunyuanVideo", VIDEO, FOUR_LEVELS | {"norm_num_groups": 2}),
    Case("AutoencoderKLHunyuanVideo15", VIDEO, HUNYUAN),
    Case("AutoencoderKLHunyuanImage", IMAGE, {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4,
        "spatial_compression_ratio": 2, "sample_size": 16,
    }),
    Case("AutoencoderKLHunyuanImageRefiner", VIDEO, HUNYUAN),
    # It takes tiles alone, and has no option for their sizes.
    Case(
        "AutoencoderKLAllegro", (1, 3, 8, 16, 16), FOUR_LEVELS | {"norm_num_groups": 2},
        attributes={"use_tiling": True, "kernel": (8, 16, 16), "stride": (8, 16, 16)},
    ),
    Case("AutoencoderKLCogVideoX", VIDEO, FOUR_LEVELS | {"norm_num_groups": 4}),
    Case("AutoencoderKLCosmos", LONGER_VIDEO, {
        "encoder_block_out_channels": (8, 8, 16, 16), "decode_block_out_channels": (8, 8, 16, 16), "attention_resolutions": (8,),
        "resolution": 64, "num_layers": 1, "latent_channels": 4, "spatial_compression_ratio": 4, "temporal_compression_ratio": 4,
    }),
    Case("AutoencoderKLMochi", (1, 3, 7, 16, 16), {
        "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5,
        "latent_channels": 4,
    }),
    Case("AutoencoderKLMagvit", VIDEO, {
        "block_out_channels": (8, 16), "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"), "layers_per_block": 1,
        "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"), "norm_num_groups": 4, "latent_channels": 4,
    }),
    Case("AutoencoderKLKVAE", IMAGE, {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)}),
    Case("AutoencoderKLKVAEVideo", (1, 3, 5, 8, 8), {
        "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2,
    }),
    Case("AutoencoderKLWan", VIDEO, WAN),
    Case("AutoencoderKLWan", VIDEO, WAN | {
        "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    }, variant="2.2"),
    Case("AutoencoderKLQwenImage", (1, 3, 1, 16, 16), WAN),
    Case("AutoencoderKLQwenImage21", (1, 4, 1, 16, 16), WAN | {"decoder_base_dim": 4, "temperal_downsample": [False, True, True]}),
    Case("AutoencoderKLLTXVideo", LONGER_VIDEO, LTX),
    Case(
        "AutoencoderKLLTXVideo", LONGER_VIDEO, LTX | {"timestep_conditioning": True}, {"temb": torch.tensor([0.05])},
        variant="timestep_conditioning",
    ),
    Case("AutoencoderKLLTX2Video", LONGER_VIDEO, LTX2),
    Case("AutoencoderKLLTX2Audio", (1, 2, 8, 16), {
        "base_channels": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16, "latent_channels": 2, "mel_bins": 16,
    }),
    Case("AutoencoderDC", IMAGE, DC),
    Case("AutoencoderDC", IMAGE, DC | {"decoder_conv_act_fn": "silu"}, variant="decoder_conv_act_fn=silu"),
    Case("AutoencoderKLMiniMaxH3", (1, 3, 10, 16, 16), LATENTS | {
        "latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1, "spatial_downsample_factors": (2, 1),
        "temporal_downsample_factors": (2, 1), "norm_num_groups": 4, "decoder_num_layers": 1, "decoder_num_attention_heads": 1,
        "decoder_attention_head_dim": 16, "decoder_ffn_mult": 1, "clip_length": 5, "token_drop": 1,
    }),
    Case("Kandinsky6SRVAE", VIDEO, {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "layers_per_block": 1,
        "temporal_compression_ratio": 2, "temporal_compression_start_level": 0,
    }),
)  # fmt: skip

# What the classes without a case have instead of a norm that SiLU, ReLU or GELU follows.
OTHERS = {
    "AutoencoderKLKVAEAudio": "Snake, no norms",
    "AutoencoderKLMiniMaxH3Audio": "Snake, no norms",
    "AutoencoderOobleck": "Snake, no norms",
    "AutoencoderRAE": "a transformer",
    "AutoencoderSAME": "a transformer",
    "AutoencoderVidTok": "LayerNorm and SiLU",
    "Cosmos3AVAEAudioTokenizer": "Snake, LayerNorm",
    "LTX2VideoDiffusionDecoderModel": "a transformer",
    "LongCatAudioDiTVae": "Snake, no norms",
    "MMAudioVAE": "a function that normalizes, and SiLU / 0.596",
    "MMAudioVocoder": "Snake, no norms",
    "MiniMaxMusic3Vocoder": "Snake, no norms",
    "RFD4ProteinaAutoencoder": "a transformer",
}
