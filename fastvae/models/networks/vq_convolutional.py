"""The convolutional encoder and decoder of the VQ-VAE papers."""

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the block of van den Oord et al. (2017), section 4.1."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _residual_stack(channels: int, hidden: int, blocks: int) -> list[nn.Module]:
    return [*(ResidualBlock(channels, hidden) for _ in range(blocks)), nn.ReLU()]


def conv_encoder(in_channels: int, channels: int = 128, *, downsampling: int = 4, hidden: int = 32, blocks: int = 2) -> nn.Sequential:
    """Convolutions of stride 2 until the image is ``downsampling`` (2 or 4) times smaller, then residual blocks.

    Args:
        in_channels: channels of the image.
        channels: channels that come out.
        downsampling: 2 or 4.
        hidden: channels inside a residual block.
        blocks: residual blocks.
    """
    if downsampling not in (2, 4):
        raise ValueError(f"downsampling: got {downsampling}, takes 2 or 4")
    if downsampling == 4:
        layers = [nn.Conv2d(in_channels, channels // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(channels // 2, channels, 4, 2, 1), nn.ReLU()]
    else:
        layers = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1), *_residual_stack(channels, hidden, blocks))


def conv_decoder(
    in_channels: int, out_channels: int, channels: int = 128, *, upsampling: int = 4, hidden: int = 32, blocks: int = 2
) -> nn.Sequential:
    """The mirror image of :func:`conv_encoder`."""
    if upsampling not in (2, 4):
        raise ValueError(f"upsampling: got {upsampling}, takes 2 or 4")
    layers = [nn.Conv2d(in_channels, channels, 3, padding=1), *_residual_stack(channels, hidden, blocks)]
    if upsampling == 4:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1), nn.ReLU()]
        channels //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, out_channels, 4, 2, 1))
