"""The report page in a browser: sorted, filtered, compared, on a phone, with a thousand runs."""

import json

import pytest
from chromium import browser, opened, silent, wait
from page_runs import HOSTILE, embedded, settings, store_run, sweep

from harness.report.page import write_page

__all__ = ["browser"]  # a fixture
INK = "return getComputedStyle(document.querySelector('#scatter .xtick text')).fill"


def column(browser, name: str) -> list[str]:
    """The shown texts of a column, marks left out, top to bottom."""
    return browser.execute_script(
        """
        const head = [...document.querySelectorAll("#runs thead tr:last-child > *")];
        const titles = head.map(cell => cell.textContent);
        const rows = [...document.querySelectorAll("#runs tbody tr:not(.failed)")];
        return rows.map(row => row.cells[titles.indexOf(arguments[0])].firstChild?.textContent);""",
        name,
    )


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def seen(selector):
        return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]

    for index in range(40):
        store_run(tmp_path / "runs", index)
    failed = store_run(tmp_path / "runs", 40, "failed", HOSTILE)
    page = write_page(tmp_path / "runs", tmp_path / "page.html")
    opened(browser, page)
    assert browser.title == "Runs" and find("tr.failed .said").text == HOSTILE.splitlines()[-1]

    # sorting: by click and by Enter, numbers as numbers, runs without a figure last
    header = browser.find_element(By.XPATH, "//thead//button[text()='ppl']")
    header.click()
    rising = [float(text) for text in column(browser, "ppl")]
    assert rising == sorted(rising) and len(rising) == 40
    assert header.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    assert find("#runs tbody tr:last-child").get_attribute("class") == "failed"
    header.send_keys(Keys.ENTER)
    falling = [float(text) for text in column(browser, "ppl")]
    assert (
        falling == rising[::-1]
        and header.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    )

    # filtering: words, a group, a state; the best figure is that of the rows left
    Select(find("#filters label:nth-child(4) select")).select_by_value("nvfp4")
    left = [float(text) for text in column(browser, "ppl")]
    assert set(column(browser, "format")) == {"nvfp4"} and 0 < len(left) < 40
    assert f"{min(left):.2f}" in [text.rstrip("cs\n") for text in seen("#runs .best")]
    find("#filters input").send_keys("gptq quarot")
    assert set(column(browser, "transform")) <= {"quarot"} and set(column(browser, "solver")) <= {
        "gptq"
    }
    find("#filters input").clear()
    find("#filters input").send_keys(failed[-10:])
    Select(find("#filters label:nth-child(4) select")).select_by_value("")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")) == 1
    find("#filters input").send_keys(Keys.CONTROL, "a", Keys.DELETE)

    # what differs: only for two runs, only the settings that differ
    assert len(browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")) == 41
    find("#chosen button").click()
    boxes = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr:not(.failed) input")
    boxes[0].click()
    wait(browser, "return !document.querySelector('#diff .empty').hidden")
    boxes[1].send_keys(Keys.SPACE)
    wait(browser, "return document.querySelectorAll('#diff tbody tr').length > 0")
    ids = browser.execute_script(
        "const chosen = document.querySelectorAll('#runs tbody tr:has(:checked) code');"
        "return [...chosen].map(code => code.title)"
    )
    data = embedded(page)
    one, other = (settings(data, run) for run in data["runs"] if run["id"] in ids)
    differing = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    assert seen("#diff tbody th") == differing
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves .scatterlayer .trace")) == 2

    # the command, through the clipboard, with and without the clipboard's own interface
    for without in (False, True):
        if without:
            browser.execute_script(
                "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
            )
        row = find(f"#runs tbody tr:not(.failed):nth-of-type({2 + without})")
        row.find_element(By.CSS_SELECTOR, ".copy").click()
        wait(browser, "return document.getElementById('said').textContent === 'command copied'")
        find("#filters input").send_keys(Keys.CONTROL, "a")
        find("#filters input").send_keys(Keys.CONTROL, "v")
        pasted = find("#filters input").get_property("value")
        assert pasted.startswith("python run.py format=") and pasted in {
            run.get("command") for run in data["runs"]
        }
        assert len(column(browser, "run")) >= 1
        find("#filters input").send_keys(Keys.CONTROL, "a", Keys.DELETE)
        browser.execute_script("document.getElementById('said').textContent = ''")

    # the other colours: the plots follow
    before = browser.execute_script(INK)
    find("#theme").click()
    wait(browser, f"return ({INK[7:]}) !== {json.dumps(before)}")
    silent(browser)


@pytest.mark.browser
def test_a_sweep_in_a_browser(tmp_path, browser):
    """The heat map opens on the model of most runs; what varies has a column; blocks are whole
    numbers, the head none."""
    for index in range(3):
        store_run(tmp_path / "runs", index)
    for model in ("zephyr", "mistral"):
        sweep(tmp_path / "runs", 4, model, extra=f"device: <b>{model}</b>")
    opened(browser, write_page(tmp_path / "runs", tmp_path / "page.html"))
    opens = "return document.querySelector('#heat label:nth-child(3) select').value"
    assert browser.execute_script(opens) == "mistral"  # as many as zephyr, more than smollm2_135m
    told = {
        row
        for row in zip(column(browser, "model"), column(browser, "settings"))
        if row[0] != "smollm2_135m"
    }
    assert told == {
        (model, f"device=<b>{model}</b> weight.group_size={16 * 2**index}")
        for model in ("zephyr", "mistral")
        for index in range(4)
    }
    browser.execute_script("""
        document.querySelector('#chosen button').click();
        document.querySelector('#runs tbody input').click();""")
    wait(browser, "return document.querySelectorAll('#curves .scatterlayer .trace').length === 2")
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('#curves .xtick text')].map(t => t.textContent)"
    )
    assert ticks == ["0", "5", "10", "15", "20", "25", "head", "embedding"]
    along, beside = browser.execute_script(
        "return document.querySelector('#curves .plot').data.map(trace => [...trace.x])"
    )
    assert along == list(range(30)) and min(beside) > 30
    browser.execute_script("""
        const select = document.querySelector('#curves select');
        select.value = 'learn/loss';
        select.onchange();""")
    wait(browser, "return document.querySelector('#curves .xtitle').textContent === 'step'")
    silent(browser)


OVERLAPS = """
    const seen = [...document.querySelectorAll(".plot")].map(plot => {
      const texts = plot.querySelectorAll(
        ".xtitle, .ytitle, .xtick text, .ytick text, .legendtext, .modebar");
      return [...texts].map(text => [text, text.getBoundingClientRect()]);
    });
    const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
    return seen.flatMap(texts => texts.flatMap(([a, box], i) =>
      texts.slice(i + 1).filter(([, other]) => meet(box, other))
        .map(([b]) => `${a.textContent} | ${b.textContent}`)));"""


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_of_the_page(tmp_path, browser, theme):
    """At 390 pixels nothing is wider than the page, tables scroll inside their boxes and no text of
    a plot lies on another."""
    for index in range(12):
        store_run(tmp_path / "runs", index)
    sweep(tmp_path / "runs", 3, extra=f"data: {{path: {'/a/long/folder' * 9}}}")
    page = write_page(tmp_path / "runs", tmp_path / "page.html")
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened(browser, page)
    assert browser.execute_script("return document.documentElement.dataset.theme") == theme
    browser.execute_script("document.querySelector('#runs tbody tr:nth-child(4) input').click()")
    wait(browser, "return document.querySelectorAll('#curves .scatterlayer .trace').length >= 3")
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [
        390,
        390,
    ]
    wide = (
        "const box = document.getElementById('scroller'); return box.scrollWidth > box.clientWidth"
    )
    assert browser.execute_script(wide)
    cut = browser.execute_script("""
        return [...document.querySelectorAll(".plot text, .controls select, h2")].filter(shown =>
          shown.getBoundingClientRect().right > innerWidth).map(shown => shown.textContent)""")
    assert cut == []
    assert browser.execute_script(OVERLAPS) == []
    silent(browser)


@pytest.mark.browser
def test_a_page_without_figures(tmp_path, browser):
    store_run(tmp_path / "runs", 0, "failed", HOSTILE)
    for ids in ([], None):
        browser.get(write_page(tmp_path / "runs", tmp_path / "page.html", ids).as_uri())
        wait(
            browser,
            "return [...document.querySelectorAll('.empty')]"
            ".every(note => !note.hidden && note.textContent)",
        )
        silent(browser)


@pytest.mark.browser
def test_a_thousand_runs_open_quickly(tmp_path, browser):
    for index in range(1000):
        store_run(tmp_path / "runs", index)
    page = write_page(tmp_path / "runs", tmp_path / "page.html")
    shown = []
    for _ in range(2):
        opened(browser, page)
        shown.append(
            browser.execute_script(
                "return performance.getEntriesByName('table shown')[0].startTime"
            )
        )
    assert len(embedded(page)["runs"]) == 1000 and 0 < min(shown) < 2000
    count = "return document.querySelectorAll('#runs tbody tr').length"
    first = browser.execute_script(count)
    assert 20 < first < 200  # the others are made as they are scrolled to
    browser.execute_script("document.getElementById('scroller').scrollTop = 1e6")
    wait(browser, f"{count} > {first}")
    silent(browser)
