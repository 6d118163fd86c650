"""Makes the pictures of docs/search_page.md from a running search page, with Chromium.

make demo KEEP=1                                        # prints the address of a page
.venv/bin/python docs/images/search_page.py ADDRESS --query="collapsible video call lens for my son"
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FOLDER = Path(__file__).resolve().parent
COLOURS = 128  # of a picture: enough for text and badges, a third of the bytes
PATIENCE_S = 30


def main() -> None:
    """Makes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="address of the page, which `dpsr demo --keep` prints")
    parser.add_argument("--query", default="collapsible video call lens for my son", help="the query to show")
    parser.add_argument("--first", default="bm25", help="pipeline of the first list")
    parser.add_argument("--second", default="dpsr", help="pipeline of the second list")
    arguments = parser.parse_args()
    asked = {"q": arguments.query, "a": arguments.first, "b": arguments.second}
    with chromium() as driver:
        show(driver, arguments.address, asked, 1280, 860, "light")
        save(driver, "search_page.png")
        show(driver, arguments.address, {"q": arguments.query, "a": arguments.second, "judge": ""}, 390, 760, "dark")
        save(driver, "search_page_phone.png")


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Starts a browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox does not run as root.
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: webdriver.Chrome, address: str, asked: dict[str, str], width: int, height: int, scheme: str) -> None:
    """Opens the page, and waits until its lists are there."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(f"{address.rstrip('/')}/?{urlencode(asked)}")
    wait = WebDriverWait(driver, PATIENCE_S)
    wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".card, .notice"))
    wait.until(lambda _: not driver.find_elements(By.CSS_SELECTOR, "[aria-busy]"))
    # The first search is slower than all others: nothing was in the caches.
    driver.refresh()
    wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".card, .notice"))
    wait.until(lambda _: not driver.find_elements(By.CSS_SELECTOR, "[aria-busy]"))
    time.sleep(0.5)  # transitions


def save(driver: webdriver.Chrome, name: str) -> None:
    """Writes what the browser shows as a small PNG file."""
    picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
