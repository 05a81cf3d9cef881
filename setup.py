"""Builds the native module and its CUDA kernels; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra"]
KERNEL_ARCHITECTURES = ("90", "121")  # H100 and H200, on which it is measured; GB10, for which it is made
# As PTX, for every GPU that has no code of its own. From 9.0 on the host starts a kernel while the one before it still
# runs, and code for less than that does not wait for it: so those GPUs must never be left with the oldest.
PTX_ARCHITECTURES = ("80", "90")


def _find_nvcc() -> str | None:
    """CUDA's packages put it where no PATH leads."""
    if named := os.environ.get("NVCC") or shutil.which("nvcc"):
        return named
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((str(home / "bin" / "nvcc") for home in homes if (home / "bin" / "nvcc").is_file()), None)


class BuildNative(build_ext):
    """Says what is missing in a sentence, and whether CUDA kernels are part of this build."""

    kernels: Path | None = None

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            sys.exit(f"vllm-spark needs a C++17 compiler, and there is no {compiler}; install g++ (apt install g++)")
        super().build_extensions()
        nvcc = _find_nvcc()
        if nvcc is None:
            print("vllm-spark: nvcc was not found, so collectives on GPU tensors are not part of this build")
            return
        self.build_kernels(nvcc)

    def build_kernels(self, nvcc: str) -> None:
        """Compiles the kernels into one image beside the native module."""
        target = Path(self.get_ext_fullpath("vllm_spark._native")).with_name("kernels.fatbin")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.kernels = target
        sources = [str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".hpp")]
        sources += [__file__, nvcc]  # the list of architectures, and the compiler
        if not self.force and not newer_group(sources, str(target)):
            print("vllm-spark: the kernels are up to date")
            return
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        if missing := [name for name in PTX_ARCHITECTURES if f"compute_{name}" not in listed]:
            sys.exit(
                f"vllm-spark needs nvcc of CUDA 12 or 13, and {nvcc} has no compute_{missing[0]}; set NVCC to another"
            )
        architectures = [name for name in KERNEL_ARCHITECTURES if f"compute_{name}" in listed]
        print(f"vllm-spark: building kernels with {nvcc} for sm_{', sm_'.join(architectures)} and later GPUs")
        code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        code += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in PTX_ARCHITECTURES]
        source = ROOT / "csrc" / "kernels" / "collectives.cu"
        partial = target.with_suffix(".partial")  # an interrupted nvcc leaves no file that looks up to date
        subprocess.run([nvcc, "-std=c++17", "-O3", "-fatbin", *code, "-o", str(partial), str(source)], check=True)
        partial.replace(target)

    def copy_extensions_to_source(self) -> None:
        """For a checkout used in place: the kernels go where the native module goes."""
        super().copy_extensions_to_source()
        if self.kernels is not None:
            shutil.copy2(self.kernels, ROOT / "vllm_spark")


ParallelCompile("VLLMSPARK_BUILD_JOBS", default=os.cpu_count() or 1).install()

setup(
    # As for a layout with a folder `src`: then setuptools makes an editable installation by a path in a .pth file. Its
    # other way is an import hook, which Python calls after its own. Python itself takes a folder vllm_spark without
    # __init__.py, such as a clone beside a user's program, for a namespace package.
    package_dir={"": "."},
    # Follows the links vllm_spark/patches and vllm_spark/configs to the folders at the top.
    packages=find_packages(include=["vllm_spark", "vllm_spark.*"]),
    package_data={"vllm_spark": ["py.typed", "*.pyi", "kernels.fatbin"], "vllm_spark.configs": ["**/*.json"]},
    ext_modules=[
        Pybind11Extension(
            "vllm_spark._native",
            sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", *WARNINGS],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
