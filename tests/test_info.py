"""The report of what is installed and which backend serves what."""

import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
import yaml

import fastvae
from fastvae import _backend, info

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for the C++ module."""
    module = types.SimpleNamespace(
        instruction_set=lambda: "avx2",
        instruction_sets=lambda: ("baseline", "avx2"),
        build_info=lambda: {"compiler": "a compiler", "flags": "-O3"},
    )
    monkeypatch.setitem(sys.modules, "fastvae._C", module)
    return module


def test_facts_survive_json():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts


def test_versions_are_those_of_the_process():
    versions = info.collect()["versions"]
    assert versions["fastvae"] == fastvae.__version__
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_every_backend_serves_or_says_why_not():
    for backends in info.collect()["backends"].values():
        assert set(backends) == set(_backend.BACKENDS)
        assert all(support["dtypes"] or support["reason"] for support in backends.values())


def test_reference_serves_every_dtype():
    expected = [str(dtype).removeprefix("torch.") for dtype in _backend.FLOATS]
    assert info.collect()["backends"]["cpu"]["reference"] == {"dtypes": expected, "reason": None}


def test_backend_that_serves_is_the_one_that_calls_use():
    backends = info.collect()["backends"]["cpu"]
    for dtype in _backend.FLOATS:
        in_use = _backend.resolve("latent_forward", torch.device("cpu"), dtype)
        assert str(dtype).removeprefix("torch.") in backends[in_use]["dtypes"]


def test_reason_of_a_missing_backend_is_the_loader_s(monkeypatch):
    monkeypatch.setattr(_backend, "serving", lambda op, device, dtype: ("reference",))
    monkeypatch.setattr(_backend.BACKENDS["cuda"], "missing", "no compiler for it")
    assert info.collect()["backends"]["cpu"]["cuda"] == {"dtypes": [], "reason": "no compiler for it"}


def test_backend_that_lacks_operators_names_them(monkeypatch):
    monkeypatch.setattr(_backend, "serving", lambda op, device, dtype: ("cpp",) if op == "latent_forward" else ())
    reason = info.collect()["backends"]["cpu"]["cpp"]["reason"]
    assert "reconstruction_forward" in reason
    assert "latent_forward" not in reason


@pytest.mark.usefixtures("extension")
def test_instruction_set_and_build_come_from_the_extension():
    facts = info.collect()
    assert (facts["instruction_set"], facts["instruction_sets"]) == ("avx2", ["baseline", "avx2"])
    text = info.report(facts)
    assert "avx2 (of baseline, avx2)" in text
    assert "a compiler" in text


def test_without_the_extension_the_report_says_why(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvae._C", raising=False)
    monkeypatch.setattr(_backend, "serving", lambda op, device, dtype: ("reference",))
    monkeypatch.setattr(_backend.BACKENDS["cpp"], "missing", "built without a compiler")
    facts = info.collect()
    assert (facts["instruction_set"], facts["instruction_sets"], facts["build"]) == (None, [], {})
    assert "built without a compiler" in info.report(facts)


def test_environment_shows_what_is_set(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("CXXFLAGS", raising=False)
    facts = info.collect()
    assert facts["environment"]["OMP_NUM_THREADS"] == "3"
    assert facts["environment"]["CXXFLAGS"] is None
    lines = {line.split()[0]: line for line in info.report(facts).splitlines()}
    assert lines["OMP_NUM_THREADS"].endswith(" 3")
    assert lines["CXXFLAGS"].endswith("not set")


def test_reports_do_not_name_the_user(monkeypatch):
    """Neither the home folder nor, in the path of another, the user's name; a word that is that name stays."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USER", "someone")
    monkeypatch.setenv("CUDA_HOME", "/home/someone/cuda")
    monkeypatch.setenv("CXX", "/scratch/someone/bin/g++ -Isomeone")
    monkeypatch.setattr(_backend, "serving", lambda op, device, dtype: ())
    monkeypatch.setattr(_backend.BACKENDS["cpp"], "missing", "ImportError: /home/someone/env/fastvae/_C.so: file too short")
    facts = info.collect()
    assert facts["environment"]["CUDA_HOME"] == "~/cuda"
    assert facts["environment"]["CXX"] == "/scratch/~/bin/g++ -Isomeone"
    assert facts["backends"]["cpu"]["cpp"]["reason"] == "ImportError: ~/env/fastvae/_C.so: file too short"
    assert "/someone" not in info.report(facts)


def test_reports_do_not_name_this_machine():
    text = json.dumps(info.collect())
    assert platform.node() not in text
    assert str(Path.home()) + "/" not in text


def test_the_system_has_processor_and_instruction_sets():
    facts = info.collect()
    assert set(facts["system"]) == {"operating system", "processor", "instructions", "used by torch"}
    assert facts["system"]["used by torch"] == torch.backends.cpu.get_cpu_capability()
    assert all(facts["system"].values())
    if facts["instruction_set"] in ("avx2", "avx512", "avx512_vnni"):
        assert "avx2" in facts["system"]["instructions"]
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert 1 <= facts["threads"]["processors"] <= os.cpu_count()
    assert facts["versions"]["numpy"] == numpy.__version__


@pytest.mark.parametrize(
    ("path", "content", "version"),
    [
        ("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        ("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release", "575.57.08"),
        ("/sys/module/amdgpu/version", "6.10.5\n", "6.10.5"),
        ("/proc/driver/nvidia/version", "something else", None),
    ],
)
def test_driver_is_read_from_the_system(monkeypatch, path, content, version):
    monkeypatch.setattr(Path, "is_file", lambda self: str(self) == path)
    monkeypatch.setattr(Path, "read_text", lambda self: content)
    assert info._driver() == version


def test_the_form_of_a_bug_report_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    asked = {field["id"]: field for field in form["body"]}
    assert "python -m fastvae.info" in asked["info"]["attributes"]["label"]
    assert asked["info"]["validations"]["required"]


def test_cuda_devices_are_those_torch_sees():
    assert len(info.collect()["cuda_devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_gpu_that_a_backend_does_not_serve_has_the_reason(monkeypatch):
    properties = types.SimpleNamespace(name="A GPU", major=7, minor=5, total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(_backend, "gpu", lambda index: _backend.Gpu("sm_75", {"cuda": "no kernel image"}))
    expected = "A GPU, compute capability 7.5, 16 GiB; not served by cuda: no kernel image"
    assert info.collect()["cuda_devices"] == [expected]
    assert expected in info.report(info.collect())


@pytest.mark.parametrize("arguments", [["fastvae.info"], ["fastvae", "info"]], ids=" ".join)
def test_command_prints_the_report(arguments):
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"versions\n  fastvae               {fastvae.__version__}\n")
