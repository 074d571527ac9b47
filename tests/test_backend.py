"""Which backend serves a call, how one is forced, and what is said where it cannot serve."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from _calls import ENTROPIES
from _helpers import DEVICES, TOLERANCES, Recorder, compiled_path, each_place, leaf, places

import fastvae
from fastvae import BackendError, _backend, _gpu
from fastvae import functional as FV
from fastvae._gpu import searches_on_tensor_cores
from fastvae.ops import BACKENDS, OPERATORS

ROOT = Path(fastvae.__file__).parents[1]
FORWARD = ("latent_forward", "reconstruction_forward")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import torch, fastvae\nimport fastvae.functional as FV\n{code}"]
    return subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False)


def backends_that_ran(function) -> set[str]:
    with Recorder() as ran:
        function()
    return ran.backends()


def kl_and_loss(device: str = "cpu") -> torch.Tensor:
    """One call of each family."""
    mu = leaf(torch.ones(4, 3, device=device))
    return FV.reparameterize_kl(mu, mu)[1] + FV.mse_loss(mu, mu.detach(), reduction="sum")


def test_the_cpp_extension_is_built():
    """CI and `make test` build it; only a pure-Python install that was asked for does without. The epilogues of the Gram form are for
    backends that leave its products to torch, on the CPU torch itself scales a gradient, and the entropies of binary codes are torch's
    products on every device."""
    epilogues, scaling = (
        {"jacobian_gram_scale", "jacobian_gram_reduce"},
        {"reconstruction_rescale_", "reconstruction_backward_", "logistic_mixture_backward_"},
    )
    others = {*epilogues, *scaling, *ENTROPIES}
    missing = [op for op in OPERATORS if op not in others and "cpp" not in _backend._served[op, "cpu"]]
    assert os.environ.get("FASTVAE_BUILD") == "0" or not missing


def test_uninitialised_memory_is_poisoned():
    """What the other tests rely on: an element that an operator does not write is NaN."""
    assert torch.empty(100).isnan().all()
    assert torch.ones(100).new_empty((3, 4), dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("op", OPERATORS)
def test_the_overloads_of_an_operator_share_one_schema(op):
    schemas = {str(OPERATORS[op].overloads[backend]._schema).replace(f".{backend}(", "(") for backend in BACKENDS}
    assert len(schemas) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "privateuseone"])
@pytest.mark.parametrize("op", OPERATORS)
def test_plain_pytorch_serves_every_operator_everywhere(op, device):
    for dtype in TOLERANCES:
        assert _backend.serving(op, device, dtype)[-2:] == ("fallback", "reference")


def test_plain_pytorch_is_registered_for_every_device():
    keys = ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1")
    for op, backend, key in itertools.product(OPERATORS, _backend.ON_EVERY_DEVICE, keys):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastvae::{op}.{backend}", key)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "privateuseone"])
def test_the_reference_serves_only_where_it_is_forced(device, dtype):
    for op in OPERATORS:
        assert _backend.resolve(op, torch.device(device), dtype) != "reference"
        with fastvae.use_backend("reference"):
            assert _backend.resolve(op, torch.device(device), dtype) == "reference"


@pytest.mark.parametrize("op", FORWARD)
def test_a_backend_serves_a_family_as_a_whole(op):
    """Whatever has a forward operator has the others of its family: a forward pass is never left without its backward pass."""
    family = [name for name in OPERATORS if name.split("_")[0] == op.split("_")[0]]
    for device in DEVICES:
        for place in places(op):
            if place.device == device:
                needed = [
                    name for name in family if not (device == "cpu" and name in ("reconstruction_rescale_", "reconstruction_backward_"))
                ]
                assert all(place.backend in _backend._served[name, device] for name in needed)


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_the_first_that_serves(op, dtype, device):
    resolved = _backend.resolve(op, torch.device(device), dtype)
    assert resolved == next(b for b in _backend.preference(device) if b in _backend.serving(op, device, dtype))


def test_the_order_on_a_device():
    assert _backend.preference("cpu") == ("cpp", "fallback")
    assert _backend.preference("cuda") == ("cuda", "triton", "fallback")
    assert _backend.preference("mps") == ("fallback",)


def test_every_overload_has_its_backend():
    assert tuple(_backend.BACKENDS) == BACKENDS


def test_the_choice_on_a_gpu_takes_the_first_that_serves(monkeypatch):
    """By operator and dtype; a forced backend comes before any order."""
    gpu = torch.device("cuda")
    monkeypatch.setitem(_backend._served, ("latent_forward", "cuda"), ("cuda", "triton", "fallback", "reference"))
    monkeypatch.setitem(_backend._served, ("latent_backward", "cuda"), ("triton", "fallback", "reference"))
    assert _backend.resolve("latent_forward", gpu, torch.float32) == "cuda"
    assert _backend.resolve("latent_backward", gpu, torch.float32) == "triton"
    assert _backend.resolve("latent_forward", gpu, torch.float64) == "fallback"
    with fastvae.use_backend("triton"):
        assert _backend.resolve("latent_forward", gpu, torch.float32) == "triton"


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Lets cuda and triton serve every operator on a GPU of an architecture, which may refuse backends."""

    def pretend(architecture: str, **refusals: str) -> None:
        for op in OPERATORS:
            monkeypatch.setitem(_backend._served, (op, "cuda"), ("cuda", "triton", "fallback", "reference"))
        monkeypatch.setattr(_backend, "gpu", lambda index: _backend.Gpu(architecture, refusals))

    return pretend


def search(rows: int, codes: int, dim: int) -> dict[str, int]:
    return {"multiply_adds": rows * codes * dim, "dim": dim}


@pytest.mark.parametrize(
    ("architecture", "size", "expected"),
    [
        ("sm_80", search(8192, 512, 64), "cuda"),
        ("sm_80", search(32768, 1024, 64), "triton"),
        ("sm_90", search(8192, 512, 64), "cuda"),
        ("sm_90", search(16384, 8192, 256), "triton"),
        # No tensor core multiplies so short vectors.
        ("sm_90", search(1 << 20, 16384, 8), "cuda"),
        # There tensor cores are no faster than what their rounding costs, or nothing is known of them.
        ("sm_120", search(16384, 8192, 256), "cuda"),
        ("sm_75", search(16384, 8192, 256), "cuda"),
    ],
)
def test_a_search_takes_tensor_cores_where_they_save_more_than_launches_cost(pretend_gpu, architecture, size, expected):
    pretend_gpu(architecture)
    for op in ("codebook_nearest", "codebook_quantize"):
        assert _backend.resolve(op, torch.device("cuda", 0), torch.float32, **size) == expected


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_all_else_takes_the_backend_that_launches_faster(pretend_gpu, architecture):
    pretend_gpu(architecture)
    for op in OPERATORS:
        assert _backend.resolve(op, torch.device("cuda", 0), torch.bfloat16) == "cuda"


def test_the_choice_grows_with_the_search_and_never_goes_back():
    for architecture in ("sm_80", "sm_90", "sm_100"):
        taken = [searches_on_tensor_cores(1 << bits, 64, architecture) for bits in range(60)]
        assert taken == sorted(taken)
        assert {False, True} == set(taken)


def test_a_search_names_its_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(_backend, "_order", lambda *arguments: sizes.append(arguments[2:]) or ("fallback",))
    x, codes = torch.ones(2, 5, 3), torch.ones(2, 7, 3)
    FV.vq_nearest(x, codes)
    FV.vector_quantize(x[0], codes[0])
    assert sizes == [(2 * 5 * 7 * 3, 3), (5 * 7 * 3, 3)]


def test_the_choice_on_a_gpu_is_compiled(pretend_gpu):
    pretend_gpu("sm_90")
    device = torch.device("cuda", 0)

    def chosen(x, rows):
        return x, _backend.resolve("codebook_nearest", device, torch.float32, **search(rows, 8192, 256))

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1), 64)[1] == "cuda"
    assert compiled(torch.ones(1), 1 << 20)[1] == "triton"
    with fastvae.use_backend("cuda"):
        assert compiled(torch.ones(1), 1 << 20)[1] == "cuda"


def test_a_gpu_for_which_a_library_has_no_code_is_served_by_the_next(pretend_gpu):
    pretend_gpu("sm_75", cuda="its kernels do not run on this GPU: no kernel image")
    gpu = torch.device("cuda", 0)
    assert _backend.resolve("latent_forward", gpu, torch.float32) == "triton"
    message = r"backend 'cuda' cannot serve latent_forward on cuda .*no kernel image\. Backends that can: triton, fallback, reference\."
    with fastvae.use_backend("cuda"), pytest.raises(BackendError, match=message):
        _backend.resolve("latent_forward", gpu, torch.float32)
    with fastvae.use_backend("triton"):
        assert _backend.resolve("latent_forward", gpu, torch.float32) == "triton"


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(major=7, minor=5, gcnArchName="gfx942:x"))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(asked.append(index)))
    for name, backend in _backend.BACKENDS.items():
        # A library that is built asks the real driver.
        monkeypatch.setattr(backend, "refusal", lambda name=name: "it is tired" if name == "fallback" else None)
    monkeypatch.setattr(_backend, "architecture", _gpu.architecture.__wrapped__)
    gpu = functools.cache(_backend.gpu.__wrapped__)
    assert gpu(3) == gpu(3) == _backend.Gpu("gfx942" if torch.version.hip else "sm_75", {"fallback": "it is tired"})
    assert asked == [3]


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone"])
def test_an_unknown_device_is_served_by_the_fallback(device):
    assert _backend.resolve("latent_forward", torch.device(device), torch.float32) == "fallback"
    with fastvae.use_backend("cpp"), pytest.raises(BackendError, match=rf"on {device} .*Backends that can: fallback, reference\."):
        _backend.resolve("latent_forward", torch.device(device), torch.float32)


def test_an_installation_without_kernels_takes_the_fallback(monkeypatch):
    for op in OPERATORS:
        monkeypatch.setitem(_backend._served, (op, "cpu"), _backend.ON_EVERY_DEVICE)
    mu = leaf(torch.ones(4, 3))
    assert backends_that_ran(lambda: kl_and_loss().backward()) == {"fallback"}
    assert backends_that_ran(lambda: FV.group_norm_silu(mu, 3).sum().backward()) == {"fallback"}
    assert backends_that_ran(lambda: FV.vq_nearest(mu, torch.ones(2, 3))) == {"fallback"}


@each_place(*FORWARD)
def test_the_forced_backend_runs_forward_and_backward(place):
    assert backends_that_ran(lambda: kl_and_loss(place.device).backward(torch.tensor(2.0, device=place.device))) == {place.backend}


@each_place(*FORWARD)
def test_a_backward_pass_follows_its_forward_pass(place):
    """Whatever is forced when it runs."""
    with fastvae.use_backend(place.backend):
        loss = kl_and_loss(place.device)
    with fastvae.use_backend("reference"):
        assert backends_that_ran(lambda: loss.backward(torch.tensor(2.0, device=place.device))) == {place.backend}


def test_forcing_ends_with_the_block():
    automatic = backends_that_ran(kl_and_loss)
    with fastvae.use_backend("reference"):
        assert backends_that_ran(kl_and_loss) == {"reference"}
        with fastvae.use_backend("auto"):
            assert backends_that_ran(kl_and_loss) == automatic
        with fastvae.use_backend(None):
            assert backends_that_ran(kl_and_loss) == automatic
        assert backends_that_ran(kl_and_loss) == {"reference"}
    assert backends_that_ran(kl_and_loss) == automatic


def test_forcing_ends_with_an_error():
    with pytest.raises(KeyError), fastvae.use_backend("reference"):
        raise KeyError
    assert _backend._forced.backend is None


def test_forcing_holds_for_one_thread():
    seen = {}

    def other():
        seen["automatic"] = backends_that_ran(kl_and_loss)
        with fastvae.use_backend("reference"):
            entered.set()
            leave.wait(60)

    automatic = backends_that_ran(kl_and_loss)
    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    with fastvae.use_backend("reference"):
        thread.start()
        assert entered.wait(60)
    seen["main"] = backends_that_ran(kl_and_loss)
    leave.set()
    thread.join()
    assert seen == {"automatic": automatic, "main": automatic}


def test_an_unknown_name():
    message = "use_backend: got 'numpy', takes one of auto, cpp, cuda, triton, fallback, reference"
    with pytest.raises(ValueError, match=message), fastvae.use_backend("numpy"):
        pass


def test_a_backend_that_cannot_serve_says_why_and_what_can():
    mu = torch.zeros(2, 2)
    with fastvae.use_backend("cuda"), pytest.raises(BackendError) as error:
        FV.kl_normal(mu, mu)
    message = str(error.value)
    able = ", ".join(_backend.serving("latent_forward", "cpu", torch.float32))
    assert message.startswith("backend 'cuda' cannot serve latent_forward on cpu with torch.float32: ")
    assert message.endswith(f"Backends that can: {able}.")
    assert (_backend.BACKENDS["cuda"].missing or "it has no latent_forward for cpu tensors") in message


def test_a_dtype_that_a_backend_cannot_serve(monkeypatch):
    monkeypatch.setattr(_backend.BACKENDS["reference"], "dtypes", (torch.float32,))
    mu = torch.zeros(2, 2, dtype=torch.float64)
    with fastvae.use_backend("reference"), pytest.raises(BackendError, match=r"with torch\.float64: it takes torch\.float32\."):
        FV.kl_normal(mu, mu)


def test_the_environment_forces_a_backend():
    code = """
from torch.utils._python_dispatch import TorchDispatchMode
class Names(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'fastvae':
            print(func)
        return func(*args, **(kwargs or {}))
with Names():
    FV.mse_loss(torch.zeros(3), torch.ones(3))
    with fastvae.use_backend('auto'):
        FV.kl_normal(torch.zeros(3), torch.ones(3))
"""
    result = run_python(code, FASTVAE_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["fastvae.reconstruction_forward.reference", "fastvae.latent_forward.reference"]


def test_the_environment_names_a_backend_that_cannot_serve():
    result = run_python("FV.mse_loss(torch.zeros(3), torch.ones(3))", FASTVAE_BACKEND="cuda")
    assert result.returncode != 0
    assert "BackendError: backend 'cuda' cannot serve reconstruction_forward on cpu" in result.stderr


def test_the_environment_names_no_backend():
    result = run_python("", FASTVAE_BACKEND="numpy")
    assert result.returncode != 0
    assert "ValueError: FASTVAE_BACKEND: got 'numpy', takes one of auto" in result.stderr


def test_importing_makes_no_cuda_context():
    result = run_python("FV.mse_loss(torch.zeros(3), torch.ones(3)); print(torch.cuda.is_initialized())")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False"]


def test_the_instruction_set_in_use_is_the_widest():
    extension = sys.modules.get("fastvae._C")
    if extension is None:
        assert os.environ.get("FASTVAE_BUILD") == "0"
        return
    sets = extension.instruction_sets()
    assert sets[0] == "baseline"
    assert extension.instruction_set() == sets[-1]


def test_every_instruction_set_is_reached(instruction_set):
    """A family's kernels were compiled for it and ran: each call here leaves the mark of its own path."""
    extension = sys.modules["fastvae._C"]
    assert extension.instruction_set() == instruction_set
    kl_and_loss().backward()
    assert extension.last_instruction_set("latent") == compiled_path("latent", instruction_set)
    assert extension.last_instruction_set("reconstruction") == compiled_path("reconstruction", instruction_set)


def test_an_unknown_instruction_set(instruction_set):
    extension = sys.modules["fastvae._C"]
    with pytest.raises(ValueError, match="mmx"):
        extension.set_instruction_set("mmx")
    assert extension.instruction_set() == instruction_set
