"""The report page in a headless Chromium of its own, which keeps a log of what it asks for."""

import json
from pathlib import Path

import pytest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DRAWN = """
    return ['scatter', 'heat', 'curves', 'activations'].every(
      id => document.querySelector(`#${id} .main-svg`));"""


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium of its own, with a log of its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        pytest.skip(f"no Chromium here: {CHROMIUM} and {DRIVER} are needed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1400, 2400)
    driver.get("about:blank")
    driver.get_log("performance")  # what the browser's own first tab asked for
    yield driver
    driver.quit()


def wait(browser, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.execute_script(script))


def opened(browser, page: Path) -> None:
    """Open the page and wait until its plots are drawn."""
    browser.get(page.as_uri())
    wait(browser, DRAWN)


def silent(browser) -> None:
    """No error on the console, and nothing was asked for but the page itself and what it carries
    inside."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert len(asked) and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
