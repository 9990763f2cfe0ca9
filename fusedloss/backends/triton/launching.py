"""How a kernel is launched: through Triton's own launcher the first time, from then on past it; tickets; facts of a device."""

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fusedloss import environment
from fusedloss.geometry import VECTOR_BYTES, DeviceFacts
from fusedloss.kernels.constants import N_COUNTERS
from fusedloss.plan import Cut

# MI300 and MI350, whose compiled tickets hold buffer_wbl2; those of MI200, Radeons and NVIDIA's GPUs do not (test_compiled.py).
SEVERAL_L2S = ("gfx942", "gfx950")
MAY_WAIT = environment.choice("FUSEDLOSS_NO_WAIT", ("0", "1")) == "0"


@dataclass(frozen=True, eq=False)
class Launch:
    """What all calls alike share of a launch; decided once. A call adds its tensors, in groups, and its own numbers."""

    cut: Cut
    constants: dict[str, Any]  # arguments of the kernel, and num_warps and the like
    # Saves Triton's look at every argument; by what it looks at: alignment and dtypes of tensors, few of each launch.
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return self.constants["n_rows"]

    @cached_property
    def function(self) -> Any:
        return kernels()[self.cut.kernel]

    @cached_property
    def template(self) -> list[Any]:
        """All arguments of the kernel in order; None where a call has its own."""
        return [self.constants.get(name) for name in self.function.arg_names]

    @cached_property
    def slots(self) -> list[tuple[int, str]]:
        """Places and names of the arguments that a call has."""
        return [(place, name) for place, name in enumerate(self.function.arg_names) if name not in self.constants]

    def own(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that this kernel takes."""
        return {name: arguments[name] for _, name in self.slots}


def launch(of: Launch, device: torch.device, arguments: dict[str, Any]) -> None:
    """Launches a kernel with a call's arguments, among which may be others' as well."""
    # torch leaves the device of another GPU's tensors to the caller, Triton launches on the current one.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(of, device, arguments)
        return
    n_programs = of.cut.n_programs
    if device.type == "meta":  # there is nothing to launch on
        _ = _compiled_ahead(of, arguments).run  # loads it
        return
    if not keeps_compiled(device):
        try:
            of.function[(n_programs,)](**of.constants, **of.own(arguments))
        except (RuntimeError, ValueError) as error:
            if device.type == "cuda":
                raise
            raise RuntimeError(
                f"backend 'triton' was asked for, but Triton cannot launch on tensors of device {str(device)!r} here ({error}). "
                "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported."
            ) from error
        return
    # Triton's own launch asks every argument what the kernel was specialised for. Of those that change between calls alike it is
    # the presence, dtype and alignment of tensors; no kernel is specialised for a call's numbers.
    values = of.template.copy()
    key: list[Any] = [device.index]
    for place, name in of.slots:
        value = arguments[name]
        if type(value) is float:
            values[place] = value
        elif isinstance(value, Tensor):
            values[place] = address = value.data_ptr()
            key += (value.dtype, address % VECTOR_BYTES == 0)
        else:  # a group
            addresses: list[int | None] = []
            for tensor in value:
                if tensor is None:
                    addresses.append(None)
                    key.append(None)
                else:
                    address = tensor.data_ptr()
                    addresses.append(address)
                    key += (tensor.dtype, address % VECTOR_BYTES == 0)
            values[place] = tuple(addresses)
    compiled = of.compiled.get(tuple(key))
    if compiled is not None:
        compiled[(n_programs, 1, 1)](*values)
        return
    if _captures(device) and _compiled_ahead(of, arguments).module is None:
        raise RuntimeError(
            f"{of.cut.kernel} was not loaded before the capture of this CUDA graph, and a capture allows no loading. Make the "
            "same call once before, or fusedloss.warmup(input, target, ...) with tensors like these"
        )
    compiled = of.function[(n_programs,)](**of.constants, **of.own(arguments))
    if compiled is not None:  # None from Triton's interpreter
        of.compiled[tuple(key)] = compiled


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _compiled_ahead(of: Launch, arguments: dict[str, Any]) -> Any:
    """Triton's kernel for such a launch on the current device; compiled, but not loaded, if there was none."""
    return of.function.warmup(**of.constants, **of.own(arguments), grid=(of.cut.n_programs,))


def keeps_compiled(device: torch.device) -> bool:
    return device.type == "cuda"  # elsewhere an emulator may take another's place


# Saves an import statement in each launch's first call; one dictionary.
@cache
def kernels() -> dict[str, Any]:
    """All kernels by name."""
    from fusedloss.kernels import backward, denominator, finish, forward, fused, selection

    return {
        kernel.__name__: kernel
        for kernel in (
            denominator.denominator_kernel,
            fused.fused_tile_kernel,
            fused.fused_row_kernel,
            fused.scale_gradient_kernel,
            forward.forward_tile_kernel,
            forward.forward_row_kernel,
            finish.finish_kernel,
            selection.digit_kernel,
            selection.selected_kernel,
            backward.backward_tile_kernel,
            backward.backward_row_kernel,
        )
    }


@cache
def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the kernels for GPUs need Triton, which is not installed ({error})") from error
    return isinstance(kernels()["fused_row_kernel"], InterpretedFunction)


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a GPU, the current one for meta tensors; those of an H100 for any other device, where kernels are only planned,
    interpreted or emulated."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return DeviceFacts(may_wait=MAY_WAIT)
    return _facts_of_gpu(device)


# Saves a question to the driver in each call; one entry per device.
@cache
def _facts_of_gpu(device: torch.device) -> DeviceFacts:
    found = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    flushes_l2 = not is_nvidia and found.gcnArchName.partition(":")[0] in SEVERAL_L2S
    return DeviceFacts(found.multi_processor_count, found.warp_size, is_nvidia, flushes_l2, MAY_WAIT)


def ticket(device: torch.device, keeps_workspace: bool) -> Tensor:
    """Counters by which the last program of a launch knows itself: int32 zeros, and zeros again after every launch.

    The first is the launch's; one more for each group of programs (kernels/reduction.py), or for each row that a forward may cut
    into slices, which are fewer than the SMs. They belong to one stream, on which launches follow each other. A CUDA graph gets
    its own, zeroed by a node of the graph: its replays may run beside anything else. So does a compiled graph, which may own the
    pool of all memory that is allocated while it runs (CUDA graph trees), and would find ours still alive. So does a call on a
    stream that is not torch's: its handle may be given to another once it is destroyed, and that of the per-thread default stream
    stands for another stream in every thread.
    """
    if device.type != "cuda":
        return _zero_counters(device)
    if device.index != torch.cuda.current_device():  # whose stream the next question is about
        with torch.cuda.device(device):
            return ticket(device, keeps_workspace)
    if not keeps_workspace or torch.cuda.is_current_stream_capturing():
        return _zero_counters(device)
    stream = torch.cuda.current_stream(device).stream_id  # 0: the default stream; odd: of torch's pool; else a foreign handle
    return _stream_ticket(device, stream) if stream == 0 or stream % 2 == 1 else _zero_counters(device)


def _zero_counters(device: torch.device) -> Tensor:
    return torch.zeros((N_COUNTERS,), dtype=torch.int32, device=device)


# Saves a launch that clears the counters, in each call; 4 KB per stream of torch's that has launched.
@cache
def _stream_ticket(device: torch.device, stream: int) -> Tensor:
    del stream  # part of the key
    return _zero_counters(device)
