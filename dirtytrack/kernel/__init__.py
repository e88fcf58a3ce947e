# SPDX-License-Identifier: MIT
"""The only room that knows the kernel's numbers and the C core. Everything above speaks Python."""
