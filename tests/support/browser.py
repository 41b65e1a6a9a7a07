"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cliplet.doctor import find_chromium


@contextmanager
def open_chromium() -> Iterator[Any]:
    """Context with a headless Chromium; none is a skip, and a failure where CI promises one."""
    program = find_chromium()
    say: Callable[[str], object] = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    if program is None:
        say("no Chromium found: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        say("no playwright found: pip install 'cliplet[dev]'")
    sync_api = importlib.import_module("playwright.sync_api")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(program),
            args=[*flags.split(), "--disable-component-update", "--disable-sync"],
        )
        yield browser
        browser.close()
