"""The facts about this installation, and the backend that serves each operator: ``python -m fastvae.info``."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from fastvae import __version__, _backend, _load, ops

# Each has its row in docs/backends.md.
ENVIRONMENT = (
    "FASTVAE_BACKEND",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "CUDA_VISIBLE_DEVICES",
    "FASTVAE_BUILD",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "CUDA_HOME",
    "CXX",
    "CXXFLAGS",
)
# These flags of a processor, as Linux names them, decide what the kernels, oneDNN and the precision of a model do.
PROCESSOR_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)


def collect() -> dict:
    """The facts about this installation, ready for JSON, without the name of the user and the folder of the user's files.

    Returns:
        ``versions``; ``system``, which is the operating system and the processor; ``instruction_set`` in use and ``instruction_sets`` to
        choose from (``None`` and empty without the C++ module); ``build`` of the C++ module and ``cuda_build`` of the CUDA library
        (``None`` where it is not loaded); ``threads``; ``backends[device][backend]``, each with the ``dtypes`` it serves and, where it
        serves none or only some operators, the ``reason``; ``choice[device]`` among them, in words; ``environment``; ``cuda_devices`` and
        the ``driver`` of the GPU. No CUDA context is made where torch sees no device.
    """
    extension = sys.modules.get("fastvae._C")
    facts = {
        "versions": _versions(),
        "system": _system(),
        "instruction_set": extension.instruction_set() if extension else None,
        "instruction_sets": list(extension.instruction_sets()) if extension else [],
        "build": dict(extension.build_info()) if extension else {},
        "cuda_build": None if _backend.BACKENDS["cuda"].missing else _load.cuda_build(),
        "threads": _threads(),
        "backends": {device: {name: _support(name, device) for name in _backend.BACKENDS} for device in _devices()},
        "choice": {device: _choice(device) for device in _devices()},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "cuda_devices": _cuda_devices(),
        "driver": _driver(),
    }
    return _without_the_user(facts)


def _without_the_user(fact: Any) -> Any:
    """Reports are published: errors and variables name files, whose folders may name the user."""
    if isinstance(fact, dict):
        return {key: _without_the_user(value) for key, value in fact.items()}
    if isinstance(fact, list):
        return [_without_the_user(value) for value in fact]
    if not isinstance(fact, str):
        return fact
    home = os.path.expanduser("~")
    names = {os.environ.get(variable) for variable in ("LOGNAME", "USER", "USERNAME")} | {os.path.basename(home)}
    text = fact.replace(home, "~") if home != "/" else fact
    return re.sub(rf"(?<=/)({'|'.join(re.escape(name) for name in names if name)})(?=/|$)", "~", text) if any(names) else text


def _versions() -> dict[str, str | None]:
    return {
        "fastvae": __version__,
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
    }


def _triton_version() -> str | None:
    """Without importing it; builds for other devices come under other distribution names."""
    names = importlib.metadata.packages_distributions().get("triton")
    return importlib.metadata.version(names[0]) if names else None


def _system() -> dict[str, str]:
    """The operating system, and the processor with its instruction sets."""
    described, flags = _processor()
    return {
        "operating system": _operating_system(),
        "processor": described,
        "instructions": ", ".join(flag for flag in PROCESSOR_FLAGS if flag in flags) or "unknown",
        "used by torch": torch.backends.cpu.get_cpu_capability(),
    }


def _operating_system() -> str:
    """Never platform.uname(), which has the name of the machine."""
    described = [f"{platform.system()} {platform.release()} {platform.machine()}", " ".join(platform.libc_ver())]
    release = Path("/etc/os-release")
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', release.read_text(), re.MULTILINE) if release.is_file() else None
    return ", ".join(filter(None, [name[1] if name else "", *described])).strip()


def _processor() -> tuple[str, set[str]]:
    """The name and the flags of the processor, as far as the system tells them."""
    table = Path("/proc/cpuinfo")
    text = table.read_text() if table.is_file() else ""
    name, flags = (re.search(rf"^(?:{keys})\s*: (.*)$", text, re.MULTILINE) for keys in ("model name|CPU part", "flags|Features"))
    return name[1] if name else platform.processor() or platform.machine(), set(flags[1].split()) if flags else set()


def _threads() -> dict[str, int | None]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"torch": torch.get_num_threads(), "between operators": torch.get_num_interop_threads(), "processors": usable}


def _driver() -> str | None:
    """The version of the GPU's driver, as Linux tells it; None where there is none."""
    for path, pattern in (("/proc/driver/nvidia/version", r"Module(?: for \S+)?\s+([\d.]+)"), ("/sys/module/amdgpu/version", r"([\d.]+)")):
        version = re.search(pattern, Path(path).read_text()) if Path(path).is_file() else None
        if version:
            return version[1]
    return None


def _devices() -> tuple[str, ...]:
    """The device types that this torch is built for, of those the package serves."""
    return ("cpu", "cuda") if torch.version.cuda or torch.version.hip else ("cpu",)


def _support(backend: str, device: str) -> dict:
    """The dtypes in which a backend serves every operator it has for a device, and why it does not serve all of them."""
    facts = _backend.BACKENDS[backend]
    served = [op for op in ops.OPERATORS if any(backend in _backend.serving(op, device, dtype) for dtype in facts.dtypes)]
    if not served:
        return {"dtypes": [], "reason": facts.missing or f"it has no operators for {device} tensors"}
    missing = [op for op in ops.OPERATORS if op not in served]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in facts.dtypes]
    return {"dtypes": dtypes, "reason": f"it lacks {', '.join(missing)}" if missing else None}


def _choice(device: str) -> str:
    """The order in which the backends are asked, and how it was found."""
    order = ", ".join(_backend.preference(device))
    return f"{order}; triton first for large searches; cuda against triton is not measured" if device == "cuda" else order


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [_cuda_device(index) for index in range(torch.cuda.device_count())]


def _cuda_device(index: int) -> str:
    device, refusals = torch.cuda.get_device_properties(index), _backend.gpu(index).refusals
    described = f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    return "; ".join((described, *(f"not served by {backend}: {reason}" for backend, reason in refusals.items())))


def report(facts: dict) -> str:
    """``collect()`` as text."""
    lines = [*_section("versions", facts["versions"]), *_section("system", facts["system"])]
    lines += _section("threads", facts["threads"])
    lines += _section("C++ module", _describe_extension(facts))
    for device, backends in facts["backends"].items():
        described = {name: _describe_support(support) for name, support in backends.items()}
        lines += _section(f"backends for {device} tensors", described | {"in this order": facts["choice"][device]})
    lines += _section("CUDA library", _describe_cuda(facts))
    lines += _section("CUDA devices", _describe_devices(facts))
    lines += _section("environment", {name: "not set" if value is None else value for name, value in facts["environment"].items()})
    return "\n".join(lines)


def _section(title: str, entries: dict) -> list[str]:
    return [title, *(f"  {name:<22}{'none' if value is None else value}" for name, value in entries.items())]


def _describe_extension(facts: dict) -> dict[str, str]:
    if facts["instruction_set"] is None:
        return {"not loaded": facts["backends"]["cpu"]["cpp"]["reason"]}
    in_use = {"instruction set": f"{facts['instruction_set']} (of {', '.join(facts['instruction_sets'])})"}
    return in_use | facts["build"]


def _describe_cuda(facts: dict) -> dict[str, str]:
    if facts["cuda_build"] is None:
        return {"not loaded": _backend.BACKENDS["cuda"].missing or ""}
    return {"built by": facts["cuda_build"]}


def _describe_support(support: dict) -> str:
    if not support["dtypes"]:
        return f"no: {support['reason']}"
    return f"yes: {', '.join(support['dtypes'])}" + (f", but {support['reason']}" if support["reason"] else "")


def _describe_devices(facts: dict) -> dict[str, str]:
    if facts["cuda_devices"]:
        devices = {str(index): device for index, device in enumerate(facts["cuda_devices"])}
        return devices | {"driver": facts["driver"] or "unknown"}
    return {"none": "torch sees no device" if "cuda" in facts["backends"] else "this torch is built without CUDA"}


def main() -> None:
    """Prints what is installed, and which backend serves what."""
    print(report(collect()))


if __name__ == "__main__":
    main()
