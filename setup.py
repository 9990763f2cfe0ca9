"""Compiles the CPU kernel, and makes the README a page that stands alone; everything that is data lives in pyproject.toml.

The kernel is C++ without the headers of Python or torch, loaded by ctypes: one build serves every Python and every torch. It is
optional: without a C++ compiler the installation succeeds, the wheel is a pure one (py3-none-any), the loss on a CPU is
PyTorch's, and the first call there and `python -m fusedloss` say so.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

cpu_kernel = Extension(
    "fusedloss.kernels.cpu.fusedloss_cpu",
    sources=sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    language="c++",
    optional=True,
    extra_compile_args=[
        "-std=c++17",
        "-O2",  # vectors are written out: -O3 adds seconds, not speed
        "-g0",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wno-uninitialized",  # GCC's own AVX-512 header, where it means it
        "-Wno-maybe-uninitialized",
        "-Wno-psabi",  # vectors wider than the baseline's are passed between inlined functions only
    ],
)


class BuildKernel(build_ext):
    """One library name for every Python, and one compiler process per source: a quarter of a minute on one core."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        super().run()
        missing = [ext.name for ext in self.extensions if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if missing:
            self.warn("no CPU kernel was built, for want of a C++ compiler: fusedloss will use PyTorch's loss on CPUs")
            self.distribution.ext_modules = None
            self.get_finalized_command("bdist_wheel").root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor() as pool:
            objects = pool.map(
                lambda source: self.compiler.compile(
                    [source], output_dir=self.build_temp, depends=ext.depends, extra_postargs=ext.extra_compile_args
                ),
                ext.sources,
            )
            objects = [path for paths in objects for path in paths]
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: the library is no extension module."""
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """The README for a package index, which has none of the repository's files: links to them, and plots, become their names."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]+\)", r"\1", readme)


setup(
    ext_modules=[cpu_kernel],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
