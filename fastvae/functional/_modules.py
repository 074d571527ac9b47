"""Whether a module may be read instead of called, or replaced: whether a call of it does what its class says and nothing more."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from fastvae._torch_private import has_global_module_hooks, in_function_mode, is_in_torch_dispatch_mode, is_traceable_wrapper_subclass
from fastvae.ops._autograd import transformed

_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def is_exactly(module: object, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is of a class, or of a subclass that leaves ``forward`` as it is."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def describe(module: object) -> str:
    """In one line."""
    return type(module).__name__ if getattr(module, "_modules", None) else str(module)


def call_obstacle(module: nn.Module) -> str | None:
    """Why a call of ``module`` may do more than the forward of its class, to stand behind its name; None where it does not."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if type(module).__call__ is not nn.Module.__call__:
        return "has a __call__ of its own"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has seen no data"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if has_global_module_hooks():
        return "is called under hooks that are registered for all modules"
    return None


def wrapped_tensor(module: nn.Module) -> str | None:
    """The class of a parameter that wraps another tensor, such as DTensor: operators do more on it than on a tensor."""
    parameters = module.parameters() if module._modules else module._parameters.values()
    return next((type(p).__name__ for p in parameters if is_traceable_wrapper_subclass(p)), None)


def read_obstacle(module: nn.Module) -> str | None:
    """Why the parameters of ``module`` may not be used without calling it."""
    if reason := call_obstacle(module):
        return reason
    wrapper = wrapped_tensor(module)
    return f"holds a {wrapper}" if wrapper else None


def owns_output(convolution: nn.Module) -> bool:
    """Whether nobody but the caller can hold what the convolution has just given: no hook, and no mode that sees each operator, such as
    that of selective activation checkpointing. A convolution itself keeps its input alone."""
    if type(convolution) is not nn.Conv2d or call_obstacle(convolution) or transformed():
        return False
    return not is_in_torch_dispatch_mode() and not in_function_mode()


def swap_obstacle(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why no other module can take over the weight and bias of ``module``, which should be of the class ``kind`` itself."""
    if is_parametrized(module):
        return "is parametrized"
    if type(module) is not kind:
        return f"is a {type(module).__name__} and not a {kind.__name__}"
    if reason := read_obstacle(module):
        return reason
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "has hooks for its state_dict"
    if module._modules or module._buffers or not module._parameters.keys() <= {"weight", "bias"}:
        return "holds more than a weight and a bias"
    if not all(name in module._parameters for name in ("weight", "bias")):
        return "has a weight or bias that is not a parameter"
    return None
