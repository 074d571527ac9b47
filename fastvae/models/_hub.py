"""The methods ``save_pretrained`` and ``from_pretrained`` of every model."""

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

AnyModel = TypeVar("AnyModel", bound="Pretrained")


class Pretrained:
    """Gives a model the two functions of :mod:`fastvae.models.pretrained` as methods.

    They are imported when they are called: that module knows every model.
    """

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``model.safetensors`` and ``config.json``; for a model that a ready-made network made."""
        from fastvae.models import pretrained

        assert isinstance(self, nn.Module)
        pretrained.save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls: type[AnyModel], source: str | Path, **download: Any) -> AnyModel:
        """The model of a folder, or of a repository of the Hugging Face hub, in evaluation mode.

        Args:
            source: the folder, or ``"owner/name"``.
            download: options of ``huggingface_hub.hf_hub_download``, such as ``revision`` and ``token``.

        Raises:
            ValueError: for a model of another class.
        """
        from fastvae.models import pretrained

        model = pretrained.from_pretrained(source, **download)
        if not isinstance(model, cls):
            raise ValueError(f"source: {source} holds a {type(model).__name__}, takes a {cls.__name__}")
        return model
