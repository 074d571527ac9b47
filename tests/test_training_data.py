"""The data modules: splits, batches, folders of images, arrays, scaling and binarisation."""

import gzip
import struct
import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch

for package in ("lightning", "PIL", "sklearn", "mlxtend"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from PIL import Image  # noqa: E402

from fastvae.training.datasets import (  # noqa: E402
    Arrays,
    FashionMNIST,
    ImageFolder,
    MNISTDigits,
    PhotographPatches,
    SklearnDigits,
    TorchvisionImages,
    in_memory,
)
from fastvae.training.errors import DataError, TrainingError  # noqa: E402
from fastvae.training.images import load  # noqa: E402
from fastvae.training.preprocessing import Preprocessing, binarize  # noqa: E402
from fastvae.training.splits import ResumableSampler, split, stratified_order  # noqa: E402


def ready(data):
    data.setup()
    return data


def batch(data, indices=(0, 1)):
    return data.source.__getitems__(list(indices))


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def test_each_digit_is_equally_frequent_in_each_part():
    data = ready(MNISTDigits())
    assert [len(part) for part in data.indices] == [3500, 500, 1000]
    assert all((data.source.labels[part].bincount() == len(part) // 10).all() for part in data.indices)
    assert torch.cat(data.indices).sort().values.equal(torch.arange(5000))
    first = next(iter(data.train_dataloader()))
    assert first.keys() == {"x", "label", "index"}
    assert first["x"].dtype == torch.uint8
    assert first["x"].shape == (128, 1, 28, 28)
    assert torch.equal(data.source.labels[first["index"]], first["label"])


def test_samples_of_a_part_are_its_first_ones():
    data = MNISTDigits(val=0.0)
    first = data.samples("test", 20)
    assert first.keys() == {"x", "label", "index"}
    assert torch.equal(first["index"], data.indices.test[:20])
    assert torch.equal(first["x"], data.source.x[first["index"]])
    assert [len(data.samples(part)["x"]) for part in ("train", "test")] == [4000, 1000]
    assert len(data.samples("test", 2000)["x"]) == 1000
    with pytest.raises(ValueError, match=r"^part: got 'valid', takes one of 'train', 'val', 'test'"):
        data.samples("valid")


def test_test_samples_do_not_depend_on_the_share_for_validation():
    assert torch.equal(MNISTDigits().samples("test")["index"], MNISTDigits(val=0.0).samples("test")["index"])


def test_splits_are_stratified_and_seeded():
    labels = torch.tensor([0] * 30 + [1] * 10)
    order = stratified_order(40, labels, seed=0)
    parts = split(order, val=0.1, test=0.2)
    assert [len(part) for part in parts] == [28, 4, 8]
    assert labels[parts.test].bincount().tolist() == [6, 2]
    assert torch.equal(order, stratified_order(40, labels, seed=0))
    assert not torch.equal(order, stratified_order(40, labels, seed=1))


@pytest.mark.parametrize("options", [{"val": 0.5, "test": 0.5}, {"val": -0.1}, {"batch_size": 0}, {"binarize": "yes"}, {"scaling": "max"}])
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=r": got .*takes"):
        SklearnDigits(**options)


def test_an_order_may_begin_inside_an_epoch():
    whole, rest = (ResumableSampler(10, 0, num_replicas=2, rank=1) for _ in range(2))
    rest.begin_at(3, 2)
    for sampler in (whole, rest):
        sampler.set_epoch(3)
    assert list(rest) == list(whole)[2:]
    assert len(rest) == 5
    rest.set_epoch(4)
    assert len(list(rest)) == 5


def test_patches_do_not_overlap():
    data = ready(PhotographPatches(size=32))
    assert data.source.x.shape == (520, 3, 32, 32)
    with pytest.raises(DataError, match=r"^size: got 1000, takes"):
        ready(PhotographPatches(size=1000))


def write_idx(path, array):
    with gzip.open(path, "wb") as file:
        file.write(b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def test_fashion_is_read_from_idx_files(tmp_path):
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels(count, 28, 28))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    data = ready(FashionMNIST(tmp_path))
    assert data.source.x.shape == (20, 1, 28, 28)
    assert len(data.test_part()) == 10
    assert [len(part) for part in data.indices] == [18, 2, 0]
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"has no train-labels-idx1-ubyte.gz"):
        ready(FashionMNIST(tmp_path))


def test_data_that_need_torchvision_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("fastvae.training.datasets.FASHION_MNIST", tmp_path / "none")
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist, or: torchvision is not installed"):
        ready(FashionMNIST())
    with pytest.raises(ModuleNotFoundError, match="torchvision is not installed: pip install torchvision"):
        ready(TorchvisionImages("CIFAR10"))
    with pytest.raises(DataError, match=r"^name: got 'CIFAR', did you mean CIFAR10\?$"):
        TorchvisionImages("CIFAR")


def torchvision_with(monkeypatch, **data_sets):
    """A torchvision whose ``datasets`` has these alone."""
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(**data_sets)
    monkeypatch.setitem(sys.modules, "torchvision", module)


# What torchvision 0.28 raises without a network, for a file that came damaged, and for CelebA without the package gdown.
@pytest.mark.parametrize(
    "error",
    [
        URLError("[Errno -3] Temporary failure in name resolution"),
        RuntimeError("Error downloading train-images-idx3-ubyte.gz"),
        RuntimeError("File not found or corrupted."),
        RuntimeError("To download files from GDrive, 'gdown' is required. You can install it with 'pip install gdown'."),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CelebA", "FashionMNIST"])
def test_a_download_that_fails_is_named(monkeypatch, tmp_path, name, error):
    def fail(root, *, download, **options):
        assert download
        raise error

    torchvision_with(monkeypatch, **{name: fail})
    monkeypatch.setattr("fastvae.training.datasets.FASHION_MNIST", tmp_path / "none")
    data = FashionMNIST(download_root=tmp_path) if name == "FashionMNIST" else TorchvisionImages(name, root=tmp_path)
    with pytest.raises(DataError, match=f"{name}: torchvision cannot download it into {tmp_path}: ") as raised:
        ready(data)
    assert str(error) in str(raised.value)


def test_downloaded_data_sets_are_read_as_torchvision_has_them(monkeypatch, tmp_path):
    """The attributes are those of torchvision 0.28."""

    def mnist(root, *, train, download):
        count = 20 if train else 10
        return types.SimpleNamespace(data=torch.zeros(count, 28, 28, dtype=torch.uint8), targets=torch.arange(count) % 10)

    def celeba(root, *, split, download):
        names = [f"{split}_{number}.jpg" for number in range(5)]
        folder = root / "celeba/img_align_celeba"
        folder.mkdir(parents=True, exist_ok=True)
        for file in names:
            Image.fromarray(pixels(218, 178, 3)).save(folder / file)
        return types.SimpleNamespace(root=str(root), base_folder="celeba", filename=names)

    torchvision_with(monkeypatch, MNIST=mnist, CelebA=celeba)
    digits = ready(TorchvisionImages("MNIST", root=tmp_path))
    assert [len(part) for part in digits.indices] == [18, 2, 0]
    assert len(digits.test_part()) == 10
    faces = ready(TorchvisionImages("CelebA", root=tmp_path, size=32, val=0.2))
    assert batch(faces)["x"].shape == (2, 3, 32, 32)
    assert faces.test_part().names[0] == "test_0.jpg"


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10"])
def test_one_process_downloads_for_all(monkeypatch, tmp_path, name):
    """Lightning calls prepare_data() in one process of each machine, before the others read."""
    downloads = []

    def data_set(root, *, train, download):
        if not root.exists():
            downloads.append(root.mkdir())
        return types.SimpleNamespace(data=torch.zeros(20, 28, 28, dtype=torch.uint8), targets=torch.arange(20) % 10)

    torchvision_with(monkeypatch, **{name: data_set})
    monkeypatch.setattr("fastvae.training.datasets.FASHION_MNIST", tmp_path / "none")
    root = tmp_path / "data"
    data = FashionMNIST(download_root=root) if name == "FashionMNIST" else TorchvisionImages(name, root=root)
    data.prepare_data()
    assert len(downloads) == 1
    assert data.source is None
    assert len(ready(data).test_part()) == 20
    assert len(downloads) == 1


def test_data_sets_of_torchvision_become_8_bit_batches():
    class Grey:
        data, targets = torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4)

    class Color:
        data, targets = np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 2, 3]

    assert in_memory(Grey).x.shape == (4, 1, 28, 28)
    assert in_memory(Color).x.shape == (4, 3, 32, 32)


@pytest.fixture
def folder(tmp_path):
    """One image of each mode and its own size, and two files that are broken."""
    images = {
        "grey.png": pixels(20, 30),
        "rgb.JPG": pixels(40, 20, 3),
        "rgba.png": pixels(9, 50, 4),
        "wide.png": pixels(20, 30, dtype=np.uint16),
        "sub/palette.gif": pixels(16, 16),
    }
    (tmp_path / "sub").mkdir()
    for name, array in images.items():
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "truncated.png").write_bytes((tmp_path / "rgba.png").read_bytes()[:300])
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image either")
    return tmp_path


@pytest.mark.parametrize(("mode", "channels"), [("rgb", 3), ("grey", 1)])
def test_images_of_all_modes_and_sizes(folder, mode, channels):
    data = ready(ImageFolder(folder, size=16, mode=mode, workers=0, val=0, test=0))
    assert data.source.names == ["grey.png", "rgb.JPG", "rgba.png", "sub/palette.gif", "truncated.png", "wide.png", "words.png"]
    assert data.source.labels.tolist() == [0, 0, 0, 1, 0, 0, 0]
    found = batch(data, range(7))
    assert found["x"].shape == (7, channels, 16, 16)
    assert found["x"].dtype == torch.uint8
    assert [message.split(":")[0].split("/")[-1] for message in found["broken"]] == ["truncated.png", "words.png"]
    assert found["index"].tolist() == [0, 1, 2, 3, 0, 5, 1]
    with pytest.warns(UserWarning, match=r"skipped .*words.png: cannot identify .* \(2 broken so far\)"):
        data.on_before_batch_transfer(found, 0)
    assert len(data.broken) == 2


def test_16_bit_images_keep_their_range(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "a.png")
    values = load(tmp_path / "a.png", 8, "grey")
    assert values.min() == 0
    assert values.max() == 255
    assert 100 < values.mean() < 155


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert (load(tmp_path / "a.png", 8, "rgb") == 255).all()


def test_a_broken_image_may_stop_the_run(folder):
    with pytest.raises(
        DataError, match=r"^2 of 7 images are broken: .*truncated.png: image file is truncated.*; .*words.png: cannot identi"
    ):
        ready(ImageFolder(folder, size=16, broken="stop"))
    for name in ("truncated.png", "words.png"):
        (folder / name).unlink()
    assert len(ready(ImageFolder(folder, size=16, broken="stop")).source) == 5


def test_a_list_of_broken_images_has_an_end(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_text("no image")
    with pytest.raises(DataError, match=r"^12 of 12 images are broken: .*09.png: [^;]*; and 2 more$"):
        ready(ImageFolder(tmp_path, broken="stop"))


def test_a_batch_of_broken_images_is_an_error(folder):
    data = ready(ImageFolder(folder, size=16, workers=0))
    with pytest.raises(DataError, match="none of the 1 images of a batch can be read"):
        batch(data, [6])


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_folders_without_images(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^root: .*takes a folder"):
        ready(ImageFolder(tmp_path / name))


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40.0).reshape(10, 4))
    np.savez(tmp_path / "b.npz", data=pixels(10, 1, 4, 4), classes=np.arange(10) % 2)
    assert batch(ready(Arrays(tmp_path / "a.npy")))["x"].dtype == torch.float32
    data = ready(Arrays(tmp_path / "b.npz", key="data", label_key="classes", test=0.4))
    assert batch(data)["x"].dtype == torch.uint8
    assert data.source.labels[data.indices.test].bincount().tolist() == [2, 2]
    with pytest.raises(DataError, match=r"^key: got 'dat', did you mean data\?$"):
        ready(Arrays(tmp_path / "b.npz", key="dat"))


def test_arrays_with_nan(tmp_path):
    x = np.arange(40.0).reshape(10, 4)
    x[3, 1] = np.nan
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(DataError, match=r"1 of 10 samples of .* hold NaN or infinite values; non_finite=skip"):
        ready(Arrays(tmp_path / "a.npy"))
    data = ready(Arrays(tmp_path / "a.npy", non_finite="skip"))
    assert data.source.names == [str(i) for i in range(10) if i != 3]
    assert data.broken == {"sample 3"}


@pytest.mark.parametrize("content", [np.zeros(3), np.array([["a"]]), np.array([[None]])], ids=["vector", "strings", "objects"])
def test_arrays_that_do_not_fit(tmp_path, content):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=r"^path: "):
        ready(Arrays(tmp_path / "a.npy"))


def test_files_that_are_no_arrays(tmp_path):
    (tmp_path / "a.npy").write_text("no array")
    for name in ("a.npy", "missing.npy"):
        with pytest.raises(TrainingError, match=r"^path: .* is no .npy or .npz file"):
            ready(Arrays(tmp_path / name))


def test_binarisation_draws_0_or_255():
    x = torch.tensor([[0, 64, 255]], dtype=torch.uint8).expand(10_000, 3)
    drawn = binarize(x, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.uint8
    assert set(drawn.unique().tolist()) == {0, 255}
    assert (drawn == 255).float().mean(0).tolist() == pytest.approx([0, 64 / 255, 1], abs=0.02)
    with pytest.raises(TypeError, match=r"binarisation takes torch.uint8"):
        binarize(torch.rand(3))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_binarised_batches(kind):
    data = ready(SklearnDigits(binarize=kind))
    preprocessing = data.make_preprocessing()
    first, second = (preprocessing(batch(data, range(64))["x"]) for _ in range(2))
    assert set(first.unique().tolist()) == {0, 255}
    assert torch.equal(first, second) == (kind == "static")


def test_static_binarisation_of_files_is_the_same_each_time(folder):
    data = ready(ImageFolder(folder, size=16, workers=0, binarize="static"))
    first, second = (batch(data, [0, 1])["x"] for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("scaling", ["min_max", "z_score"])
def test_scaling_takes_the_statistics_of_the_training_part(tmp_path, scaling):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(3, 5, (100, 4)))
    data = ready(Arrays(tmp_path / "a.npy", scaling=scaling))
    preprocessing = data.make_preprocessing()
    x = data.source.x[data.indices.train]
    scaled = preprocessing(x)
    center, spread = (scaled.amin(0), scaled.amax(0)) if scaling == "min_max" else (scaled.mean(0), scaled.std(0, correction=0))
    torch.testing.assert_close(center, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(preprocessing.inverse(scaled), x)
    again = Preprocessing(**preprocessing.describe())
    again.load_state_dict(preprocessing.state_dict())
    assert torch.equal(again(x), scaled)


def test_scaling_of_files_is_an_error(folder):
    with pytest.raises(DataError, match=r"^scaling: got 'min_max' for files"):
        ready(ImageFolder(folder, scaling="min_max")).make_preprocessing()
