"""``fastvae explore``: the images behind its page, the files that users upload, and its server."""

import re
import socket
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("lightning", "gradio"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[explore]")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
from PIL import Image, ImageFile  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import AE, CVAE, VAE, VQVAE, VQVAE2, DeepVAE, ImageVAE, IndexPrior, LadderVAE, SemiSupervisedVAE, SequenceVAE  # noqa: E402
from fastvae.models.registry import MODELS  # noqa: E402
from fastvae.nn import GaussianNoise, VectorCondition  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.errors import CheckpointError, DataError, TrainingError  # noqa: E402
from fastvae.training.explorer import page, server, uploads  # noqa: E402
from fastvae.training.explorer.latent_space import LatentSpace, check_model  # noqa: E402
from fastvae.training.module import LitAutoencoder, labels_of  # noqa: E402
from fastvae.training.preprocessing import Preprocessing  # noqa: E402
from tests._explorer import serving, train, train_vae  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 8, 8)


def lit_of(network, shape=SHAPE) -> LitAutoencoder:
    lit = LitAutoencoder(network)
    lit.sample_shape = list(shape)
    return lit.eval()


def space_of(network, count: int = 100) -> LatentSpace:
    lit = lit_of(network)
    check_model(lit)
    batch = SklearnDigits().samples("test", count)
    return LatentSpace(lit, batch["x"], *labels_of(batch, network))


TAKEN = [model for model in MODELS if issubclass(model, AE | VAE)]
# What a class takes besides.
OPTIONS = {"BetaTCVAE": {"dataset_size": 1000}, "DenoisingAE": {"corruption": GaussianNoise(0.1)}}


@pytest.mark.parametrize("model", TAKEN, ids=lambda model: model.__name__)
def test_every_model_with_a_latent_vector(model):
    torch.manual_seed(0)
    space = space_of(model.mlp(SHAPE, (16,), 3, **OPTIONS.get(model.__name__, {})))
    label = 4 if space.num_classes else None
    x = space.x[:2]
    z = space.encode(x, label)
    assert z.shape == (2, 3)
    torch.testing.assert_close(space.decode(z, label), space.reconstruct(x, label))
    path = space.interpolate(x[:1], x[1:], 5, label, label)
    torch.testing.assert_close(path[[0, -1]], space.reconstruct(x, label))
    if space.has_prior:
        assert space.sample(6, 0, label).shape == (6, *SHAPE)
        assert torch.equal(space.sample(6, 0, label), space.sample(6, 0, label))
    else:
        assert not hasattr(space.lit.network, "prior")
        with pytest.raises(TrainingError, match=rf"^sample: {model.__name__} has no prior"):
            space.sample(6, 0)


REFUSED = {
    "LadderVAE": lambda: LadderVAE.mlp(SHAPE, (16, 8), (3, 2)),
    "DeepVAE": lambda: DeepVAE.residual(8, 1, widths=(8, 8), blocks=1, latent_channels=2, groups=4),
    "VQVAE": lambda: VQVAE.conv(1, num_codes=8, dim=4, channels=4, hidden=2, blocks=1),
    "VQVAE2": lambda: VQVAE2.conv(1, num_codes=8, dim=4, channels=4, hidden=2, blocks=1),
    "IndexPrior": lambda: IndexPrior.transformer(REFUSED["VQVAE"](), (2, 2), width=8, depth=1, heads=1),
    "SequenceVAE": lambda: SequenceVAE.recurrent(10, 4, 8, 16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_latent_vector_is_named(name):
    with pytest.raises(CheckpointError, match=f"^checkpoint: got {name}, fastvae explore takes an AE or a VAE of grey or RGB images"):
        check_model(lit_of(REFUSED[name]()))


def test_every_model_of_the_registry_is_taken_or_refused():
    assert {model.__name__ for model in MODELS} == {model.__name__ for model in TAKEN} | REFUSED.keys()


def test_a_latent_image_other_data_and_other_conditions_are_named():
    images = ImageVAE.residual(1, channels=(8, 8), blocks=1, groups=4, image_size=8)
    with pytest.raises(CheckpointError, match=r"^checkpoint: got ImageVAE with a latent of shape \(4, 4, 4\), fastvae explore takes"):
        space_of(images)
    with pytest.raises(CheckpointError, match=r"^checkpoint: got AE of samples of shape \(7,\), fastvae explore takes"):
        check_model(lit_of(AE.mlp(7, (4,), 2), (7,)))
    conditional = CVAE.mlp(SHAPE, (16,), 2, condition=VectorCondition(3, 4))
    with pytest.raises(CheckpointError, match=r"^checkpoint: got CVAE with a VectorCondition, fastvae explore takes"):
        check_model(lit_of(conditional))


def linear(*scales: float) -> AE:
    """An autoencoder whose code has a dimension for each number: so many times the pixel of that place."""
    network = AE.linear(SHAPE, len(scales))
    weight = torch.zeros(len(scales), 64)
    for dimension, scale in enumerate(scales):
        weight[dimension, 20 + dimension] = scale
    encoder = next(module for module in network.encoder.modules() if isinstance(module, torch.nn.Linear))
    encoder.weight.data, encoder.bias.data = weight, torch.arange(len(scales), dtype=torch.float32)
    return network


def test_active_dimensions():
    space = space_of(linear(1.0, 0.0, 3.0, 0.01))
    pixels = space.x.flatten(1).double()[:, 20:24] / 255
    expected = pixels.var(0, correction=0) * torch.tensor([1.0, 0.0, 3.0, 0.01]).double() ** 2
    torch.testing.assert_close(space.variances, expected, rtol=1e-5, atol=1e-10)
    assert space.active == [2, 0]
    torch.testing.assert_close(space.high[2], 2 + 3 * pixels[:, 2].max().float())
    torch.testing.assert_close(space.mean[1], torch.tensor(1.0))


def test_the_map_shows_what_a_click_decodes():
    space = space_of(linear(1.0, 2.0))
    picture = space.map()
    assert picture.shape[1:] == space.map_size == (160, 160)
    row, column = 3, 17
    z = space.point_at((column + 0.5) / space.tiles, (row + 0.5) / space.tiles)
    tile = picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    expected = (space.decode(z[None])[0].clamp(0, 1) * 255).round()
    torch.testing.assert_close(tile.float(), expected, rtol=0, atol=1.0)
    torch.testing.assert_close(space.point_at(0.0, 0.0), torch.stack([space.low[0], space.high[1]]))
    torch.testing.assert_close(space.point_at(1.0, 1.0), torch.stack([space.high[0], space.low[1]]))


def test_images_are_in_the_units_of_the_data():
    network = AE.linear(SHAPE, 2)
    lit = lit_of(network)
    x = torch.rand(20, *SHAPE) * 5
    lit.preprocessing = Preprocessing(scaling="z_score")
    lit.preprocessing.fit(x)
    space = LatentSpace(lit, x)
    z = network.encode((x[:1] - x.mean(0)) / x.std(0, correction=0))
    torch.testing.assert_close(space.encode(x[:1]), z)
    torch.testing.assert_close(space.decode(z), network.decode(z) * x.std(0, correction=0) + x.mean(0))
    assert torch.equal(space.as_samples(torch.tensor([255], dtype=torch.uint8)), torch.tensor([1.0]))


def test_a_class_changes_the_image_and_a_classifier_finds_it():
    torch.manual_seed(0)
    space = space_of(SemiSupervisedVAE.mlp(SHAPE, (16,), 2))
    x = space.x[:1]
    found = int(space.lit.network.classify(x))
    assert space.classifies
    torch.testing.assert_close(space.reconstruct(x, -1), space.reconstruct(x, found))
    torch.testing.assert_close(space.encode(x, -1), space.encode(x, found))
    assert not torch.equal(space.decode(space.mean[None], 1), space.decode(space.mean[None], 2))


@pytest.mark.parametrize(("low", "high"), [(-3.2, 2.7), (0.0, 41.0), (-0.0123, 0.4), (1000.0, 1003.0)])
def test_the_range_of_a_slider_holds_the_values_and_ends_on_its_steps(low, high):
    first, last, step = page.slider_range(low, high)
    assert low - step < first <= low < high <= last < high + step
    assert 200 <= (high - low) / step < 2000
    assert first / step == pytest.approx(round(first / step))
    assert last / step == pytest.approx(round(last / step))


# Uploads.


def test_an_upload_becomes_what_the_model_takes(tmp_path):
    """Twice as wide as high, white on the left quarter: the centre of it, grey, in the wanted size."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    grey = uploads.read(tmp_path / "wide.png", (1, 8, 8))
    assert (grey.shape, grey.dtype) == ((1, 1, 8, 8), torch.uint8)
    assert grey[..., 0].min() > 250
    assert grey[..., -1].max() < 5
    assert uploads.read(tmp_path / "wide.png", (3, 8, 16)).shape == (1, 3, 8, 16)


def png_header(path: Path, width: int, height: int) -> Path:
    """A file of some bytes that claims to be an image of this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [6000, 10_000, 60_000], ids=["beyond ours", "Pillow warns", "Pillow refuses"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch, side):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda file: pytest.fail("decoded"))
    with pytest.raises(DataError, match=rf"^image: .*takes at most {uploads.MAX_PIXELS} pixels"):
        uploads.read(png_header(tmp_path / "bomb.png", side, side), SHAPE)


@pytest.mark.parametrize(
    "content",
    [b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
    ids=["text", "EPS", "SVG"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(DataError, match=r"^image: cannot be read, takes a file of PNG, JPEG"):
        uploads.read(tmp_path / "file.png", SHAPE)


def test_a_damaged_image_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^image: cannot be read"):
        uploads.read(png_header(tmp_path / "damaged.png", 30, 30), SHAPE)


# The command.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_vae(tmp_path_factory.mktemp("run"))


@pytest.fixture
def environment(monkeypatch):
    """Keeps the variables that the command sets from the tests that follow."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")


class Harmful:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    torch.save({"fastvae": Harmful(tmp_path / "touched")}, tmp_path / "harmful.ckpt")
    with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: .*harmful.ckpt holds more than tensors and plain data, which is not read"):
        command_line.main(["explore", str(tmp_path / "harmful.ckpt")])
    assert not (tmp_path / "touched").exists()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: missing.ckpt is no file"):
        command_line.main(["explore", "missing.ckpt"])
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: .*text.ckpt was not written by torch.save"):
        command_line.main(["explore", str(tmp_path / "text.ckpt")])


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    options = ["--network=VQVAE_conv", "--network.in_channels=1", "--network.channels=4", "--network.hidden=2", "--network.blocks=1"]
    vqvae = train(tmp_path, *options, "--network.num_codes=8", "--network.dim=4", "--trainer.max_steps=1")
    with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: got VQVAE, fastvae explore takes an AE or a VAE"):
        command_line.main(["explore", str(vqvae)])


def test_without_gradio_the_extra_is_named(checkpoint, monkeypatch, environment):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^fastvae: gradio is not installed: pip install fastvae-kernels\[explore\]$"):
        command_line.main(["explore", str(checkpoint)])


def test_a_port_that_is_taken(checkpoint, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken = listening.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"^fastvae: port: got {taken}, which is in use$"):
            command_line.main(["explore", str(checkpoint), f"--port={taken}"])
        monkeypatch.setattr(server, "FIRST_PORT", taken)
        assert taken < server.free_port("127.0.0.1", None) < taken + server.PORTS
    assert server.free_port("127.0.0.1", taken) == taken
    with pytest.raises(TrainingError, match=r"^host, port: got 192\.0\.2\.1, \d+, which cannot be listened on: "):
        server.free_port("192.0.2.1", None)


# The server.


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    with serving(checkpoint, tmp_path_factory.mktemp("served")) as address_and_log:
        yield address_and_log


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    return Client(served[0], verbose=False, analytics_enabled=False, download_files=str(tmp_path_factory.mktemp("client")))


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def ranges(client) -> list[tuple[float, float]]:
    """The ends of each slider of a latent dimension."""
    sliders = [part["props"] for part in client.config["components"] if part["type"] == "slider"]
    return [(slider["minimum"], slider["maximum"]) for slider in sliders if slider["label"].startswith("Dimension")]


def test_a_slider_changes_the_image(client):
    (low, high), (fixed, _) = ranges(client)
    one, other = (pixels_of(client.predict(value, fixed, api_name="/decode")) for value in (low, high))
    assert one.shape == (336, 336)
    assert (one != other).any()


def test_samples_depend_on_the_seed(client):
    drawn = [pixels_of(client.predict(seed, api_name="/sample")) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_an_upload_is_reconstructed(client, tmp_path):
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    taken, recon, *_ = client.predict(handle_file(tmp_path / "grey.png"), api_name="/reconstruct")
    assert (pixels_of(taken) == 200).all()
    assert pixels_of(recon).shape == (336, 336)


def test_interpolations_have_their_steps(client):
    assert pixels_of(client.predict(5, None, None, api_name="/interpolate")).shape[1] > 1000


def test_an_upload_with_too_many_pixels_is_an_error_on_the_page(client, tmp_path):
    bomb = png_header(tmp_path / "bomb.png", 6000, 6000)
    with pytest.raises(AppError, match="image: got 6000 x 6000, takes at most 33554432 pixels"):
        client.predict(handle_file(bomb), api_name="/reconstruct")


def test_a_file_that_is_too_large_is_refused(served):
    boundary = "boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n\r\n'
    body = head.encode() + bytes(server.MAX_FILE_SIZE + 1) + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(f"{served[0]}/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_the_page_loads_nothing_from_elsewhere(served):
    with urllib.request.urlopen(served[0]) as answer:
        html, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "default-src 'self';" in policy
    assert not re.search(r"https?:|\*", policy)
    assert re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', html) == []


def test_the_server_connects_to_this_machine_alone(served, client):
    """Whatever the tests before this one asked of it."""
    client.predict(*(low for low, _ in ranges(client)), api_name="/decode")
    assert set(served[1].read_text().split()) == {"127.0.0.1"}


def test_the_server_listens_on_one_address_alone(served):
    port = int(served[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
