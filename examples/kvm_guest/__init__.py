# SPDX-License-Identifier: MIT
"""A virtual machine that migrates while it runs. ``python -m examples.kvm_guest``, on a host that has /dev/kvm."""
