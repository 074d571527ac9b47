"""Cases of codebooks: searches, quantizers, moving averages and the entropy of binary codes."""

import torch
from _fuzz import LAYOUTS, Draw, Size, Trial
from _fuzz_bounds import largest, loss_weights, reduced
from _helpers import lay_out
from test_codebook import assert_nearest, assert_nearest_in_float64
from torch import Tensor

from fastvae.functional.codebook import GRADIENTS
from fastvae.ops._results import REDUCTIONS


def _vectors(draw: Draw, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    values = draw.normal(rows, dim, dtype=dtype)
    if draw.extreme and values.numel():
        values = values.contiguous()
        values[draw.random.randrange(rows), draw.random.randrange(dim)] = draw.choice((float("nan"), float("inf"), -float("inf"), 0.0))
    return values


def _codes(draw: Draw, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Any, near one another, several times the same, or some of the vectors: what a search has to tell apart."""
    kind, dim = draw.choice(("any", "any", "near", "twice", "vectors", "grid")), x.shape[1]
    codes = torch.randn(count, dim, generator=draw.generator, dtype=torch.float64)
    if kind == "near":
        codes = codes[:1] + 1e-6 * codes
    elif kind == "twice":
        codes = codes[torch.arange(count) // 2]
    elif kind == "vectors" and x.shape[0]:
        codes = x.double().nan_to_num(0.0, 0.0, 0.0)[torch.arange(count) % x.shape[0]]
    elif kind == "grid":
        codes = codes.round()
    return lay_out(codes.to(dtype), draw.choice(LAYOUTS))


def _search(draw: Draw) -> tuple[Tensor, Tensor]:
    rows, dim, count = (
        draw.choice((0, 1, 2, 7, 16, 33, 64)),
        draw.choice((1, 2, 3, 4, 5, 8, 9, 16, 17, 33)),
        draw.choice((1, 2, 3, 7, 16, 33, 65)),
    )
    if draw.extreme and rows == 0:
        rows = 3
    code_dtype = draw.dtype if draw.dtype == torch.float64 else draw.choice((draw.dtype, torch.float32))
    x = _vectors(draw, rows, dim, draw.dtype)
    return x, _codes(draw, x, count, code_dtype)


def _wrong_index(x: Tensor, codebook: Tensor, indices: Tensor) -> str | None:
    """Exact arithmetic decides where float64 does not agree; the fallback rounds as float64 does."""
    finite = torch.isfinite(x).all(-1)
    if bool(indices[~finite].any()):
        return f"vectors that are not finite have the indices {indices[~finite].tolist()}, not 0"
    try:
        assert_nearest(x[finite], codebook, indices[finite])
    except AssertionError:
        try:
            assert_nearest_in_float64(x[finite], codebook, indices[finite])
        except AssertionError as error:
            return f"a nearer code exists: {error}"
    return None


def nearest(draw: Draw) -> Trial:
    x, codebook = _search(draw)

    def check(tensors, actual):
        return _wrong_index(tensors["x"], tensors["codebook"], actual["output 0"])

    def sizes(wide, oracle, incoming):
        return {"output 1": Size(oracle["output 1"].nan_to_num(0.0, 0.0, 0.0))}

    return Trial(
        lambda module, t: module.vq_nearest(t["x"], t["codebook"], return_distance=True),
        {"x": x, "codebook": codebook}, (), sizes, draw.extreme,
        skip=("output 0",), check=check,
    )  # fmt: skip


def quantize(draw: Draw) -> Trial | None:
    # Vectors that are not finite are a matter of the search.
    draw.extreme = False
    x, codebook = _search(draw)
    options = {
        "commitment_cost": draw.choice((0.25, 0.0, 1.0)),
        "codebook_cost": draw.choice((1.0, 0.0, 0.5)),
        "gradient": draw.choice(GRADIENTS),
        "reduction": draw.choice(tuple(REDUCTIONS)),
    }
    if not _is_clear(x, codebook):
        return None

    def sizes(wide, oracle, incoming):
        x, codes = wide["x"], wide["codebook"][oracle["output 1"]]
        error, costs = (x - codes).abs(), options["commitment_cost"] + options["codebook_cost"]
        flow, by_loss = incoming[0].double().abs(), loss_weights(incoming[1], x.shape, options["reduction"])
        through = flow
        if options["gradient"] == "rotation":
            # Two reflections, each of which adds a projection of the whole row.
            scale = codes.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
            through = scale * 8.0 * flow.norm(dim=1, keepdim=True) * (1.0 + _condition(x, codes))
        pull = 2.0 * by_loss * error
        shared = torch.zeros_like(wide["codebook"]).index_add_(0, oracle["output 1"], options["codebook_cost"] * pull)
        return {
            "output 0": Size(0.0),
            "output 2": Size(reduced(costs * error.square(), options["reduction"])),
            "gradient of x": Size(through + options["commitment_cost"] * pull),
            "gradient of codebook": Size(shared),
        }

    return Trial(
        lambda module, t: tuple(module.vector_quantize(**t, **options)),
        {"x": x, "codebook": codebook},
        ("x", "codebook"),
        sizes,
        draw.extreme,
    )


def _condition(x: Tensor, codes: Tensor) -> Tensor:
    """How much the halfway vector of a rotation magnifies rounding: without bound where vector and code are opposite."""
    units = [t / t.norm(dim=1, keepdim=True).clamp(min=1e-300) for t in (x, codes)]
    return 4.0 / (units[0] + units[1]).norm(dim=1, keepdim=True).clamp(min=1e-6)


def _is_clear(x: Tensor, codebook: Tensor) -> bool:
    """Whether float64 tells the nearest code of each vector from all different ones, so that all searches find the same index."""
    finite = x.double()[torch.isfinite(x).all(-1)]
    if finite.shape[0] == 0 or codebook.shape[0] == 1:
        return True
    distances = (finite[:, None] - codebook.double()).square().sum(-1)
    least, index = distances.min(1, keepdim=True)
    same = (codebook[index[:, 0]][:, None] == codebook).all(-1)
    return bool((same | (distances - least > 1e-12 * distances)).all())


def residual(draw: Draw) -> Trial:
    """The definition rounds codes and what is left of a vector to its dtype, so the oracle is the reference's operator in that dtype."""
    rows, dim = draw.choice((0, 1, 2, 7, 17, 33)), draw.choice((1, 2, 3, 5, 8, 17))
    steps, count = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 7, 16, 33))
    codebooks = draw.normal(steps, count, dim, layout=False) * 0.5 ** torch.arange(steps).to(draw.dtype)[:, None, None]
    tensors = {"x": draw.normal(rows, dim), "codebooks": lay_out(codebooks, draw.choice(("contiguous", "permuted", "sliced", "offset")))}
    if draw.chance(0.4):
        tensors["mask"] = torch.rand(rows, generator=draw.generator) < 0.6
    options = {"commitment_cost": draw.choice((0.25, 1.0)), "codebook_cost": draw.choice((0.0, 0.7))}

    def call(module, t):
        return tuple(module.residual_quantize(t["x"], t["codebooks"], mask=t.get("mask"), **options))

    def sizes(wide, oracle, incoming):
        """Both round once, from sums in another order."""
        return {name: Size(max(1.0, largest(t)), max(1.0, largest(t)) if t.dtype.itemsize > 2 else 0.0, 2) for name, t in oracle.items()}

    return Trial(call, tensors, ("x", "codebooks"), sizes, extreme=False, oracle=lambda tensors: tensors, by_operator=True)


def moving_average(draw: Draw) -> Trial:
    x, codebook = _search(draw)
    count = codebook.shape[0]
    state = torch.float64 if draw.dtype == torch.float64 else torch.float32
    codebook = codebook.to(state)
    indices = torch.randint(-1, count, x.shape[:1], generator=draw.generator)
    tensors = {
        "codebook": codebook, "ema_count": draw.uniform(count, dtype=state) * 3.0, "ema_sum": draw.normal(*codebook.shape, dtype=state),
        "x": x, "indices": indices,
    }  # fmt: skip
    # An expanded tensor cannot be written to.
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    options = {"decay": draw.choice((0.99, 0.5, 0.0, 1.0)), "eps": draw.choice((1e-5, 1e-2))}

    def call(module, t):
        moved = [t[name].clone() for name in ("codebook", "ema_count", "ema_sum")]
        return module.codebook_ema_update_(*moved, t["x"], t["indices"], **options), *moved

    def sizes(wide, oracle, incoming):
        kept = (indices >= 0) & torch.isfinite(x).all(-1)
        sums = torch.zeros_like(wide["codebook"]).index_add_(0, indices[kept], wide["x"][kept].abs())
        moved = options["decay"] * wide["ema_sum"].abs() + (1.0 - options["decay"]) * sums
        n = oracle["output 2"]
        total = n.sum()
        smoothed = (n + options["eps"]) / (total + count * options["eps"]) * total
        # Where a code is all but empty its count is the difference of rounded numbers.
        return {
            "output 1": Size(torch.where(smoothed[:, None] > 0, 4.0 * moved / smoothed[:, None], wide["codebook"].abs())),
            "output 2": Size(n.abs() + count),
            "output 3": Size(moved),
        }

    return Trial(call, tensors, (), sizes, draw.extreme)


def binary_entropy(draw: Draw) -> Trial:
    rows, dim = draw.choice((0, 1, 2, 7, 17, 40)), draw.choice((1, 2, 3, 4, 5, 7, 8))
    x = draw.values(rows, dim)
    tensors = {"x": x}
    if draw.chance(0.3):
        tensors["mask"] = torch.rand(rows, generator=draw.generator) < 0.6
    inv_temperature = draw.choice((0.0, 0.4, 1.0, 5.0, 100.0))

    def sizes(wide, oracle, incoming):
        """The bounds of the tests of the family."""
        sizes = {name: max(largest(t), 1.0) for name, t in oracle.items()}
        flow = max((largest(g) for g in incoming), default=0.0)
        gradient = max(sizes.get("gradient of x", 1.0), 4.0 * inv_temperature * flow)
        return {name: Size(size) for name, size in sizes.items()} | {"gradient of x": Size(gradient, gradient)}

    return Trial(
        lambda module, t: module.binary_code_entropy(t["x"], inv_temperature, mask=t.get("mask")), tensors, ("x",), sizes, draw.extreme,
        backends=("fallback",), by_operator=draw.extreme,
    )  # fmt: skip
