"""The page: where sliders, uploads and images stand, and which event calls which function of the latent space."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.models.semi_supervised import UNLABELLED
from fastvae.training import pictures
from fastvae.training.errors import TrainingError
from fastvae.training.explorer import uploads
from fastvae.training.explorer.latent_space import LatentSpace

with extra("explore"):
    import gradio as gr

# Browsers blur small images when they enlarge them, unless told otherwise. The decoded image stays in sight while the sliders scroll.
CSS = """
.pixels img { image-rendering: pixelated; }
@media (min-width: 800px) { .stays { position: sticky; top: 16px; align-self: flex-start; } }
"""
# More sliders than this are a list that nobody reads.
MAX_SLIDERS, SLIDERS_IN_A_ROW = 32, 2
# The sides of pictures in pixels, up to which small images are enlarged.
IMAGE_SIDE, ROW_WIDTH, GRID_WIDTH = 336, 1200, 640
COLUMNS, SAMPLES, MOST_STEPS = 8, 64, 16
# Nothing on the page needs a file for longer, in seconds.
FILE_LIFETIME = 600

Array = np.ndarray


def look() -> dict[str, Any]:
    """The options of ``launch`` for the page's looks: fonts of the user's system, so that none is loaded."""
    return {"css": CSS, "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])}


def build(space: LatentSpace, title: str) -> gr.Blocks:
    """The page of a latent space; ``title`` is its first line."""
    with gr.Blocks(title=f"fastvae: {title}", analytics_enabled=False, delete_cache=(FILE_LIFETIME, FILE_LIFETIME)) as page:
        gr.Markdown(f"# {title}\n\n{describe(space)}")
        sliders = _sliders_tab(space, page.load)
        _samples_tab(space, page.load)
        _reconstruction_tab(space, sliders)
        _interpolation_tab(space)
        if len(space.low) == 2:
            _map_tab(space, page.load)
    return page


def describe(space: LatentSpace) -> str:
    """Which dimensions are active, in sentences."""
    channels, height, width = space.shape
    active = ", ".join(map(str, sorted(space.active))) or "none"
    return (
        f"{space.name} of {'grey' if channels == 1 else 'RGB'} images of {height} x {width} pixels. {len(space.active)} of its "
        f"{len(space.low)} latent dimensions are active: {active}. A dimension is active where the variance of its value over "
        f"{len(space.x)} test images exceeds {space.threshold:g}."
    )


def picture(images: Tensor, columns: int, side: int) -> Array:
    """Images side by side as an array ``(height, width)`` or ``(height, width, 3)`` of 8 bits, each pixel as many times as ``side``, the
    width of the picture, has room for."""
    grid = pictures.grid(images, columns, gap=0 if len(images) == 1 else 1)
    return _enlarged(grid, side)


def _enlarged(image: Tensor, side: int) -> Array:
    times = _enlargement(image.shape[-1], side)
    pixels = image.repeat_interleave(times, 1).repeat_interleave(times, 2).numpy()
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)


def _enlargement(width: int, side: int) -> int:
    return max(1, side // width)


@contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Shows what the user gave wrongly as a message on the page."""
    try:
        yield
    except TrainingError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _image(label: str, elem_id: str) -> gr.Image:
    """An image that the model made; PNG keeps each pixel as it is."""
    return gr.Image(label=label, format="png", interactive=False, buttons=["download"], elem_id=elem_id, elem_classes="pixels")


def _upload(label: str, elem_id: str) -> gr.Image:
    """A place for an image of the user, whose events get the path of its file."""
    image = gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[], height=280, elem_id=elem_id
    )
    # Gradio would open the file by any reader of Pillow, and end without a message where none can.
    image.preprocess = _path  # type: ignore[method-assign]
    return image


def _path(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _class_choice(space: LatentSpace, label: str = "Class", of_an_image: bool = False) -> list[gr.Dropdown]:
    """The choice of a class for a conditional model, nothing for every other one: a list, to be added to the inputs of an event."""
    if not space.num_classes:
        return []
    choices: list[Any] = [(str(number), number) for number in range(space.num_classes)]
    if of_an_image and space.classifies:
        choices.insert(0, ("as the model classifies the image", UNLABELLED))
    return [gr.Dropdown(choices, value=choices[0][1], label=label)]


class Sliders:
    """The sliders, the latent that they stand in, and the image of it.

    Attributes:
        latent: the whole latent, of which the sliders replace the active dimensions.
        moved: the components that a new latent changes, in the order of :meth:`at`.
    """

    def __init__(self, space: LatentSpace):
        self.space = space
        self.dimensions = space.active[:MAX_SLIDERS]
        self.latent = gr.State(space.mean.tolist())
        self.sliders: list[gr.Slider] = []
        for first in range(0, len(self.dimensions), SLIDERS_IN_A_ROW):
            with gr.Row():
                self.sliders += [self._slider(dimension) for dimension in self.dimensions[first : first + SLIDERS_IN_A_ROW]]
        self.moved: list[Any] = [self.latent, *self.sliders]

    def _slider(self, dimension: int) -> gr.Slider:
        low, high, step = slider_range(float(self.space.low[dimension]), float(self.space.high[dimension]))
        variance = float(self.space.variances[dimension])
        value = _on_a_step(float(self.space.mean[dimension]), step)
        return gr.Slider(
            low, high, value, step=step, label=f"Dimension {dimension}, variance {variance:.2g}", elem_id=f"dimension-{dimension}"
        )

    def at(self, z: Tensor) -> list[Any]:
        """The values of :attr:`moved` at a latent ``(dimensions,)``: those of the sliders' steps that are nearest."""
        return [
            z.tolist(),
            *(_nearest(slider, z[dimension].item()) for dimension, slider in zip(self.dimensions, self.sliders, strict=True)),
        ]

    def decode(self, latent: list[float], *values: Any) -> Array:
        """The image at the sliders' values, behind which the class of a conditional model stands."""
        z = torch.tensor(latent)
        z[self.dimensions] = torch.tensor([float(value) for value in values[: len(self.dimensions)]])
        return picture(self.space.decode(z[None], *values[len(self.dimensions) :]), 1, IMAGE_SIDE)


def _nearest(slider: gr.Slider, value: float) -> float:
    return _on_a_step(min(max(value, slider.minimum), slider.maximum), slider.step)


def _on_a_step(value: float, step: float) -> float:
    """The multiple of a power of ten that is nearest, without the digits of a product's rounding."""
    return round(value, -round(math.log10(step)))


def slider_range(low: float, high: float) -> tuple[float, float, float]:
    """The ends of a slider and its step: a power of ten, at least 200 of them from one end to the other, both ends multiples of it."""
    digits = math.floor(math.log10((high - low) / 200))
    step = 10.0**digits
    return _on_a_step(math.floor(low / step) * step, step), _on_a_step(math.ceil(high / step) * step, step), step


def _sliders_tab(space: LatentSpace, loaded: Callable) -> Sliders:
    with gr.Tab("Latent dimensions"), gr.Row():
        with gr.Column(scale=2, elem_classes="stays"):
            label = _class_choice(space)
            decoded = _image("Decoded", "decoded")
            with gr.Row():
                mean, test_image = gr.Button("Mean of the test images"), gr.Button("A test image")
            gr.Markdown(_about_sliders(space))
        with gr.Column(scale=3):
            sliders = Sliders(space)
    inputs = [*sliders.moved, *label]
    # A slider sends more moves than can be decoded: the last one that came during a decoding is decoded next, the others are left out.
    events: list[Callable] = [component.change for component in (*sliders.moved, *label)]
    gr.on([*events, loaded], sliders.decode, inputs, decoded, trigger_mode="always_last", show_progress="hidden", api_name="decode")
    mean.click(lambda: sliders.at(space.mean), None, sliders.moved, api_name="mean")
    test_image.click(lambda: sliders.at(random.choice(space.z)), None, sliders.moved, api_name="test_latent")
    return sliders


def _about_sliders(space: LatentSpace) -> str:
    if not space.active:
        return "No dimension is active: the model decodes every image from nearly the same latent, so there is no slider."
    text = "A slider goes from the least to the greatest value among the test images."
    if len(space.active) > MAX_SLIDERS:
        text += f" Of the active dimensions the {MAX_SLIDERS} of largest variance have one."
    if len(space.low) > min(len(space.active), MAX_SLIDERS):
        text += " The other dimensions are those of the mean, or of the image that the sliders were set to."
    return text


def _samples_tab(space: LatentSpace, loaded: Callable) -> None:
    with gr.Tab("Samples"):
        if not space.has_prior:
            gr.Markdown(f"There are no samples: {space.name} is an autoencoder without a prior from which latents could be drawn.")
            return
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            label = _class_choice(space)
            draw = gr.Button("Draw")
        samples = _image("Decoded draws from the prior", "samples")

    def sample(seed: int, *label: int) -> Array:
        return picture(space.sample(SAMPLES, seed, *label), COLUMNS, GRID_WIDTH)

    gr.on([draw.click, loaded], sample, [seed, *label], samples, api_name="sample")


def _taken_as(space: LatentSpace) -> str:
    channels, height, width = space.shape
    grey = ", and turned grey" if channels == 1 else ""
    return (
        f"An uploaded image is resized to cover {height} x {width} pixels, its centre is cut out{grey}. "
        f"It has at most {uploads.MAX_PIXELS} pixels and comes as {', '.join(uploads.FORMATS)}."
    )


def _read(space: LatentSpace, path: str) -> Tensor:
    with errors_on_the_page():
        return space.as_samples(uploads.read(Path(path), space.shape))


def _reconstruction_tab(space: LatentSpace, sliders: Sliders) -> None:
    with gr.Tab("Reconstruction"):
        gr.Markdown(_taken_as(space))
        with gr.Row():
            with gr.Column():
                uploaded = _upload("Your image", "upload")
                label = _class_choice(space, of_an_image=True)
                test_image = gr.Button("A test image")
            taken, recon = _image("As the model takes it", "taken"), _image("Reconstruction", "reconstruction")
        to_sliders = gr.Button("Set the sliders to this image", interactive=False, elem_id="to-sliders")
    z = gr.State(space.mean.tolist())
    shown = [taken, recon, z, to_sliders]

    def show(x: Tensor, *label: int) -> list[Any]:
        images = (picture(image, 1, IMAGE_SIDE) for image in (x, space.reconstruct(x, *label)))
        return [*images, space.encode(x, *label)[0].tolist(), gr.Button(interactive=True)]

    def show_upload(path: str | None, *label: int) -> list[Any]:
        return [gr.skip() for _ in shown] if path is None else show(_read(space, path), *label)

    def show_test_image() -> list[Any]:
        x, label = _random_sample(space)
        return [*show(x, *label), None, *label]

    gr.on([uploaded.upload, *(choice.input for choice in label)], show_upload, [uploaded, *label], shown, api_name="reconstruct")
    test_image.click(show_test_image, None, [*shown, uploaded, *label], api_name="reconstruct_test_image")
    to_sliders.click(lambda z: sliders.at(torch.tensor(z)), z, sliders.moved, api_name="set_sliders")


def _random_sample(space: LatentSpace) -> tuple[Tensor, tuple[int, ...]]:
    """A test image as a batch of one, and its class where the model takes one."""
    index = random.randrange(len(space.x))
    return space.x[index : index + 1], tuple(int(label[index]) for label in space.labels)


def _interpolation_tab(space: LatentSpace) -> None:
    with gr.Tab("Interpolation"):
        gr.Markdown(f"{_taken_as(space)} A random test image stands in for an end without an image.")
        with gr.Row():
            ends = []
            for name in ("Start", "End"):
                with gr.Column():
                    ends += [_upload(name, name.lower()), *_class_choice(space, f"Class of the {name.lower()}", of_an_image=True)]
        with gr.Row():
            steps = gr.Slider(3, MOST_STEPS, 9, step=1, label="Steps, both ends included")
            walk = gr.Button("Interpolate", elem_id="interpolate")
        path = _image("Reconstruction of the start, points on the line between the latents, reconstruction of the end", "path")

    def end(path: str | None, *label: int) -> tuple[Tensor, tuple[int, ...]]:
        return _random_sample(space) if path is None else (_read(space, path), label)

    def interpolate(steps: int, *ends: Any) -> Array:
        (start, start_label), (last, end_label) = (end(*given) for given in (ends[: len(ends) // 2], ends[len(ends) // 2 :]))
        return picture(space.interpolate(start, last, steps, *start_label, *end_label), steps, ROW_WIDTH)

    walk.click(interpolate, [steps, *ends], path, api_name="interpolate")


def _map_tab(space: LatentSpace, loaded: Callable) -> None:
    with gr.Tab("Map"):
        gr.Markdown(
            "Each image is decoded from the point in its middle. Dimension 0 rises to the right and dimension 1 upwards, each from its "
            "least to its greatest value among the test images. A click decodes the point under it."
        )
        label = _class_choice(space)
        with gr.Row():
            with gr.Column(scale=3):
                overview = _image("Map", "map")
            with gr.Column(scale=2):
                decoded = _image("Decoded", "point")
                place = gr.Markdown("No point is chosen.", elem_id="place")

    def draw(*label: int) -> Array:
        return _enlarged(space.map(*label), GRID_WIDTH)

    def decode_point(event: gr.SelectData, *label: int) -> tuple[Array, str]:
        height, width = space.map_size
        times = _enlargement(width, GRID_WIDTH)
        column, row = event.index
        z = space.point_at((column + 0.5) / (times * width), (row + 0.5) / (times * height))
        return picture(space.decode(z[None], *label), 1, IMAGE_SIDE), f"z = ({z[0]:.2f}, {z[1]:.2f})"

    gr.on([loaded, *(choice.change for choice in label)], draw, label, overview, api_name="map")
    overview.select(decode_point, label, [decoded, place], api_name="decode_point")
