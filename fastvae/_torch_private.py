"""Every name of torch that has no public counterpart: a new version may take it away. Tried with torch 2.10.0 and 2.13.0."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass
from torch.utils._pytree import _register_namedtuple

__all__ = ["is_in_torch_dispatch_mode", "is_traceable_wrapper_subclass"]

BATCH_NORMS: type[nn.Module] = nn.modules.batchnorm._BatchNorm
DROPOUTS: type[nn.Module] = nn.modules.dropout._DropoutNd

# Every call asks these, so no Python function stands in between.
# Whether a transformation of torch.func is under way.
in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
# Whether another backward pass over the same graph may follow the one that runs.
graph_is_retained: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
# Whether a tensor stands for several incoming gradients (``is_grads_batched``).
is_batch_of_gradients: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def register_namedtuple(cls: type, name: str) -> None:
    """Lets torch.export write a named tuple, under ``name``."""
    _register_namedtuple(cls, serialized_type_name=name)


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no data, as the tensors of ``FakeTensorMode``."""
    return isinstance(tensor, FakeTensor)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def in_make_fx() -> bool:
    """Whether make_fx traces."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def in_function_mode() -> bool:
    """Whether a ``TorchFunctionMode`` sees each call."""
    return torch._C._len_torch_function_stack() > 0


def in_backward_pass() -> bool:
    """Whether the calling thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def has_saved_tensor_hooks() -> bool:
    """Whether hooks see the tensors that are saved for a backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_global_module_hooks() -> bool:
    """Whether hooks are registered for all modules."""
    return module._has_any_global_hook()


def without_dispatch_modes() -> AbstractContextManager:
    """A context whose operators no ``TorchDispatchMode`` sees."""
    return torch._C._DisableTorchDispatch()


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether the dispatcher has an implementation of an overload, such as ``fastvae::codebook_sums.cpp``."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, dispatch_key)


def processor_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    supported: tuple[Callable[[], bool], ...] = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return any(ask() for ask in supported)


def wrap_overload(overload: Callable, wrap: Callable[[Callable], Callable]) -> None:
    """Puts ``wrap(call)`` in the place of the call of an operator's overload, also where compiled code makes it.

    To be called before anything keeps the overload in a dictionary: its hash is that of the call.
    """
    overload._op = wrap(overload._op)  # type: ignore[attr-defined]


def standard_gamma(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from gamma distributions of scale 1; torch's public ones take no generator."""
    return torch._standard_gamma(concentration, generator)


def constant_when_compiled(function):
    """Decorates a function whose result torch.compile takes as a constant. torch.compiler.assume_constant_result does no more, but imports
    all of torch.compile."""
    function._dynamo_marked_constant = True
    return function


def not_compiled(function):
    """Decorates a function that torch.compile leaves as it is. torch.compiler.disable does no more, but imports all of torch.compile before
    the first call."""
    return torch._disable_dynamo(function)
