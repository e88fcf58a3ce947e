# SPDX-License-Identifier: MIT
"""What pyproject.toml cannot say: the extension, its stable ABI, and that only Linux has one."""

import sys
import sysconfig

from setuptools import setup

ON_LINUX = sys.platform == "linux"
# Free-threaded and debug builds of CPython have no stable ABI.
STABLE_ABI = ON_LINUX and not sysconfig.get_config_var("Py_GIL_DISABLED") and not hasattr(sys, "gettotalrefcount")

setup(
    cffi_modules=["dirtytrack/kernel/_build.py:ffibuilder"] if ON_LINUX else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
