"""Builds csrc at installation where torch is importable; elsewhere the first call does."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    def run(self):
        super().run()
        spec = importlib.util.spec_from_file_location("_build", ROOT / "udi_kernels" / "_build.py")
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "udi_kernels" / "_lib"
        for kind in ("cpu", "cuda"):
            try:
                recipe.build(kind, target)
            except recipe.BuildError as e:
                print(f"udi_kernels: {kind} kernels not built at installation: {e}", file=sys.stderr)
        for lock in target.glob("*.lock"):
            lock.unlink()


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    cmdclass={"build_py": BuildPy},
    distclass=BinaryDistribution,
    packages=[
        "udi_kernels",
        "udi_kernels.triton",
        "udi_kernels.csrc",
        "udi_kernels.csrc.cpu",
        "udi_kernels.csrc.cuda",
        *find_packages("python", include=["udi_trainer*"]),
    ],
    package_dir={"udi_kernels.csrc": "csrc", "udi_trainer": "python/udi_trainer"},
    package_data={
        "udi_kernels": ["py.typed"],
        "udi_kernels.csrc": ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"],
        "udi_trainer": ["py.typed"],
    },
)
