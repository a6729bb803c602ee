import json
import random
import re
from pathlib import Path

import pytest

from harness.report.page import write_page

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
INK = "return getComputedStyle(document.querySelector('#scatter .xtick text')).fill"
HOSTILE = (
    "Traceback\n  line 3\nValueError: </script><img src=x onerror=\"document.title='owned'\"> & <b>"
)
MARKS = {
    "wikitext-2": ["same corpus as calibration", "first 8 of 145 windows"],
    "arc_easy": ["first 200 documents"],
}
BITS = {"nvfp4": 4.5, "int4": 4.25, "mxfp4": 4.25, "fouroversix": 4.5, "int8": 8.25, "mxfp6": 6.25}
GAIN = {
    "identity": 1.0,
    "hadamard": 0.8,
    "quarot": 0.7,
    "rht": 0.75,
    "dst": 0.9,
    "kronecker": 0.6,
    "smoothquant": 1.1,
}
EDGES = [2.0 ** (i / 2 - 20) for i in range(65)]


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def store_run(root: Path, index: int, status: str = "done", error: str | None = None) -> str:
    """A run as the store keeps it; the same index gives the same figures. Returns its id."""
    draw = random.Random(index)
    form, transform, solver = (
        draw.choice(list(BITS)),
        draw.choice(list(GAIN)),
        draw.choice(["rtn", "gptq"]),
    )
    run_id = f"smollm2_135m-{form}-{transform}-{solver}-{index:010x}"
    run = root / run_id
    started = f"2026-01-{1 + index // 1440:02d}T{index // 60 % 24:02d}:{index % 60:02d}:00+0000"
    put(
        run / "status.json",
        {
            "status": status,
            "started": started,
            "updated": started,
            "stage": "quantized",
            "error": error,
        },
    )
    put(
        run / "config.yaml",
        f"""
seed: {index % 3}
run_root: {root}
model: {{name: smollm2_135m, hf_token: hidden}}
format:
  name: {form}
  weight: {{bits: {int(BITS[form])}, clip: [0.5, 1]}}
transform: {{name: {transform}}}
solver: {{name: {solver}}}
""",
    )
    if status == "failed":
        return run_id
    worse = (
        14
        * GAIN[transform]
        * 2 ** (4.25 - BITS[form])
        * (0.4 if solver == "gptq" else 1)
        * draw.uniform(0.8, 1.2)
    )
    kl = worse / 25
    put(
        run / "metrics.json",
        {
            "run_id": run_id,
            "status": status,
            "command": f"python run.py format={form} transform={transform} solver={solver}",
            "choices": {
                "model": "smollm2_135m",
                "data": "text",
                "format": form,
                "transform": transform,
                "solver": solver,
            },
            "stages": {
                "baseline": {"ppl": {"wikitext-2": 22.75, "pydoc": 14.12}},
                "quantized": {
                    "ppl": {"wikitext-2": 22.75 + worse, "pydoc": 14.12 + worse / 2},
                    "divergence": {"wikitext-2": {"kl": kl, "top1": 1 - kl / 2}},
                    "zeroshot": {
                        "arc_easy": {
                            "acc": 0.5,
                            "acc_norm": 0.44 - kl / 8,
                            "acc_norm_stderr": 0.035,
                            "n": 200,
                        }
                    },
                },
            },
            "bits_per_weight": BITS[form] + draw.uniform(0, 0.1),
            "seconds": {"load": 3.0, "quantized": draw.uniform(20, 90)},
            "peak_memory_mb": draw.uniform(900, 1500),
            "marks": MARKS,
            "layers": [{"name": "layer that is not embedded"}],
        },
    )
    noise = [worse * (1 + i) * draw.uniform(0.8, 1) / 1e3 for i in range(30)]
    points = [
        {"step": i, "block/rel_error": noise[i], "block/sqnr_db": 20 - i / 4} for i in range(30)
    ]
    put(
        run / "tracking" / "curves.jsonl",
        "".join(json.dumps(point) + "\n" for point in points) + '{"step": 30, "blo',
    )
    spread = 1 if transform == "identity" else 3
    sites = {}
    for n, site in enumerate(("attn_in", "o_in", "mlp_in", "down_in")):
        counts = [
            [int(1e6 * 2 ** (-((abs(i - 38) / 3) ** 1.5) / s)) for i in range(64)]
            for s in (3.0 + n, (3.0 + n) / spread)
        ]
        sites[site] = {"before": counts[0], "after": counts[1]}
    worst = [
        {
            "layer": i,
            "site": site,
            "before": {"max_over_median": 300.0 + i, "kurtosis": 88.0 - i},
            "after": {"max_over_median": 12.0 + i, "kurtosis": 4.0},
        }
        for i in range(30)
        for site in sites
    ]
    put(run / "outliers.json", {"edges": EDGES, "sites": sites, "rows": worst})
    return run_id


def embedded(page: Path) -> dict:
    """The data a browser would parse: up to the first end tag."""
    return json.loads(
        page.read_text("utf-8")
        .split('<script id="data" type="application/json">')[1]
        .split("</script>")[0]
    )


def settings(data: dict, run: dict) -> dict[str, str]:
    return dict(data["settings"][i] for i in {*data["base"]} ^ {*run["config"]})


def test_figures_are_embedded_and_what_runs_share_is_stored_once(tmp_path):
    ids = [store_run(tmp_path / "runs", index) for index in range(12)]
    page = write_page(tmp_path / "runs", tmp_path / "out" / "page.html")
    assert page == tmp_path / "out" / "page.html" and [
        path.name for path in page.parent.iterdir()
    ] == ["page.html"]
    data = embedded(page)
    assert [run["id"] for run in data["runs"]] == ids[::-1]  # newest first
    run, stored = (
        data["runs"][-1],
        json.loads((tmp_path / "runs" / ids[0] / "metrics.json").read_text()),
    )
    final = stored["stages"]["quantized"]
    place = {(one["source"], one["title"]): str(i) for i, one in enumerate(data["columns"])}
    assert list(place) == [
        ("wikitext-2", "ppl"),
        ("wikitext-2", "KL"),
        ("wikitext-2", "top-1"),
        ("pydoc", "ppl"),
        ("arc_easy", "arc_easy"),
    ]
    ppl = place["pydoc", "ppl"]
    assert run["figures"][ppl][0] == pytest.approx(final["ppl"]["pydoc"], rel=1e-5)
    assert run["baseline"][ppl] == 14.12
    value, *known = run["figures"][place["arc_easy", "arc_easy"]]
    assert known == [0.035, 200, "acc_norm"]
    assert value == pytest.approx(final["zeroshot"]["arc_easy"]["acc_norm"], rel=1e-3)
    assert run["figures"][place["wikitext-2", "KL"]][0] == pytest.approx(
        final["divergence"]["wikitext-2"]["kl"], rel=1e-3
    )
    assert [data["marks"][i] for i in run["marks"]["wikitext-2"]] == [
        list(mark) for mark in zip("cs", MARKS["wikitext-2"])
    ]
    steps, errors = run["curves"]["block/rel_error"]
    assert steps == list(range(30)) and all(error == float(f"{error:.4g}") for error in errors)
    attention = run["activations"]["sites"]["attn_in"]
    assert attention["worst"]["before"] == {"max_over_median": [329, 29], "kurtosis": [88, 0]}
    assert {run["activations"]["sites"]["attn_in"]["before"] for run in data["runs"]} == {
        attention["before"]
    }
    assert "not embedded" not in page.read_text("utf-8")
    for run in data["runs"]:  # base and differences give every setting back
        held = settings(data, run)
        assert held["format.name"] == run["format"] and held["format.weight.clip"] == "[0.5, 1]"
        assert not {"run_root", "model.hf_token"} & {*held}


def test_only_the_runs_asked_for(tmp_path):
    ids = [store_run(tmp_path, index) for index in range(4)]
    assert {
        run["id"]
        for run in embedded(write_page(tmp_path, tmp_path / "page.html", ids[1:3]))["runs"]
    } == {*ids[1:3]}


def test_unfinished_and_damaged_runs_are_shown_as_far_as_they_got(tmp_path):
    failed = store_run(tmp_path, 0, "failed", HOSTILE)
    damaged = store_run(tmp_path, 1)
    put(tmp_path / damaged / "config.yaml", "a: [")
    put(tmp_path / damaged / "outliers.json", "{")
    again = (
        '{"step": 0, "block/rel_error": 2}\n'
        '{"step": 0, "block/rel_error": 1}\n'
        '{"step": 1, "block/rel_error": NaN}\n7\n'
    )
    put(tmp_path / damaged / "tracking" / "curves.jsonl", again)
    put(tmp_path / "empty" / "status.json", "{}")
    page = write_page(tmp_path, tmp_path / "page.html")
    runs = {run["id"]: run for run in embedded(page)["runs"]}
    assert runs["empty"] == {"id": "empty", "status": "interrupted", "model": "empty"}
    assert runs[failed]["error"] == HOSTILE.splitlines()[-1] and "figures" not in runs[failed]
    assert runs[failed]["format"] in BITS  # from its id: it never wrote its choices
    assert (
        runs[damaged]["curves"] == {"block/rel_error": [[0], [1]]}
        and "activations" not in runs[damaged]
    )


def sweep(
    root: Path, count: int = 3, model: str = "zephyr", blocks: int = 30, extra: str = ""
) -> list[str]:
    """Runs of one model, format, transform and solver that only their group size tells apart, with
    a quantized head."""
    ids = []
    for index in range(count):
        run_id = f"{model}-int4-identity-rtn-{model}{index:04d}"
        run, size = root / run_id, 16 * 2**index
        begun = f"2026-02-01T00:{index:02d}:00+0000"
        put(run / "status.json", {"status": "done", "started": begun, "updated": begun})
        put(
            run / "config.yaml",
            f"""
seed: 0
run_root: {root}
model: {{name: {model}}}
format: {{name: int4, weight: {{bits: 4, group_size: {size}}}}}
tracking: {{name: {index}}}
api_key: {index}
{extra}""",
        )
        put(
            run / "metrics.json",
            {
                "status": "done",
                "command": "python run.py",
                "bits_per_weight": 4 + 16 / size,
                "choices": dict(zip(("model", "format", "transform", "solver"), run_id.split("-"))),
                "stages": {"quantized": {"ppl": {"pydoc": 30.0 + index}}},
            },
        )
        points = [{"step": i, "block/rel_error": 0.01 + i / 1e3} for i in range(blocks)]
        points += [
            {"step": 0, "outside/lm_head/rel_error": 0.05, "outside/embed_tokens/rel_error": 0.002}
        ]
        points += [{"step": i, "learn/loss": 1 / i} for i in range(1, 1002)]
        put(
            run / "tracking" / "curves.jsonl", "".join(json.dumps(point) + "\n" for point in points)
        )
        ids.append(run_id)
    return ids


def test_points_of_a_sweep_are_told_apart(tmp_path):
    ids = sweep(tmp_path / "runs")
    data = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))
    assert {run["id"]: run["settings"] for run in data["runs"]} == {
        name: f"weight.group_size={16 * 2**index}" for index, name in enumerate(ids)
    }
    (one,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html", ids[:1]))["runs"]
    assert "settings" not in one  # nothing beside it to be told from


def test_long_curves_are_thinned_to_what_a_panel_shows(tmp_path):
    sweep(tmp_path / "runs", 1)
    (run,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))["runs"]
    steps, losses = run["curves"]["learn/loss"]
    assert steps == [*range(1, 1002, 6), 1001] and losses == [
        float(f"{1 / step:.4g}") for step in steps
    ]
    assert run["curves"]["block/rel_error"][0] == list(range(30))


def test_a_checkpoint_is_shown_by_what_made_it(tmp_path):
    (name,) = sweep(tmp_path / "runs", 1)
    path = tmp_path / "runs" / name / "metrics.json"
    put(
        path,
        json.loads(path.read_text())
        | {"holds": {"format": "int4-w4a4", "transform": "quarot", "solver": None}},
    )
    (run,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))["runs"]
    assert (run["model"], run["format"], run["transform"]) == (
        "zephyr",
        "int4-w4a4",
        "quarot",
    ) and "solver" not in run


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    from plotly.offline import get_plotlyjs

    store_run(tmp_path, 0, "failed", HOSTILE)
    text = write_page(tmp_path, tmp_path / "page.html").read_text("utf-8")
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < len(text) / 10
    assert not re.search(r"https?://|@import|\burl\(|\bfetch\(|XMLHttpRequest", own)
    assert "default-src 'none'" in own
    assert "<img src=x" not in text and own.count("</script>") == 3


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
