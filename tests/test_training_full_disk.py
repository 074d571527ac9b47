"""Disks on which a checkpoint or a picture finds no room, as a user of the command line meets them."""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

for package in ("lightning", "jsonargparse", "tensorboard", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from test_training_cli import environment  # noqa: E402

from fastvae.training import pictures  # noqa: E402
from fastvae.training.checkpoint_io import AtomicCheckpointIO  # noqa: E402
from fastvae.training.errors import TrainingError  # noqa: E402

# About 270 KiB of weights and moments, beside curves and a configuration of some KiB.
CONFIG = """
network: {class_path: VAE_mlp, init_args: {data_shape: [1, 8, 8], hidden: [160], latent_dim: 2}}
data: {class_path: SklearnDigits, init_args: {batch_size: 512}}
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}
checkpoint: {dirpath: kept}
"""
ROOM = 64 * 2**10


def fit(folder: Path, *arguments: str, room: int | None = None) -> subprocess.CompletedProcess:
    """A training in which no file may be longer than ``room`` bytes: writing more than that fails as on a full disk."""
    limit = None if room is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    command = [sys.executable, "-m", "fastvae", "fit", "--config=small.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, preexec_fn=limit)


@pytest.mark.prove
def test_a_checkpoint_without_room_leaves_the_one_before_it(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    first = fit(tmp_path)
    assert first.returncode == 0, first.stderr
    before = sorted((tmp_path / "kept").iterdir())
    last = tmp_path / "kept/last.ckpt"
    content = last.read_bytes()
    finished = fit(tmp_path, "--trainer.max_steps=4", f"--ckpt_path={last}", room=ROOM)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    message = finished.stderr.strip().splitlines()[-1]
    assert message.startswith(f"fastvae: {tmp_path}/kept/"), message
    assert message.endswith(".ckpt: cannot be written: File too large"), message
    assert last.read_bytes() == content
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert sorted((tmp_path / "kept").iterdir()) == before


def test_a_checkpoint_replaces_the_one_before_it(tmp_path):
    for step in range(2):
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "a/b.ckpt")
        assert torch.load(tmp_path / "a/b.ckpt", weights_only=True) == {"step": step}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.ckpt"]


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"/file/a.png: cannot be written: .*(exists|directory)"):
        pictures.save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), tmp_path / "file/a.png")
    with pytest.raises(TrainingError, match=r"/file/a.ckpt: cannot be written: .*(exists|directory)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file/a.ckpt")
