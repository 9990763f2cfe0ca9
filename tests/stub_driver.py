"""Triton's driver of a GPU that is not here: kernels are compiled for it, and no launch does anything."""

from collections.abc import Callable

from triton.backends.compiler import GPUTarget


class _Utils:
    """What Triton asks of a driver to load a kernel."""

    @staticmethod
    def load_binary(*_: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    @staticmethod
    def get_device_properties(_: object) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class StubDriver:
    """To be put in the place of triton.runtime.driver._active.

    device: the key of Triton's caches. Never that of a GPU, whose compiled kernels would really be launched.
    """

    utils: object = _Utils

    def __init__(self, target: GPUTarget, device: object = "stub", stream: int = 0) -> None:
        self.target, self.device, self.stream = target, device, stream

    def get_current_device(self) -> object:
        return self.device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: object = None) -> int:
        return self.stream

    @staticmethod
    def launcher_cls(*_: object) -> Callable[..., None]:
        return lambda *_: None
