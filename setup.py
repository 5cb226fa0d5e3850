"""Compiles csrc at installation if torch is at hand; otherwise the first call does.

A wheel holds the libraries for every CPU of this platform and names torch's version in its own: 0.2.0+torch2.14.
"""

import importlib
import re
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
package = types.ModuleType("recipe")  # udi_kernels without its __init__.py, which imports torch
package.__path__ = [str(ROOT / "udi_kernels")]
sys.modules["recipe"] = package
recipe = importlib.import_module("recipe._build")


def version():
    own = re.search('__version__ = "(.+)"', (ROOT / "udi_kernels" / "__init__.py").read_text())[1]
    try:
        return own if "sdist" in sys.argv else f"{own}+torch{recipe.torch_version().replace('+', '.')}"
    except recipe.BuildError:
        return own


class BuildPy(build_py):
    def run(self):
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "udi_kernels" / "_lib"
        if not self.editable_mode:  # build/ may hold libraries of another Python or torch
            shutil.rmtree(target, ignore_errors=True)
        for kind in ("cpu", "cuda"):
            try:
                recipe.build(kind, target, None if self.editable_mode else recipe.capabilities(kind))
            except recipe.BuildError as e:
                recipe._cache.say(f"{kind} kernels not built at installation: {e}")
        for lock in target.glob("*.lock"):
            lock.unlink()
        self.distribution.native = any(target.glob("*.so"))


class BdistWheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.native
        super().run()


class KernelDistribution(Distribution):
    native = False  # whether the build made a library

    def has_ext_modules(self):
        return self.native


setup(
    version=version(),
    cmdclass={"bdist_wheel": BdistWheel, "build_py": BuildPy},
    distclass=KernelDistribution,
    packages=[
        "udi_kernels",
        "udi_kernels.triton",
        "udi_kernels.csrc",
        "udi_kernels.csrc.cpu",
        "udi_kernels.csrc.cuda",
        "udi_kernels.csrc.ops",
        *find_packages("python", include=["udi_trainer*"]),
    ],
    package_dir={"udi_kernels.csrc": "csrc", "udi_trainer": "python/udi_trainer"},
    package_data={
        "udi_kernels": ["py.typed"],
        "udi_kernels.csrc": ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"],
        "udi_trainer": ["py.typed"],
    },
)
