"""Where the packages lie, and the compiled libraries; everything else is in pyproject.toml.

The folder ``kernels/`` is installed as ``sfm_fast.kernels``, ``benchmarks/`` as ``sfm_fast.benchmarks``: top-level packages of these names
would shadow another project's.

``sfm_fast/_C*.so`` (C++, CPU) and ``sfm_fast/_C_cuda*.so`` (CUDA) are built where torch and the compilers are found at
installation (``pip install --no-build-isolation``); a library that can't be built is left out with a warning and the package
falls back to Triton or plain torch. ``SFM_FAST_BUILD=none|cpu|cuda|all`` (default: what the machine can) decides otherwise.
Both use LibTorch's stable ABI, so one build serves every torch from 2.11 on.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY"]
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *STABLE_ABI]
NVCC_FLAGS = ["-O3", "-lineinfo"]


def sources(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*.c*") if path.suffix in (".cpp", ".cu"))


def headers() -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob("*.*h"))


def cuda_home(guess: str | None) -> str | None:
    """The CUDA toolkit with both nvcc and headers: where nvcc is a wrapper script, torch's own guess has neither."""
    for folder in (os.environ.get("CUDA_HOME"), guess, "/usr/local/cuda"):
        if folder and Path(folder, "bin", "nvcc").exists() and Path(folder, "include", "cuda_runtime_api.h").exists():
            return folder
    return None


def build() -> dict:
    wanted = os.environ.get("SFM_FAST_BUILD", "all")
    if wanted not in ("none", "cpu", "cuda", "all"):
        sys.exit(f"SFM_FAST_BUILD must be none, cpu, cuda or all, got {wanted!r}")
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        print("sfm_fast: no torch at installation, so no compiled kernels (see the README)", file=sys.stderr)
        return {}
    extensions = []
    if wanted in ("cpu", "all"):
        extensions.append(
            CppExtension(
                "sfm_fast._C",
                ["csrc/ops.cpp", *sources("cpu")],
                extra_compile_args=CXX_FLAGS,
                depends=headers(),
                optional=True,
                py_limited_api=True,
            )
        )
    home = cuda_home(cpp_extension.CUDA_HOME)
    if wanted in ("cuda", "all") and torch.version.cuda and home:
        cpp_extension.CUDA_HOME = home
        # Without a visible GPU torch can't guess; never gate on torch.cuda.is_available(): containers are built without one.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        extensions.append(
            CUDAExtension(
                "sfm_fast._C_cuda",
                sources("cuda"),
                extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
                depends=headers(),
                library_dirs=[f"{home}/lib64", f"{home}/lib"],
                optional=True,
                py_limited_api=True,
            )
        )

    class BuildWhatWorks(BuildExtension):
        """One library that can't be built doesn't stop the installation."""

        def build_extensions(self) -> None:
            every = self.extensions
            for extension in every:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    print(f"sfm_fast: WARNING: {extension.name} was not built: {error}", file=sys.stderr)
            self.extensions = every

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildWhatWorks}}


setup(
    packages=[
        *find_packages(include=["sfm_fast", "sfm_fast.*"]),
        "sfm_fast.kernels",
        "sfm_fast.benchmarks",
        *(f"sfm_fast.benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={"sfm_fast": "sfm_fast", "sfm_fast.kernels": "kernels", "sfm_fast.benchmarks": "benchmarks"},
    py_modules=["pytest_sfm_fast"],
    package_data={"sfm_fast": ["py.typed", "data/assets/*", "backbones/assets/*"]},
    **build(),
)
