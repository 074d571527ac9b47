"""Lets a checkout import its Triton kernels, which lie beside the package there, in kernels/; a wheel holds them as fastvae/kernels/."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).parent
_KERNELS = _PACKAGE.parent / "kernels"


class _KernelsFinder:
    """Finds ``fastvae.kernels``, and nothing else, outside the package's folder."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "fastvae.kernels":
            return None
        return spec_from_file_location(name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)])


def map_kernels() -> None:
    """The finder goes first: that of an editable install, which may be of another checkout, knows the name too."""
    if not (_PACKAGE / "kernels").is_dir():
        sys.meta_path.insert(0, _KernelsFinder)
