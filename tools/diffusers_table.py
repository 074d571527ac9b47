"""Writes docs/diffusers.md, the coverage of diffusers by fastvae.optimize(): ``python tools/diffusers_table.py``. Needs diffusers."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers  # noqa: E402
import torch  # noqa: E402
from _diffusers import CASES, OTHERS, Case  # noqa: E402
from torch import nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from fastvae.nn.optimize import examine  # noqa: E402

PAGE = ROOT / "docs/diffusers.md"
_ACTIVATIONS = (nn.functional.silu, nn.functional.relu, torch.relu, nn.functional.gelu)


class _Observer(TorchFunctionMode):
    """Sees, in a call of a model, which normalisations have an output that SiLU, ReLU or GELU takes, or a view of it; wherever in the code
    that is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.sites: dict[str, str] = {}
        # The outputs are kept, so that no two of them share memory.
        self._outputs: list[torch.Tensor] = []
        self._norms: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):
        def remember(module, inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            self._outputs.append(tensor)
            self._norms[tensor.untyped_storage().data_ptr()] = name, type(module).__name__

        return remember

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in _ACTIVATIONS:
            name, kind = self._norms.get(arguments[0].untyped_storage().data_ptr(), (None, None))
            if name is not None:
                self.sites[name] = kind
        return function(*arguments, **(options or {}))


def observed(case: Case) -> dict[str, str]:
    """The names of the normalisations that SiLU, ReLU or GELU follows in a call, each with its class."""
    model = case.model()
    with torch.no_grad(), _Observer(model) as observer:
        model(case.input(), **case.call)
    return observer.sites


@dataclass(frozen=True)
class Row:
    """What optimize() does with a class: the classes of its norms that an activation follows, those norms, those of them that are fused,
    and the reasons why others are left, each with the number of them."""

    name: str
    norms: tuple[str, ...]
    sites: frozenset[str]
    fused: frozenset[str]
    left: Counter

    @property
    def is_whole(self) -> bool:
        return self.fused == self.sites

    def __str__(self) -> str:
        why = "; ".join(f"{number}: {reason}" for reason, number in sorted(self.left.items()))
        cells = self.name, ", ".join(self.norms), len(self.sites), len(self.fused), self.left.total(), why
        return f"| {' | '.join(map(str, cells))} |"


def row(case: Case) -> Row:
    sites = {name: kind for name, kind in observed(case).items() if "SpatialNorm" not in kind}
    findings = examine(case.model())
    fused = frozenset(finding.name for finding in findings if finding.followed_by and finding.name in sites)
    left = Counter(finding.reason for finding in findings if not finding.followed_by)
    return Row(case.name, tuple(sorted(set(sites.values()))), frozenset(sites), fused, left)


_PAGE = """\
# Coverage of diffusers

`fastvae.optimize` on every autoencoder of diffusers {version}, each on a tiny configuration. `python tools/diffusers_table.py` writes
this page; a test holds it to the code, and what the models give to what they gave before.

| class | norms | sites | fused | left | why |
|---|---|---|---|---|---|
{rows}

* **norms**: the classes of the normalisations whose output SiLU, ReLU or GELU takes, as a call of the model shows.
* **sites**: how many of these there are. Spatial norms, which scale and shift by the latents, are not counted.
* **fused**: how many of them are one operator with the activation after `optimize`.
* **left**: how many other normalisations `optimize` looked at and left alone; **why**: the reasons, with the number of each.

Of the {with_sites} configurations with such sites {whole} are fused at every one.

## Classes without such a site

| class | what it has instead |
|---|---|
{others}
"""


def page(rows: list[Row]) -> str:
    with_sites = [row for row in rows if row.sites]
    return _PAGE.format(
        version=diffusers.__version__,
        rows="\n".join(map(str, rows)),
        with_sites=len(with_sites),
        whole=sum(row.is_whole for row in with_sites),
        others="\n".join(f"| {name} | {reason} |" for name, reason in OTHERS.items()),
    )


def main() -> None:
    # More threads only wait for each other, on tensors as small as these.
    torch.set_num_threads(1)
    PAGE.write_text(page([row(case) for case in CASES]))


if __name__ == "__main__":
    main()
