"""Builds csrc at installation if torch is importable; otherwise the first call builds it."""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    def run(self):
        super().run()
        package = types.ModuleType("recipe")  # udi_kernels without its __init__.py, which imports torch
        package.__path__ = [str(ROOT / "udi_kernels")]
        sys.modules["recipe"] = package
        recipe = importlib.import_module("recipe._build")
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "udi_kernels" / "_lib"
        for kind in ("cpu", "cuda"):
            try:
                recipe.build(kind, target)
            except recipe.BuildError as e:
                recipe._cache.say(f"{kind} kernels not built at installation: {e}")
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
