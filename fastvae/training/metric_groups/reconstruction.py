"""The terms of the loss, and the errors of reconstructions."""

from torch import Tensor

from fastvae._extras import extra
from fastvae.models import DenoisingAE
from fastvae.training import latents, pictures
from fastvae.training.metric_groups.base import MetricGroup, Options, Seen

with extra("metrics"):
    from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

# The side of the window of the structural similarity.
SSIM_WINDOW = 11


class LossTerms(MetricGroup):
    """The numbers of the network's output, as the training logs them."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return True

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.metrics = {name: MeanMetric() for name, value in seen.output.items() if isinstance(value, Tensor) and value.ndim == 0}

    def update(self, seen: Seen) -> None:
        for name, metric in self.metrics.items():
            metric.update(seen.output[name].double(), len(seen.x))


class Reconstruction(MetricGroup):
    """The error of reconstructions from the means of the latents, an element; of images PSNR and SSIM."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return seen.x.is_floating_point() and hasattr(seen.lit.network, "reconstruct")

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.metrics = {"MSE": MeanSquaredError(), "MAE": MeanAbsoluteError()}
        if pictures.are_images(seen.x):
            self.metrics["PSNR [dB]"] = PeakSignalNoiseRatio(data_range=(0.0, 1.0))
            if min(seen.x.shape[-2:]) >= SSIM_WINDOW:
                self.metrics["SSIM"] = StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0))

    def update(self, seen: Seen) -> None:
        with latents.looking(seen.lit) as network:
            recon = network.reconstruct(seen.x, *seen.labels)
        for metric in self.metrics.values():
            metric.update(recon.float().contiguous(), seen.x.float().contiguous())


class Denoising(MetricGroup):
    """The peak signal-to-noise ratio of corrupted images, and of what a denoising autoencoder makes of them."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return isinstance(seen.lit.network, DenoisingAE) and pictures.are_images(seen.x)

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        names = ("PSNR of corrupted images [dB]", "PSNR of denoised images [dB]")
        self.metrics = {name: PeakSignalNoiseRatio(data_range=(0.0, 1.0)) for name in names}

    def update(self, seen: Seen) -> None:
        with latents.looking(seen.lit) as network:
            corrupted = network.corruption(seen.x)
            denoised = network.denoise(corrupted)
        for metric, images in zip(self.metrics.values(), (corrupted, denoised), strict=True):
            metric.update(images.contiguous(), seen.x.contiguous())
