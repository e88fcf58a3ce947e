# SPDX-License-Identifier: MIT
"""The tests in machines with other kernels: `python -m kernels --help`."""
