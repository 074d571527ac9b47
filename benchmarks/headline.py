"""The four operations that the README begins with, on one processor."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.registry import OURS
from benchmarks.results import Figure

# Plain PyTorch and torch.compile in the variants that the cases have (layouts, precisions, another formula): the fastest one counts.
EAGER = ("eager", "eager-fp32", "eager-channels-last", "addmm")
COMPILED = ("compile", "compile-channels-last")


@dataclass(frozen=True)
class Headline:
    """An operation and the case that stands for it. ``conditions`` is what is done, a colon, and on what, with the case's size."""

    title: str
    conditions: str
    case: str


@dataclass(frozen=True)
class Row:
    """An operation with its figures; of plain PyTorch and of torch.compile the fastest."""

    title: str
    conditions: str
    fastvae: Figure
    eager: Figure
    compiled: Figure


HEADLINES = (
    Headline("Sampling and KL", "forward and backward: {0} x {1}", "reparameterize_kl-8192x128-float32"),
    Headline("BCE from logits", "forward and backward: {0} images of {1} x {2} x {3}", "bce_with_logits-32x3x256x256-float32"),
    Headline("Nearest codes (VQ)", "exact lookup: {0} vectors of {1} dimensions, {2} codes", "vq_nearest-32768x64x1024-float32"),
)
# The case is a training step in the precision that ImageVAE takes by itself.
STEP = "residual_vae_step-4x3x128x128-{precision}"
STEP_CONDITIONS = "forward, backward and Adam: {0} images of {1} x {2} x {3}"


def of_processor(figures: Iterable[Figure]) -> list[Row]:
    """The rows of the processor whose figures are the newest, of those where all four were measured; empty where there is none."""
    processors = defaultdict(list)
    for figure in figures:
        if figure.mode == "launch":
            processors[figure.slug].append(figure)
    complete = [rows for rows in map(_rows, processors.values()) if rows]
    return max(complete, key=lambda rows: max(row.fastvae.timestamp for row in rows), default=[])


def _rows(figures: list[Figure]) -> list[Row]:
    """Empty where one of the operations was not measured."""
    first = figures[0]
    in_hardware = first.device != "cpu" or "avx512_bf16" in first.features.split()
    step = STEP.format(precision="bfloat16" if in_hardware else "float32")
    rows = [_row(headline, figures) for headline in (*HEADLINES, Headline("Training step, conv VAE", STEP_CONDITIONS, step))]
    return rows if all(rows) else []


def _row(headline: Headline, figures: list[Figure]) -> Row | None:
    found = {figure.provider: figure for figure in figures if figure.case == headline.case}
    ours, eager, compiled = found.get(OURS), _fastest(found, EAGER), _fastest(found, COMPILED)
    if ours is None or eager is None or compiled is None:
        return None
    conditions = f"{headline.conditions.format(*ours.size.split('x'))}, {ours.dtype}"
    return Row(headline.title, conditions, ours, eager, compiled)


def _fastest(found: dict[str, Figure], providers: tuple[str, ...]) -> Figure | None:
    return min((found[name] for name in providers if name in found), key=lambda figure: figure.median_ms, default=None)
