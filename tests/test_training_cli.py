"""The command line as a user types it, on small networks and data."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("lightning", "jsonargparse", "tensorboard", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from PIL import Image  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.training.datasets import ImageFolder  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CONFIG = """
network: {class_path: VAE_mlp, init_args: {data_shape: [1, 8, 8], hidden: [16], latent_dim: 3}}
model: {optimizer: adamw, schedule: cosine, warmup_steps: 1}
data: {class_path: SklearnDigits, init_args: {batch_size: 512, binarize: dynamic}}
trainer: {accelerator: cpu, max_steps: 2, log_every_n_steps: 1, enable_model_summary: false}
"""
# Deprecated calls of jsonargparse and Lightning are errors: a newer jsonargparse has to be kept out before it breaks the command line.
COMMAND = [sys.executable, "-W", "error::DeprecationWarning", "-m", "fastvae"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def fastvae(*arguments, folder: Path) -> str:
    finished = subprocess.run([*COMMAND, *map(str, arguments)], cwd=folder, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def environment() -> dict[str, str]:
    return {**ONE_THREAD, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished training."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(CONFIG)
    fastvae("fit", "--config", "small.yaml", "--trainer.default_root_dir", folder, "--network.latent_dim=4", folder=folder)
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "last.ckpt"


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_fit_leaves_a_checkpoint_curves_and_pictures(run, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 2
    assert content["fastvae"]["network"]["network"] == "VAE.mlp"
    assert content["fastvae"]["network"]["options"]["latent_dim"] == 4
    assert content["fastvae"]["data"] == "SklearnDigits"
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    drawn = {path.stem for path in (run / "pictures" / "epoch_0000").iterdir()}
    assert drawn == {"reconstructions", "samples", "interpolations", "traversals"}


@pytest.mark.prove
def test_two_processes_that_torchrun_starts(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "fastvae"]
    options = ["--config=small.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_progress_bar=false"]
    finished = subprocess.run([*launcher, "fit", *options], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    runs = list((tmp_path / "lightning_logs").iterdir())
    assert [run.name for run in runs] == ["version_0"]
    assert len(list((runs[0] / "pictures" / "epoch_0000").iterdir())) == 4
    assert torch.load(runs[0] / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false"]


def test_validation_takes_network_and_data_of_the_checkpoint(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command_line.main(["validate", str(checkpoint), *QUIET])
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in ("val/loss", "val/kl"))


def test_evaluation_takes_network_and_data_of_the_checkpoint(checkpoint, tmp_path):
    printed = fastvae("test", checkpoint, *QUIET, "--evaluation.features=null", folder=tmp_path)
    assert all(figure in printed for figure in ("recon_loss  ", "PSNR [dB]  "))


def test_evaluation_on_other_data(checkpoint, tmp_path, capsys, monkeypatch):
    """Other options of the data of the training, then other data, which have another shape."""
    monkeypatch.chdir(tmp_path)
    batches = []
    monkeypatch.setattr("fastvae.training.module.LitAutoencoder.on_test_batch_start", lambda *_: batches.append(0))
    command_line.main(["test", f"--ckpt_path={checkpoint}", *QUIET, "--data.batch_size=90", "--evaluation.features=null"])
    assert len(batches) == 4, "of 359 samples"
    assert "recon_loss  " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "without a logger"
    with pytest.raises(SystemExit, match=r"MNISTDigits has samples of shape \(1, 28, 28\), the checkpoint was trained on SklearnDigits"):
        command_line.main(["test", str(checkpoint), *QUIET, "--data=MNISTDigits"])


def test_evaluation_of_a_checkpoint_that_another_program_wrote(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["fastvae"]["data"] = None
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match=r"^fastvae: data: got none, takes one of MNISTDigits, "):
        command_line.main(["test", str(tmp_path / "other.ckpt"), *QUIET])


def test_sample(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command_line.main(["sample", str(checkpoint), "--out", "made", "--count=6", "--columns=3"])
    assert size(tmp_path / "made/samples.png") == (36, 24)


@pytest.mark.parametrize(
    ("command", "file", "options", "expected"),
    [
        ("reconstruct", "reconstructions.png", ["--count=6", "--columns=3"], (36, 48)),
        ("interpolate", "interpolations.png", ["--count=2", "--steps=5"], (60, 24)),
        ("traverse", "traversals.png", ["--dimensions=3", "--steps=5"], (60, 36)),
    ],
)
def test_pictures_of_test_samples(checkpoint, tmp_path, monkeypatch, command, file, options, expected):
    monkeypatch.chdir(tmp_path)
    command_line.main([command, str(checkpoint), "--out=made", "--data=SklearnDigits", *options])
    assert size(tmp_path / "made" / file) == expected


@pytest.mark.parametrize("command", ["reconstruct", "interpolate", "traverse", "encode"])
def test_a_command_takes_the_data_of_the_training(checkpoint, tmp_path, command):
    command_line.main([command, str(checkpoint), "--out", str(tmp_path / "made")])
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_encode_writes_latents_labels_and_names(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12), dtype=np.uint8)).save(pictures / name)
    (pictures / "a/broken.png").write_text("no image")
    options = ["--data.size=8", "--data.mode=grey", "--data.workers=0"]
    command_line.main(["encode", str(checkpoint), "--out=made", "--data=ImageFolder", f"--data.root={pictures}", *options])
    with np.load(tmp_path / "made/latents.npz") as latents:
        assert latents["z"].shape == (3, 4)
        assert latents["name"].tolist() == ["a/1.png", "a/2.png", "b/3.png"]
        assert latents["label"].tolist() == [0, 0, 1]


def start(folder: Path, *arguments) -> subprocess.Popen:
    """A training without an end, once it has taken steps."""
    (folder / "small.yaml").write_text(CONFIG)
    endless = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--model.schedule=constant", "--checkpoint.every_n_train_steps=4"]
    command = [*COMMAND, "fit", "--config=small.yaml", *endless, *arguments]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so does all that it starts itself.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    waited = time.monotonic() + 300
    while not list(folder.rglob("*.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < waited, "no step was taken"
        time.sleep(0.2)
    return process


def end(process: subprocess.Popen, number: signal.Signals) -> str:
    """Sends a signal; what the process then writes to stderr."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=300)[1]
    finally:
        process.kill()


def test_sigterm_leaves_a_checkpoint_that_resumes(tmp_path):
    process = start(tmp_path)
    errors = end(process, signal.SIGTERM)
    assert process.returncode == command_line_status("TERMINATED")
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].endswith("fastvae: ended by SIGTERM; fit --ckpt_path .../last.ckpt goes on")
    last = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"]
    assert steps >= 4
    options = [f"--trainer.max_steps={steps + 2}", "--model.schedule=constant", f"--ckpt_path={last}"]
    fastvae("fit", "--config=small.yaml", *options, folder=tmp_path)
    resumed = tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt"
    assert torch.load(resumed, weights_only=True)["global_step"] == steps + 2


def command_line_status(name: str) -> int:
    from fastvae.training import cli

    return getattr(cli, name)


def test_ctrl_c_ends_without_a_traceback(tmp_path):
    process = start(tmp_path)
    errors = end(process, signal.SIGINT)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" in errors.strip().splitlines()[-1] or "interrupted" in errors


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(["fit", "--config", str(path), "--print_config"])
    assert ended.value.code in (0, None)
    assert "fastvae.training.networks." in capsys.readouterr().out


def test_there_is_a_config_for_each_kind_of_model():
    text = "\n".join(path.read_text() for path in CONFIGS)
    from fastvae.models import registry

    assert [model.__name__ for model in registry.MODELS if f"class_path: {model.__name__}_" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], r"command: got 'smaple', did you mean sample\?"),
        (["fit", "--network=VAE_mpl"], "network: got 'VAE_mpl', did you mean VAE_mlp"),
        (["fit", "--data=MNISTDigit"], "data: got 'MNISTDigit', did you mean MNISTDigits"),
        (["fit", "--model.lerning_rate=1"], "--model.lerning_rate=1: did you mean learning_rate"),
        (["fit", "--network.latnt_dim=3"], "'latnt_dim' is not accepted: did you mean latent_dim"),
        (["fit", "--model.learning_rate=fast"], "model.learning_rate.*float.*fast"),
        (["fit", "--config=missing.yaml"], "missing.yaml"),
        (["fit", "--data=SklearnDigits"], r"network: does not take the samples of SklearnDigits, of shape \(1, 8, 8\): "),
        (["fit", "--data.batch_size=0"], "batch_size: got 0, takes"),
        (["fit", "--network.beta=-1"], "beta: got -1.0, takes"),
        (["sample", "missing.ckpt"], "checkpoint: missing.ckpt is no file"),
        (["test", "missing.ckpt"], "checkpoint: missing.ckpt is no file"),
        (["validate"], "ckpt_path: validate takes a checkpoint of fastvae fit"),
        (["fit", "--data=null"], "data: got none, takes one of MNISTDigits"),
        (["fit", f"--ckpt_path={__file__}"], "checkpoint: .* was not written by torch.save"),
        (["encode", "missing.ckpt", "--data=MNISTDigit"], "data: got 'MNISTDigit', did you mean MNISTDigits"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_names_that_do_not_exist(arguments, message):
    with pytest.raises(SystemExit, match=rf"^fastvae: .*{message}") as ended:
        command_line.main(arguments)
    assert "\n" not in ended.value.code


def test_a_broken_image_in_a_worker_process_is_one_line(tmp_path):
    """Those of the validation part, so that nothing has been read before."""
    for number in range(5):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{number}.png")
    folder = ImageFolder(tmp_path, val=0.4)
    folder.setup()
    for index in folder.indices.val:
        folder.source.paths[index].write_text("no image")
    data = ["--data=ImageFolder", f"--data.root={tmp_path}", "--data.size=8", "--data.mode=grey", "--data.workers=1"]
    network = ["--network=VAE_mlp", "--network.data_shape=[1,8,8]", "--network.hidden=[8]"]
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit, match=r"^fastvae: none of the 2 images of a batch can be read: .*: cannot identify image file [^\n]*$"):
        command_line.main(["fit", *data, "--data.val=0.4", *network, *quiet])


def test_files_that_are_no_checkpoints(tmp_path):
    for name, content in (
        ("text", None),
        ("list", [1]),
        ("other", {"state_dict": {}}),
        ("newer", {"fastvae": {"format": 9, "version": "9"}}),
    ):
        path = tmp_path / name
        path.write_text("text") if content is None else torch.save(content, path)
        with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: ") as ended:
            command_line.main(["sample", str(path)])
        assert "\n" not in ended.value.code
    assert "got format 9, which fastvae 9 wrote" in ended.value.code


def test_data_of_another_shape(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=r"MNISTDigits has samples of shape \(1, 28, 28\), the checkpoint was trained on SklearnDigits"):
        command_line.main(["reconstruct", str(checkpoint), "--data=MNISTDigits", "--out", str(tmp_path)])


def test_downloads_without_torchvision_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match=r"^fastvae: torchvision is not installed: pip install torchvision$"):
        command_line.main(["fit", "--data=TorchvisionImages", "--data.name=CIFAR10", *QUIET])


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments, capsys):
    command_line.main(arguments)
    printed = capsys.readouterr().out
    for command in (*command_line.TRAININGS, *command_line.AFTER_TRAINING, "demo", "info"):
        assert f"  {command} " in printed
