"""Builds the native module and lays the data folders into the wheel; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DATA_FOLDERS = ("patches", "configs")
WARNINGS = ["-Wall", "-Wextra"]


class BuildNative(build_ext):
    """Says what is missing in a sentence, and whether CUDA kernels are part of this build."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            sys.exit(f"vllm-spark needs a C++17 compiler, and there is no {compiler}; install g++ (apt install g++)")
        nvcc = shutil.which("nvcc")
        print(f"vllm-spark: nvcc {'at ' + nvcc if nvcc else 'not found'}; this version has no CUDA kernels to build")
        super().build_extensions()


class BuildPackage(build_py):
    """Copies the top-level data folders to vllm_spark/data, where an installed package looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout is read in place
        for folder in DATA_FOLDERS:
            target = Path(self.build_lib, "vllm_spark", "data", folder)
            shutil.copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


ParallelCompile("SPARK_BUILD_JOBS", default=os.cpu_count() or 1).install()

setup(
    packages=find_packages(include=["vllm_spark", "vllm_spark.*"]),
    package_data={"vllm_spark": ["py.typed", "*.pyi"]},
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
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
)
