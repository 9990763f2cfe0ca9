"""Which world a call is in: who, besides the caller, looks at it or takes it apart. Decided once for a call, here.

A kernel is one step that nobody can look into. In some worlds it may run, in others only PyTorch's operators will do:

PLAIN      eager, on plain tensors that nobody watches: straight to the backend, around the dispatcher
WATCHED    fake and meta tensors, dispatch modes, negative views: our operators, through the dispatcher
COMPILED   torch.compile: our operators, which know their own gradient; one graph
COMPOSED   export, torch.jit, torch.func, forward-mode differentiation, tensor subclasses: PyTorch's operators
"""

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad


class Kind(Enum):
    PLAIN = "plain"
    WATCHED = "watched"
    COMPILED = "compiled"
    COMPOSED = "composed"


class World(NamedTuple):
    kind: Kind
    reason: str = ""  # why only PyTorch's operators will do


PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRACING_TYPES = (*PLAIN_TYPES, FakeTensor, FunctionalTensor)

# Private: without them a mode is taken to be active, or hooks, which is slower and as right.
n_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: True)
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)

PLAIN, WATCHED, COMPILED = World(Kind.PLAIN), World(Kind.WATCHED), World(Kind.COMPILED)
TRANSFORMED = World(Kind.COMPOSED, "a torch.func transform is active")


def world_of(*tensors: Tensor | None) -> World:
    """The world of a call with these tensors."""
    if _is_exporting():
        return World(Kind.COMPOSED, "torch.export is recording: whoever loads the program needs not have fusedloss")
    if is_transformed():
        return TRANSFORMED
    for tensor in tensors:
        if tensor is not None and takes_operators_apart(tensor):
            return World(Kind.COMPOSED, f"{type(tensor).__name__} has a __torch_dispatch__ that knows PyTorch's operators only")
    if torch.compiler.is_compiling():
        return COMPILED
    plain = nobody_watches(*tensors)
    if not plain and not all(tensor is None or has_memory(tensor) for tensor in tensors):
        return World(Kind.COMPOSED, "a tensor has no memory: zeros, or one that outlived its torch.func transform")
    if forward_ad._current_level >= 0:
        return World(Kind.COMPOSED, "forward-mode differentiation is active")
    if torch.jit.is_tracing():
        return World(Kind.COMPOSED, "torch.jit.trace is recording, which sees no kernel")
    if torch.is_grad_enabled() and torch.is_inference_mode_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return World(Kind.COMPOSED, "a torch.autograd.Function knows no inference_mode() around enable_grad()")
    return PLAIN if plain else WATCHED


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, which imports the compiler: a second. torch 2.11 takes is_exporting() for true
# in all that it compiles; a transform that is compiled is active, too.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_strided(tensor: Tensor) -> bool:
    """Whether its values lie in memory one by one, by strides: not those of a sparse, mkldnn, nested or quantised tensor."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not _is_nested(tensor)


def _is_nested(tensor: Tensor) -> bool:
    """Also of a batch of nested tensors, as torch.func makes them."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.is_nested


def takes_operators_apart(tensor: Tensor) -> bool:
    """Whether its class has a rule for each operator, as DTensor has; those of PyTorch's own tracing take any."""
    return type(tensor) not in _TRACING_TYPES and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_dtensor(tensor: Tensor) -> bool:
    """Asked by name: importing the class takes a second."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed.tensor")


def nobody_watches(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do no more than call the implementation: plain tensors, no tracing, no dispatch mode.

    Going around it saves about 10 us in a step that takes 70 (128 x 10 logits). Negative views and meta
    tensors are for it to resolve.
    """
    if torch.compiler.is_compiling() or n_dispatch_modes() != 0:
        return False
    for tensor in tensors:  # a loop: any() of a generator takes twice as long
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES or tensor.is_neg() or tensor.is_meta or not has_memory(tensor)
        ):
            return False
    return True


def has_memory(tensor: Tensor) -> bool:
    """Whether a kernel finds its values at an address. Not those of a tensor of zeros, nor of one that stands for others, as
    torch.func and is_grads_batched make them and some code keeps them, or a subclass that is made of others; asked for its
    address, some end the process."""
    return torch.compiler.is_compiling() or not (
        takes_operators_apart(tensor)
        or tensor._is_zerotensor()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or _is_legacy_batched(tensor)
        or torch._is_functional_tensor(tensor)
    )


def kernels_see(*tensors: Tensor | None) -> bool:
    """Whether values at addresses are all there is of these: no tangents of forward-mode differentiation, either."""
    return forward_ad._current_level < 0 and all(tensor is None or has_memory(tensor) for tensor in tensors)


def has_values(tensor: Tensor) -> bool:
    """Whether there are any to be read: not of a fake tensor, nor of one on the meta device."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def hooks_are_active() -> bool:
    """Whether somebody else has the say over what autograd saves: a checkpoint, save_on_cpu, any saved_tensors_hooks."""
    return _top_hooks(False) is not None
