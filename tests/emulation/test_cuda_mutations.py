"""Each barrier and each fence of csrc/cuda/ is taken away in turn: the emulation misses it, or it is listed here with a reason.

Only the build that watches every access can tell. A barrier is named by its file, its function, and its number there.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import test_codebook as codebook_contract
import torch
from _calls import CALLS_OF_KERNELS
from _helpers import Source

import fastvae
from fastvae import functional as FV

pytestmark = [pytest.mark.prove, pytest.mark.build("races")]
SOURCES = Path(__file__).resolve().parent.parent.parent / "csrc" / "cuda"
PRIMITIVES = {"__syncthreads": "barrier", "__syncwarp": "warp barrier", "__threadfence": "fence"}

# Barriers and fences without which the results would be the same, and why.
REDUNDANT = {
    "codebook_recheck.cuh block_min: barrier 2": "block_sum() follows each call, and its barriers come before the next call writes",
    "codebook_recheck.cuh codebook_recheck_kernel: barrier 1": "a barrier of block_sum() or decide() follows each read",
    "group_norm_device.cuh group_sums: barrier 2": "no kernel calls it twice with one number of sums, each of which has memory of its own",
    "reduce.cuh column_block_sum: barrier 2": "no kernel calls it twice with one type, and each type has memory of its own",
}


class Site(NamedTuple):
    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return self.name


def sites() -> list[Site]:
    """By scanning the sources."""
    found, counts = [], {}
    for path in sorted(SOURCES.iterdir()):
        function = "?"
        for number, text in enumerate(path.read_text().splitlines(), 1):
            code = text.split("//")[0]
            function = function_of(code) or function
            for primitive, kind in PRIMITIVES.items():
                for _ in re.finditer(primitive + r"\(\)", code):
                    key = path.name, function, kind
                    counts[key] = counts.get(key, 0) + 1
                    found.append(Site(path.name, number, f"{path.name} {function}: {kind} {counts[key]}"))
    return found


def function_of(code: str) -> str | None:
    """The function whose declaration has its name in this line."""
    if re.match(r"(  )?(__global__|__device__)|    \w+_kernel\(const", code):
        return next((name for name in re.findall(r"(\w+)\(", code) if name != "__launch_bounds__"), None)
    return None


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def differentiate(outputs, inputs):
    outputs = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])


def losses(reduction, *shape):
    x, logvar = leaves(normal(*shape), torch.zeros(1))
    return differentiate([FV.gaussian_nll(x, normal(*shape, seed=1), logvar, reduction=reduction)], [x, logvar])


def shared_log_variance():
    x, logvar = leaves(normal(40, 70, 9), torch.zeros(70, 1))
    return differentiate([FV.gaussian_nll(x, normal(40, 70, 9, seed=1), logvar)], [x, logvar])


def several_samples():
    mu, logvar = leaves(normal(3, 300), normal(3, 300, seed=1))
    return differentiate(FV.reparameterize_kl(mu, logvar, num_samples=9, seed=3, free_bits=0.1), [mu, logvar])


def group_norm(channels_last, *shape):
    x = normal(*shape)
    x, weight = leaves(x.to(memory_format=torch.channels_last) if channels_last else x, torch.ones(shape[1]))
    return differentiate([FV.group_norm_silu(x, 2, weight)], [x, weight])


def rms_norm(channels_last, *shape):
    x = normal(*shape)
    x, weight = leaves(x.to(memory_format=torch.channels_last) if channels_last else x, torch.ones(shape[1]))
    return differentiate([FV.rms_norm_silu(x, weight)], [x, weight])


def nearest(data, rows, dim, codes):
    return FV.vq_nearest(*data(Source("cpu"), rows, dim, codes))


def two_clusters(source, rows, dim, codes):
    """In float32 the codes of a cluster are equally far from a row; in float64 they are not."""
    centre = 10 * source.normal(dim)
    sign = 1 - 2 * (torch.arange(codes) % 2)[:, None]
    return source.normal(rows, dim), sign * centre + 1e-5 * source.normal(codes, dim)


def near_the_last(source, rows, dim, codes):
    """The nearest codes are the last ones, which the last of several blocks finds."""
    x, codebook = codebook_contract.nearly_duplicated(source, rows, dim, codes)
    return x, codebook.flip(0)


def quantize(dim, codes=70):
    x, codebook = leaves(*codebook_contract.random(Source("cpu"), 300, dim, codes))
    output = FV.vector_quantize(x, codebook, reduction="sum")
    return differentiate([output.quantized, output.loss], [x, codebook])


# Calls that together run every kernel, with enough blocks, steps and splits for each barrier to matter. The cheap ones come first.
EXTRA = {
    "a sum in several blocks": lambda: losses("sum", 5, 4099),
    "sums of short rows": lambda: losses("sample", 1500, 9),
    "sums of long rows": lambda: losses("sample", 3, 5000),
    "sums of columns": shared_log_variance,
    "several samples": several_samples,
    "group norm": lambda: group_norm(False, 2, 16, 8, 8),
    "group norm, channels last": lambda: group_norm(True, 2, 64, 8, 8),
    "large groups": lambda: group_norm(False, 2, 4, 60, 50),
    "large groups, channels last": lambda: group_norm(True, 2, 4, 60, 50),
    "RMS norm": lambda: rms_norm(False, 1, 40, 20, 40),
    "RMS norm, channels last": lambda: rms_norm(True, 1, 40, 8, 8),
    "RMS norm of many channels, channels last": lambda: rms_norm(True, 1, 520, 4, 5),
    "short rows": lambda: nearest(codebook_contract.random, 300, 7, 600),
    "long rows": lambda: nearest(codebook_contract.random, 100, 33, 200),
    "long rows in one split": lambda: nearest(codebook_contract.random, 300, 33, 200),
    "undecided short rows": lambda: nearest(codebook_contract.permuted_ties, 12, 7, 300),
    "undecided long rows": lambda: nearest(codebook_contract.permuted_ties, 12, 33, 150),
    "rows between two codes": lambda: nearest(codebook_contract.midway, 12, 33, 150),
    "many close codes": lambda: nearest(two_clusters, 3, 33, 100),
    "more close codes than a block keeps": lambda: nearest(two_clusters, 3, 33, 800),
    "a row that blocks share": lambda: nearest(near_the_last, 1, 33, 1100),
    "a row that blocks share, of many close codes": lambda: nearest(two_clusters, 1, 33, 1100),
    "rows that are far": lambda: nearest(codebook_contract.far_rows, 12, 33, 150),
    "quantized short rows": lambda: quantize(7),
    "quantized long rows": lambda: quantize(33),
    "more codes than a step of their offsets": lambda: quantize(3, 1100),
}


def run(call) -> None:
    """Errors are of no interest: without a barrier any number may come out."""
    with fastvae.use_backend("cuda"):
        if callable(call):
            call()
        else:
            call.results(call.tensors("cpu", 5))


@pytest.fixture(scope="module")
def reaching(emulated) -> dict[tuple[str, int], list]:
    """The calls that come to each site, where nothing is taken away; there they are without a report."""
    emulated.reset(capturing=False)
    found = {}
    for name, call in {**{call.name: call for call in CALLS_OF_KERNELS}, **EXTRA}.items():
        emulated.take_reached()
        run(call)
        assert emulated.take_reports() == [], name
        for site in emulated.take_reached():
            found.setdefault(site, []).append(call)
    return found


@pytest.mark.parametrize("site", sites(), ids=str)
def test_it_is_missed_or_redundant(emulated, reaching, site):
    calls = reaching.get((site.file, site.line), [])
    assert calls, "no call comes to it"
    emulated.remove_site(site.file.encode(), site.line)
    reports = []
    for call in calls:
        run(call)
        reports += emulated.take_reports()
        if reports:
            break
    emulated.remove_site(b"", 0)
    assert bool(reports) != (site.name in REDUNDANT), reports


def test_the_redundant_ones_are_there():
    assert REDUNDANT.keys() <= {site.name for site in sites()}
