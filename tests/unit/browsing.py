# SPDX-License-Identifier: MIT
"""Which browsers can open a page without a window: the first of these that is installed is used."""

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome", "chromium-browser")
