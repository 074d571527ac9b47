"""Where the time of a training step goes, by kind of operator: ``python -m benchmarks.profile_conv_vae [case ...]``.

For each provider of a case of :mod:`benchmarks.bench_conv_vae` a profile of a few steps on the CPU, the operators' own time added up by
kind, and the kinds stacked in a bar.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure as Picture
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import registry, results
from benchmarks.bench_conv_vae import CASES
from benchmarks.devices import Cpu
from benchmarks.tables import describe_processor, profile_name

# The first kind whose words are in an operator's name has it.
KINDS = {
    "norms and activations": ("group_norm", "rms_norm", "vector_norm", "silu"),
    "convolution, backward": ("convolution_backward",),
    "convolution, forward": ("convolution",),
    "copies, casts and layouts": ("copy", "clone", "contiguous", "_to_copy", "cat", "fill", "zero", "empty"),
    "up- and downsampling": ("upsample", "pad", "Interleave", "Separate"),
    "loss and sampling": ("latent_", "reconstruction_", "binary_cross_entropy", "log_sigmoid", "exp", "pow", "sum"),
    "optimizer": ("Optimizer", "_foreach", "_fused", "addcdiv", "addcmul", "sqrt", "lerp"),
    "compiled code": ("Compiled", "cpp_fused"),
}
OTHER = "other"
COLOURS = ("#d62728", "#08519c", "#6baed6", "#ff7f0e", "#9467bd", "#2ca02c", "#8c564b", "#bcbd22", "#c7c7c7")


def kind_of(operator: str) -> str:
    for kind, words in KINDS.items():
        if any(word in operator for word in words):
            return kind
    return OTHER


def profile_step(operation: registry.Operation, steps: int) -> Counter:
    """Milliseconds a step of each kind."""
    operation()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            operation()
    times = Counter()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total * 1e-3 / steps
    return times


def measure(case: registry.Case, steps: int) -> dict[str, Counter]:
    profiles = {}
    for name, provider in tqdm(case.providers.items(), desc=case.id):
        torch.compiler.reset()
        try:
            profiles[name] = profile_step(provider(case.make_inputs(torch.device("cpu"))), steps)
        except registry.Unavailable as reason:
            tqdm.write(f"{name}: not measured, {reason}")
    return profiles


def draw(path: Path, profiles: dict[str, Counter], title: str) -> None:
    picture = Picture(figsize=(9, 1.6 + 0.42 * len(profiles)), layout="constrained")
    axes = picture.add_subplot()
    names = list(profiles)
    left = [0.0] * len(names)
    for kind, colour in zip((*KINDS, OTHER), COLOURS, strict=True):
        widths = [profiles[name][kind] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.bar_label(axes.containers[-1], labels=[f" {total:.0f} ms" for total in left], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("time of the operators in a training step (ms)", fontsize=9)
    axes.set_title(title, fontsize=10)
    picture.legend(loc="outside lower center", ncols=3, fontsize=8)
    picture.savefig(path, dpi=120)


def main() -> None:
    cases = {case.id: case for case in CASES}
    parser = argparse.ArgumentParser("python -m benchmarks.profile_conv_vae", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(cases)}; default: in the dtype that suits the processor")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY, metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    processor = results.describe_run(Cpu())
    suitable = "bfloat16" if "avx512_bf16" in processor.features.split() else "float32"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or [name for name, case in cases.items() if case.dtype_name == suitable]:
        if name not in cases:
            parser.error(f"case: got {name!r}, takes {', '.join(cases)}")
        profiles = measure(cases[name], arguments.steps)
        path = arguments.out / profile_name(processor.slug, name)
        draw(path, profiles, f"{name}: {describe_processor(processor)}")
        for provider, times in profiles.items():
            print(f"{provider}: {', '.join(f'{kind} {ms:.0f} ms' for kind, ms in times.most_common())}")
        print(f"The picture is {path}.")


if __name__ == "__main__":
    main()
