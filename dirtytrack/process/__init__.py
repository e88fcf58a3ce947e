# SPDX-License-Identifier: MIT
"""Other processes: attach to a running one, and see what it writes."""
