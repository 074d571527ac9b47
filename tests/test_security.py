"""What files and networks can do to a user: nothing that they name is run, nothing is fetched unasked, and what is hostile is an error that
names the file."""

import ast
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("lightning", "PIL", "safetensors", "huggingface_hub"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from safetensors.torch import save_file  # noqa: E402

from fastvae import __main__ as command_line  # noqa: E402
from fastvae.models import AE, VAE, pretrained, registry  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.datasets import Arrays, FashionMNIST, ImageFolder  # noqa: E402
from fastvae.training.errors import CheckpointError, DataError  # noqa: E402
from fastvae.training.images import check_images, loader  # noqa: E402
from fastvae.training.module import ENTRY, LitAutoencoder  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastvae", "kernels", "benchmarks", "examples", "tools")


# Calls that run what a file says.


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the name under which it stands there, its imported names written out."""
    tree, names = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node.func).partition(".")
            found.append((names.get(first, first) + dot + rest, node))
    return found


def keyword(call: ast.Call, name: str):
    """The value of an argument that is written as a constant; None where there is none."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "torch.hub.load", "torch.utils.cpp_extension.load_inline"),
    *(f"{module}.{name}" for module in ("pickle", "marshal", "dill", "cloudpickle", "joblib") for name in ("load", "loads", "Unpickler")),
    *("shelve.open", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"),
}
# It compiles the source of a module's own method, which Python has imported already, with some of its calls replaced.
ALLOWED = {("fastvae/nn/_forward_code.py", "exec")}


def dangerous(path: Path) -> list[str]:
    found = []
    for name, call in calls(path):
        if name in FORBIDDEN and (str(path.relative_to(ROOT)), name) not in ALLOWED:
            found.append(f"{path.name}:{call.lineno} {name}")
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            found.append(f"{path.name}:{call.lineno} torch.load without weights_only=True")
        if keyword(call, "allow_pickle") or keyword(call, "trust_remote_code") or keyword(call, "shell"):
            found.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    return found


SOURCES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path):
    assert dangerous(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "import pickle as p; p.loads(b'')",
        "from pickle import load; load(open('x'))",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "import yaml; yaml.load(open('x'), yaml.Loader)",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import subprocess; subprocess.run('ls', shell=True)",
    ],
)
def test_the_walk_finds_such_a_call(line, tmp_path, monkeypatch):
    path = tmp_path / "source.py"
    path.write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(dangerous(path)) == 1


# The network.


OFFLINE = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        raise AssertionError(f"{event}{arguments}")

sys.addaudithook(refuse)
"""


def run_offline(program: str, folder: Path) -> str:
    """The output of a program in a process that may not use a socket."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, "-c", OFFLINE + program]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_socket_would_be_refused(tmp_path):
    program = "import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept AssertionError as error: print(error)"
    assert run_offline(program, tmp_path).startswith("socket.")


def test_no_module_uses_the_network_when_it_is_imported(tmp_path):
    program = """
import importlib, pkgutil, fastvae
# The library for CUDA is no module: torch loads it.
others = ("__main__", "_cuda")
names = [module.name for module in pkgutil.walk_packages(fastvae.__path__, "fastvae.") if not module.name.endswith(others)]
for name in names:
    importlib.import_module(name)
print(len(names) > 100)
"""
    assert run_offline(program, tmp_path) == "True\n"


def test_models_are_made_saved_and_read_without_the_network(tmp_path):
    program = """
import torch
from fastvae.models import AE, registry
model = AE.mlp(16, (6,), 3)
model.save_pretrained("folder")
print(torch.equal(AE.from_pretrained("folder").encode(torch.ones(1, 16)), model.encode(torch.ones(1, 16))))
print(all(registry.find_network(name)() is not None for name in ("VAE.conv", "ImageVAE.residual", "VQVAE.conv", "LadderVAE.mlp")))
"""
    assert run_offline(program, tmp_path) == "True\nTrue\n"


def test_a_training_uses_no_network(tmp_path):
    """What the demonstration is made of: its data, a training, an evaluation and pictures."""
    arguments = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data=MNISTDigits", "--trainer.logger=false"]
    program = f"""
from fastvae import __main__ as command_line
command_line.main(["fit", "--network=VAE_mlp", "--checkpoint.dirpath=kept", "--trainer.accelerator=cpu", *{arguments}])
command_line.main(["sample", "kept/last.ckpt", "--count=4"])
"""
    run_offline(program, tmp_path)
    assert (tmp_path / "out" / "samples.png").is_file()


# Weights and recipes.


@pytest.fixture
def folder(tmp_path):
    AE.mlp(16, (6,), 3).save_pretrained(tmp_path)
    return tmp_path


def with_first_entry(header: dict, data: bytes, **changes) -> bytes:
    """A file of safetensors that says something else of its first tensor."""
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header | {name: header[name] | changes}).encode()
    return struct.pack("<Q", len(text)) + text + data


# From the header and the data of a file, one whose header says what does not hold.
LIES = {
    "a header of 2^60 bytes": lambda header, data: struct.pack("<Q", 2**60) + data,
    "a header that ends behind the file": lambda header, data: struct.pack("<Q", len(data) + 1) + data,
    "offsets behind the file": lambda header, data: with_first_entry(header, data, data_offsets=[0, 2**40]),
    "offsets that run backwards": lambda header, data: with_first_entry(header, data, data_offsets=[64, 0]),
    "a shape of 2^62 elements": lambda header, data: with_first_entry(header, data, shape=[2**31, 2**31]),
    "a negative size": lambda header, data: with_first_entry(header, data, shape=[-1, 16]),
    "an unknown dtype": lambda header, data: with_first_entry(header, data, dtype="object"),
    "half of the data": lambda header, data: with_first_entry(header, data[: len(data) // 2]),
    "no JSON": lambda header, data: struct.pack("<Q", 4) + b"\x80\x04N." + data,
    "a pickle": lambda header, data: b"\x80\x04N.",
    "nothing": lambda header, data: b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_that_lie_are_an_error_that_names_the_file(folder, lie):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    path.write_bytes(LIES[lie](json.loads(content[8 : 8 + length]), content[8 + length :]))
    with pytest.raises(ValueError, match=rf"^source: {path} "):
        pretrained.from_pretrained(folder)


def test_weights_of_another_network_are_an_error_that_names_the_file(folder):
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^source: {folder / 'model.safetensors'} does not hold the weights"):
        pretrained.from_pretrained(folder)


CONFIGS = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "a network that is no name": '{"network": ["VAE.mlp"], "options": {}}',
    "options that are no mapping": '{"network": "VAE.mlp", "options": [1]}',
    "a path": '{"network": "../../VAE.mlp", "options": {}}',
    "a module of Python": '{"network": "os.system", "options": {"command": "touch ran"}}',
    "a function of Python": '{"network": "VAE.mlp", "options": {"likelihood": {"class": "os.system", "command": "touch ran"}}}',
    "a builtin": '{"network": "VAE.mlp", "options": {"likelihood": {"class": "eval", "source": "1"}}}',
    "an import of a module": '{"network": "VAE.mlp", "options": {"likelihood": {"class": "importlib", "name": "os"}}}',
    "the class of the module": '{"network": "VAE.mlp", "options": {"likelihood": {"class": "__class__", "name": "x"}}}',
    "no class": '{"network": "VAE.mlp", "options": {"likelihood": {}}}',
    "a class that is no name": '{"network": "VAE.mlp", "options": {"likelihood": {"class": ["eval"]}}}',
    "a method that is no network": '{"network": "VAE.from_pretrained", "options": {"pretrained_model_name_or_path": "x/y"}}',
    "sizes that are no numbers": '{"network": "VAE.mlp", "options": {"hidden": "many"}}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_that_names_something_else_is_an_error(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "config.json").write_text(CONFIGS[name])
    with pytest.raises(ValueError, match=r"^(source|network|class|hidden): "):
        pretrained.from_pretrained(folder)
    assert not (folder / "ran").exists()


# Checkpoints.


class RunsWhenItIsUnpickled:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def checkpoint(**changes) -> dict:
    """What a training writes, of a small network."""
    lit = LitAutoencoder(VAE.mlp(4, (3,), 2))
    content = {"state_dict": lit.state_dict()}
    lit.on_save_checkpoint(content)
    return content | {ENTRY: content[ENTRY] | changes}


def test_a_checkpoint_with_code_is_not_run(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint() | {"extra": RunsWhenItIsUnpickled(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=rf"{path} holds more than tensors and plain data"):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()


def test_the_checkpoint_without_it_is_read(tmp_path):
    torch.save(checkpoint(), tmp_path / "model.ckpt")
    assert registry.describe(checkpoints.load(tmp_path / "model.ckpt").network)["network"] == "VAE.mlp"


ENTRIES = {
    "no mapping": lambda content: content | {ENTRY: [1]},
    "empty": lambda content: content | {ENTRY: {}},
    "another format": lambda content: content | {ENTRY: {"format": 99}},
    "a network that is no recipe": lambda content: content | {ENTRY: content[ENTRY] | {"network": ["VAE.mlp"]}},
    "an unknown network": lambda content: content | {ENTRY: content[ENTRY] | {"network": {"network": "os.system", "options": {}}}},
    "an unknown option": lambda content: content | {ENTRY: content[ENTRY] | {"network": {"network": "VAE.mlp", "options": {"x": 1}}}},
    "an unknown preprocessing": lambda content: content | {ENTRY: content[ENTRY] | {"preprocessing": {"command": "ls"}}},
    "a shape of words": lambda content: content | {ENTRY: content[ENTRY] | {"sample_shape": ["x"]}},
    "data that are no name": lambda content: content | {ENTRY: content[ENTRY] | {"data": 7}},
    "options of data that are no mapping": lambda content: content | {ENTRY: content[ENTRY] | {"data_options": "x"}},
    "a seed that is no number": lambda content: content | {ENTRY: content[ENTRY] | {"noise_seed": "x"}},
    "no weights": lambda content: {ENTRY: content[ENTRY]},
    "weights that are no mapping": lambda content: content | {"state_dict": [1]},
    "weights of another network": lambda content: content | {"state_dict": {"x": torch.zeros(1)}},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_that_says_what_no_training_writes_is_an_error(tmp_path, name):
    torch.save(ENTRIES[name](checkpoint()), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"^checkpoint: "):
        checkpoints.load(tmp_path / "model.ckpt")


def with_entry(path: Path, name: str, change) -> bytes:
    """The bytes of a zip file with one of its entries changed, and its checksum right."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(file, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            target.writestr(info.filename, change(content) if info.filename.endswith(name) else content)
    return file.getvalue()


@pytest.mark.parametrize("block", range(10))
def test_a_checkpoint_with_changed_bytes_is_read_or_an_error(tmp_path, block):
    """Bytes of its pickle, whose checksum is right all the same."""
    torch.save(checkpoint(), tmp_path / "whole.ckpt")
    generator = np.random.default_rng(block)
    refused = 0
    for _ in range(40):

        def change(content):
            changed = bytearray(content)
            for place in generator.integers(0, len(changed), 3):
                changed[place] = generator.integers(256)
            return bytes(changed)

        path = tmp_path / "changed.ckpt"
        path.write_bytes(with_entry(tmp_path / "whole.ckpt", "data.pkl", change))
        try:
            checkpoints.load(path)
        except CheckpointError:
            refused += 1
    assert refused > 10


# Data.


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_an_image_that_would_fill_the_memory_is_a_broken_one(tmp_path):
    """65 kilobytes that are 4 thousand million pixels."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(65_000, 65_000, bytes(1 << 26)))
    (tmp_path / "fine.png").write_bytes(png(2, 2, b"\0\1\2\0\3\4"))
    load = loader(8, "grey")
    with pytest.raises(DataError, match=rf"1 of 2 images are broken: {bomb}: .*exceeds limit"):
        check_images([bomb, tmp_path / "fine.png"], load)
    data = ImageFolder(tmp_path, size=8, mode="grey", workers=0, val=0.0, test=0.0)
    data.setup()
    batch = data.source.__getitems__([0, 1])
    assert batch["index"].tolist() == [1, 1]
    assert [str(bomb) in reason for reason in batch["broken"]] == [True]


def npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def npz(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def pickled_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


ARRAYS = {
    "a shape of 2^60 elements": npy((2**30, 2**30)),
    "more than there is": npy((1000, 1000), data=b"1234"),
    "a negative size": npy((-1, 4), data=bytes(64)),
    "objects": pickled_array(),
    "an archive of objects": npz(x=pickled_array()),
    "an archive with a shape of 2^60 elements": npz(x=npy((2**30, 2**30))),
    "an archive of half an array": npz(x=npy((1000, 1000), data=b"1234")),
    "half an archive": npz(x=npy((4, 4), data=bytes(64)))[:-30],
    "an archive of words": npz(x=b"no array"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_lie_are_an_error_that_names_the_file(tmp_path, name):
    path = tmp_path / "array.npz"
    path.write_bytes(ARRAYS[name])
    with pytest.raises(DataError, match=rf"path: .*{path}|^path: got"):
        Arrays(path).setup()


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


IDX = {
    "more than the header says": idx((2, 2, 2), bytes(1 << 26)),
    "less than the header says": idx((2**31, 2**31, 4), b"1234"),
    "no header": b"12",
    "half a header": b"\0\0\x08\x03\0\0",
}


@pytest.mark.parametrize("name", IDX)
def test_idx_files_that_lie_are_an_error_that_names_the_file(tmp_path, name):
    """The first decompresses to a thousand times its length."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(IDX[name]))
    with pytest.raises(DataError, match=rf"^{path}: "):
        FashionMNIST(tmp_path).setup()


def test_an_idx_file_that_is_cut_off_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx((2, 2, 2), bytes(8)))[:-10])
    with pytest.raises(DataError, match=rf"^{path}: is damaged"):
        FashionMNIST(tmp_path).setup()


# Configurations.


@pytest.mark.parametrize(
    "text",
    [
        "network: !!python/object/apply:os.mkdir [ran]",
        "trainer: !!python/object/new:os.mkdir [ran]",
        "? !!python/object/apply:os.mkdir [ran]\n: 1",
        "network: !!python/name:os.mkdir",
    ],
)
def test_a_configuration_makes_no_objects_of_python(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["fit", "--config=hostile.yaml"])
    assert "hostile.yaml" in str(ended.value) + capsys.readouterr().err
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "subprocess.Popen", "../VAE_mlp"])
def test_a_configuration_makes_only_networks_and_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for key in ("network", "data"):
        Path("hostile.yaml").write_text(f"{key}:\n  class_path: {name}\n  init_args:\n    path: ran\n    args: [mkdir, ran]\n")
        with pytest.raises(SystemExit):
            command_line.main(["fit", "--config=hostile.yaml"])
        assert not Path("ran").exists()
