"""The methods ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of every model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from fastvae._extras import extra

AnyModel = TypeVar("AnyModel", bound="Pretrained")

try:
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError:
    # Models train without the hub. Their three methods say what to install.
    if not TYPE_CHECKING:
        PyTorchModelHubMixin = object


class Pretrained(PyTorchModelHubMixin):
    """Keeps a model in a folder or in a repository of the Hugging Face hub: ``model.safetensors``, ``config.json`` and a model card.

    The config is the model's recipe, from which a ready-made network makes it again, so its files hold no code.
    """

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes a model that a ready-made network made.

        Args:
            save_directory: the folder; it need not exist.
            options: those of ``huggingface_hub.PyTorchModelHubMixin``, such as ``push_to_hub=True`` and ``repo_id``.

        Raises:
            ValueError: for a model of modules of one's own, or with an option that cannot be stored.
            ModuleNotFoundError: without huggingface_hub, naming the extra to install.
        """
        _need_hub()
        return super().save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(cls: type[AnyModel], pretrained_model_name_or_path: str | Path, **options: Any) -> AnyModel:
        """The model of a folder or of a repository, in evaluation mode on the CPU.

        Args:
            pretrained_model_name_or_path: the folder, or the repository as ``"owner/name"``.
            options: those of ``huggingface_hub.PyTorchModelHubMixin``, such as ``revision`` and ``token``.

        Raises:
            FileNotFoundError: for a folder without the two files.
            ValueError: for a model of another class, or a config that describes no network of this package.
            ModuleNotFoundError: without huggingface_hub, naming the extra to install.
        """
        _need_hub()
        from fastvae.models import pretrained

        pretrained.check_source(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads a model that a ready-made network made; gives the address of the commit.

        Args:
            repo_id: the repository as ``"owner/name"``; it need not exist.
            options: those of ``huggingface_hub.PyTorchModelHubMixin``, such as ``private`` and ``token``.

        Raises:
            ValueError: for a model of modules of one's own, or with an option that cannot be stored.
            ModuleNotFoundError: without huggingface_hub, naming the extra to install.
        """
        _need_hub()
        return super().push_to_hub(repo_id, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        # It knows every model, so it is imported when all of them are.
        from fastvae.models import pretrained

        assert isinstance(self, nn.Module)
        pretrained.write(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls: type[AnyModel],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: Any,
    ) -> AnyModel:
        from fastvae.models import pretrained

        model = pretrained.from_pretrained(
            model_id, revision=revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token
        )
        if not isinstance(model, cls):
            raise ValueError(f"source: {model_id} holds a {type(model).__name__}, takes a {cls.__name__}")
        return model


def _need_hub() -> None:
    with extra("train"):
        import huggingface_hub  # noqa: F401
        import safetensors.torch  # noqa: F401
