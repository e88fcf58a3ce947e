# SPDX-License-Identifier: MIT
"""A key-value service that moves to another process under load. ``python -m examples.kv_service``."""
