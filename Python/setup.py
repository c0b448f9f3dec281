"""What `pyproject.toml` cannot say: the extension module, the tool, and the wheel's tag.

Built by `scripts/build-wheel`, which puts the library and the tool where they belong.
"""

import ctypes
import os
import shutil
from pathlib import Path

from setuptools import setup

# Setuptools' own, once that is imported.
from distutils.command.build_scripts import build_scripts  # isort: skip


class CopiedTool(build_scripts):
    """The tool is a binary, which setuptools would read as a script."""

    def run(self):
        Path(self.build_dir).mkdir(parents=True, exist_ok=True)
        for script in self.scripts:
            shutil.copy2(script, self.build_dir)


def library_version() -> str:
    library = ctypes.CDLL(str(Path(os.environ["SWIFTEP_C"]) / "lib/libswiftep.so"))
    library.swiftep_version.restype = ctypes.c_char_p
    return library.swiftep_version().decode()


setup(
    version=library_version(),
    cffi_modules=["build_native.py:ffi"],
    scripts=["swiftep-tool/swiftep"],
    cmdclass={"build_scripts": CopiedTool},
    options={"bdist_wheel": {"py_limited_api": "cp39", "plat_name": "manylinux_2_34_x86_64"}},
)
