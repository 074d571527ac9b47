"""Models by the names of their networks, and in folders as the Hugging Face hub has them."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

for package in ("safetensors", "huggingface_hub"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

import huggingface_hub  # noqa: E402
from huggingface_hub import hub_mixin  # noqa: E402
from torch import nn  # noqa: E402

from fastvae.distributions import GaussianLikelihood  # noqa: E402
from fastvae.models import AE, VAE, VQVAE, VQVAE2, DeepVAE, DenoisingAE, ImageVAE, LadderVAE, SparseAE, pretrained, registry  # noqa: E402
from fastvae.nn import CapacitySchedule, LinearSchedule, Masking  # noqa: E402

SMALL = {"num_codes": 8, "dim": 4, "channels": 8, "hidden": 4, "blocks": 1}
MODELS = {
    "AE": lambda: AE.mlp((1, 8, 8), (6,), 3),
    "linear": lambda: AE.linear(16, 3),
    "DenoisingAE": lambda: DenoisingAE.mlp(16, (6,), 3, corruption=Masking(0.2)),
    "SparseAE": lambda: SparseAE.mlp(16, (6,), 3, code="sigmoid", rho=0.1),
    "VAE": lambda: VAE.mlp(16, (6,), 3, beta=LinearSchedule(7), capacity=CapacitySchedule(9)),
    "learned variance": lambda: VAE.mlp(16, (6,), 3, likelihood=GaussianLikelihood("global")),
    "ImageVAE": lambda: ImageVAE.residual(3, (8, 16), 1, 4, image_size=(16, 8)),
    "LadderVAE": lambda: LadderVAE.mlp((1, 8, 8), (16, 12), (4, 3), posterior="plain", free_bits=(0.1, 0.2)),
    "DeepVAE": lambda: DeepVAE.residual((8, 4), 3, (4, 8), (1, 2), 2, 2, beta=LinearSchedule(7)),
    "VQVAE": lambda: VQVAE.conv(3, **SMALL, cosine=True),
    "VQVAE2": lambda: VQVAE2.conv(3, **SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_made_again(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert repr(again) == repr(model)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def make_network(name):
    """With the sizes that have no default."""
    if name.startswith("IndexPrior"):
        return registry.find_network(name)(VQVAE.conv(1, num_codes=4, dim=2, channels=4), (2, 2))
    sizes = {"data_shape": 16, "latent_dim": 3} if name.endswith("linear") else {}
    others = {"BetaTCVAE": {"dataset_size": 100}, "SequenceVAE": {"num_tokens": 5}}.get(name.split(".")[0], {})
    return registry.find_network(name)(**sizes, **others)


def test_every_network_can_be_described():
    made = {name: make_network(name) for name in registry.networks()}
    assert {name.split(".")[0] for name in made} == {model.__name__ for model in registry.MODELS}
    for name, model in made.items():
        description = json.loads(json.dumps(registry.describe(model)))
        assert description["network"] == name
        assert registry.build(description).recipe.name == name


def batch_for(model) -> tuple[torch.Tensor, ...]:
    """Two samples of what a network takes by default, with classes where it takes them."""
    name = model.recipe.name
    if name.startswith("SequenceVAE"):
        return (torch.randint(1, 5, (2, 6)),)
    if name.startswith("IndexPrior"):
        return (torch.rand(2, 1, 8, 8),)
    if name.endswith("linear"):
        return (torch.rand(2, 16),)
    shape = {"ImageVAE.residual": (3, 32, 32), "DeepVAE.residual": (3, 32, 32), "VQVAE.conv": (3, 16, 16), "VQVAE2.conv": (3, 16, 16)}
    x = torch.rand(2, *shape.get(name, (1, 28, 28)))
    return (x, torch.tensor([0, 9])) if getattr(model, "takes_labels", False) else (x,)


@pytest.mark.parametrize("name", registry.networks())
def test_every_network_learns_from_what_it_takes_by_default(name):
    model = make_network(name)
    output = model(*batch_for(model))
    sum(getattr(output, loss) for loss in ("loss", "discriminator_loss") if hasattr(output, loss)).backward()
    unused = [parameter for parameter, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert unused == []


def test_a_model_of_another_class_is_an_error(tmp_path):
    AE.mlp(16, (6,), 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^source: .* holds a AE, takes a VAE$"):
        VAE.from_pretrained(tmp_path)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^model: got AE of modules of one's own"):
        AE(nn.Linear(4, 2), nn.Linear(2, 4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^corruption: got Dropout, a stored model takes"):
        DenoisingAE.mlp(16, corruption=nn.Dropout()).save_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["missing", "a/b/c"])
def test_sources_that_are_not_there(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=r"^source: got .*takes a folder, or a repository"):
        pretrained.from_pretrained(str(tmp_path / source))


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json$"):
        pretrained.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="describes no network of fastvae"):
        pretrained.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"network": "VAE.cnv", "options": {}}')
    with pytest.raises(ValueError, match=r"^network: got 'VAE.cnv', did you mean VAE.conv"):
        pretrained.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"network": "VAE.conv", "options": {"latent": 3}}')
    with pytest.raises(ValueError, match=r"^network: VAE.conv of this version does not take the stored options"):
        pretrained.from_pretrained(tmp_path)


class Hub:
    """In place of the hub's interface: keeps what is uploaded."""

    uploaded: ClassVar[dict[str, bytes]] = {}

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **_):
        self.uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return f"https://hub/{repo_id}"


def test_a_model_is_uploaded(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    model = AE.mlp(16, (6,), 3)
    assert model.push_to_hub("owner/digits") == "https://hub/owner/digits"
    assert Hub.uploaded.keys() == {"README.md", "config.json", "model.safetensors"}
    for name, content in Hub.uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(AE.from_pretrained(tmp_path).encode(torch.ones(1, 16)), model.encode(torch.ones(1, 16)))


def test_a_repository_is_downloaded_at_the_revision_that_is_asked_for(monkeypatch, tmp_path):
    AE.mlp(16, (6,), 3).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(tmp_path / filename)

    for module in (hub_mixin, huggingface_hub):
        monkeypatch.setattr(module, "hf_hub_download", download)
    AE.from_pretrained("owner/digits", revision="v1")
    assert {("owner/digits", "config.json", "v1"), ("owner/digits", "model.safetensors", "v1")} == set(asked)


def test_weights_in_a_pickle_are_not_read(tmp_path):
    model = AE.mlp(16, (6,), 3)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors$"):
        AE.from_pretrained(tmp_path)


def test_models_work_without_the_hub():
    program = """
import sys
sys.modules["huggingface_hub"] = None
from fastvae.models import AE
model = AE.mlp(16, (6,), 3)
for call in (lambda: model.save_pretrained("x"), lambda: AE.from_pretrained("x"), lambda: model.push_to_hub("x/y")):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == 3 * "huggingface_hub is not installed: pip install fastvae-kernels[train]\n", result.stderr
