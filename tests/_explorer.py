"""A server of ``fastvae explore`` for tests, which notes every address that it connects to and refuses all that are not this machine's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fastvae.__main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
# Python imports a module of this name when it starts. The events are those of the interpreter, so no library gets around them.
WATCHER = """
import os, sys

def watch(event, arguments):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = address[0] if isinstance(address, tuple) else address
    with open(os.environ["WATCHED_ADDRESSES"], "a") as file:
        print(host, file=file)
    if host not in ("127.0.0.1", "localhost", "::1", None):
        raise OSError(f"the test refuses {address}")

sys.addaudithook(watch)
"""


def train(folder: Path, *options: str) -> Path:
    """The checkpoint of a training on the 1,797 small digits, some seconds long."""
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--pictures.every_n_epochs=0"]
    command_line.main(["fit", "--data=SklearnDigits", *quiet, f"--trainer.default_root_dir={folder}", *options])
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint


def train_vae(folder: Path) -> Path:
    """The checkpoint of a VAE with two latent dimensions. With so small a weight of the KL both become active in a few epochs."""
    network = [
        "--network=VAE_mlp",
        "--network.data_shape=[1,8,8]",
        "--network.hidden=[64]",
        "--network.latent_dim=2",
        "--network.beta=0.01",
    ]
    return train(folder, *network, "--model.learning_rate=0.003", "--trainer.max_epochs=6")


@contextmanager
def serving(checkpoint: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The address of the page, and the file of the addresses that its server has connected to."""
    (folder / "sitecustomize.py").write_text(WATCHER)
    addresses = folder / "addresses"
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "WATCHED_ADDRESSES": str(addresses), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvae", "explore", str(checkpoint)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), f"the server ended with {process.wait(30)}"
        yield address, addresses
    finally:
        process.terminate()
        process.wait(30)
