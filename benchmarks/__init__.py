# SPDX-License-Identifier: MIT
"""What dirtytrack costs, each time as a ratio against the bare C that does the same job in the same run.

``python -m benchmarks`` runs everything, ``python -m benchmarks collect import`` what is named.
"""
