"""The page in a real browser: every plot is drawn, with its words, and nothing is asked of the network."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from examples.multi_turn_replay.replay_report import OWN_ROUTES, REPLAYED
from examples.multi_turn_replay.rollout import Conversation
from examples.multi_turn_replay.run_steps import report_steps, write_steps
from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.report.comparison import write_comparison
from router_replay.report.page import write_report
from router_replay.report.summary import RunSummary, summarize
from router_replay.report.table import rows
from router_replay.run import Dynamics, find_files, read_run, read_tallies, write_step
from tests.router_replay.report.runs import NAMES, run_step, write_run

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
ROUTES_PLOT = "route-heat-map"
PLOTS = (
    *("ratio-tails", "ratio-scatter", "kl-over-steps", "tails-over-steps"),
    *(ROUTES_PLOT, "weight-histogram", "effective-sample-size"),
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-quic"),
    # Chromium's own errands would be taken for requests of the page.
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, (
        "no chromium and chromedriver on the PATH: `make test` installs them (scripts/browser.sh)"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def _resize(browser: webdriver.Chrome, width: int) -> None:
    # A window cannot be as narrow as a telephone, an emulated one can.
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _open(browser: webdriver.Chrome, path: Path, width: int = 1100) -> None:
    # What is in the logs is of the pages before.
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    _resize(browser, width)
    browser.get(path.as_uri())


def _page(folder: Path, num_steps: int, **options) -> tuple[Path, RunSummary]:
    summary = summarize(read_run(find_files([write_run(folder / "run", num_steps, **options)])))
    write_report(summary, folder / "report.html", title="Run <&> Co", inputs=["run"])
    return folder / "report.html", summary


def _requested(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]


def _assert_drawn(figure: WebElement) -> None:
    image, caption = figure.find_element(By.TAG_NAME, "img"), figure.find_element(By.TAG_NAME, "figcaption")
    assert figure.is_displayed() and image.is_displayed() and caption.is_displayed()
    assert image.get_property("complete") is True
    assert image.get_property("naturalWidth") > 600 and image.get_property("naturalHeight") > 250
    assert len(image.get_attribute("alt")) > 20
    assert len(caption.text) > 100
    pixels = matplotlib.image.imread(io.BytesIO(image.screenshot_as_png))[..., :3]
    height, width, _ = pixels.shape
    assert width == pytest.approx(image.size["width"], abs=2)
    # Inside, where neither the frame nor its labels are: the series' own colours.
    inner = pixels[height // 6 : -height // 6, width // 8 : -width // 12]
    saturated = (inner.max(-1) - inner.min(-1)) > 0.25
    assert saturated.mean() > 0.0015, f"{figure.get_attribute('id')}: nothing is drawn"
    assert len(np.unique((pixels.reshape(-1, 3) * 255).round(), axis=0)) > 30
    # White paper around it.
    assert (pixels[:2] > 0.99).all() and (pixels[:, -1] > 0.9).mean() > 0.9


def _assert_all_drawn(figures: Sequence[WebElement]) -> None:
    for figure in figures:
        _assert_drawn(figure)
    pictures = [figure.find_element(By.TAG_NAME, "img").get_attribute("src") for figure in figures]
    assert len(set(pictures)) == len(pictures), "two sections show the same picture"


def test_every_plot_is_drawn_and_nothing_is_asked_of_the_network(browser: webdriver.Chrome, tmp_path: Path):
    path, summary = _page(tmp_path, 3, zeros=1)
    _open(browser, path)
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert tuple(figure.get_attribute("id") for figure in figures) == PLOTS
    _assert_all_drawn(figures)
    assert browser.title == browser.find_element(By.TAG_NAME, "h1").text == "Run <&> Co"
    table = browser.find_elements(By.CSS_SELECTOR, "#diagnostics tbody tr")
    assert len(table) == len(rows(summary)) > 20
    for element, row in zip(table, rows(summary), strict=True):
        assert element.find_element(By.TAG_NAME, "th").text == f"{row.name}\n{row.meaning}"
        assert [cell.text for cell in element.find_elements(By.TAG_NAME, "td")] == list(row.cells)
    heads = browser.find_elements(By.CSS_SELECTOR, "#diagnostics thead th")
    assert [head.text for head in heads[1:]] == list(NAMES)
    assert "probability 0 to 3 of" in browser.find_element(By.CLASS_NAME, "warnings").text
    assert {url.partition(":")[0] for url in _requested(browser)} <= {"file", "data"}
    assert [url for url in browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            if not url.startswith("data:")] == []  # fmt: skip
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    text = path.read_text()
    assert not re.search(r"<script|https?:|url\(|@import|src=\"(?!data:)|href=\"(?!data:)", text)
    assert path.stat().st_size < 2_000_000


def _conversation(generator: torch.Generator) -> Conversation:
    """Forty tokens, the last thirty sampled; all but the last have routes in two layers."""
    routes = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(39 * 2)]).view(39, 2, 2)
    token_ids = torch.randint(100, (40,), generator=generator).tolist()
    masks = RoutingMasks.from_indices(routes, torch.ones(39, dtype=torch.bool), start=0, geometry=GEOMETRY,
                                      codec="bitset", token_ids=token_ids)  # fmt: skip
    logprobs = (-3 * torch.rand(40, generator=generator) - 0.01).tolist()
    return Conversation(
        token_ids=token_ids,
        sampled=[False] * 10 + [True] * 30,
        rollout_logprobs=logprobs,
        masks=masks,
        num_turns=1,
        correct=True,
        prefix_cached_tokens=0,
        masks_bytes=1,
    )


def test_every_plot_of_the_demos_page_is_drawn(browser: webdriver.Chrome, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    conversations = [_conversation(generator) for _ in range(16)]
    native, replay, own = [], [], []
    for each in conversations:
        logprobs = torch.tensor(each.rollout_logprobs)
        native.append(logprobs + 0.1 * torch.randn(40, generator=generator))
        replay.append(logprobs + 0.02 * torch.randn(40, generator=generator))
        routes = torch.cat([each.masks.indices(), each.masks.indices()[:1]])
        # In every fifth token the trainer takes another pair of experts.
        routes[::5] = (routes[::5] + 1) % 8
        own.append(routes)
    files = write_steps(conversations, native, replay, own, tmp_path / "mismatch", group_size=4, num_steps=4)
    report_steps(files, tmp_path / "report.html")
    _open(browser, tmp_path / "report.html")
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert tuple(figure.get_attribute("id") for figure in figures) == PLOTS
    _assert_all_drawn(figures)
    heads = browser.find_elements(By.CSS_SELECTOR, "#diagnostics thead th")
    assert [head.text for head in heads[1:]] == [OWN_ROUTES, REPLAYED]
    assert browser.find_element(By.CLASS_NAME, "facts").text.startswith("4 steps, 0 to 3; 480 response tokens")


def test_how_training_went_is_drawn_for_one_run_and_for_several(browser: webdriver.Chrome, tmp_path: Path):
    step = run_step(0, names=("old",))
    for name, rewards in (("own", [0.5] * 20 + [0.0] * 15), ("R3", [0.5] * 35)):
        for number, reward in enumerate(rewards):
            said = Dynamics(reward=reward, gradient_norm=1.0 + number % 3, entropy=1.0 - number / 100)
            write_step(tmp_path / name, replace(step, step=number, dynamics=said))
    summaries = [(name, summarize(read_tallies(find_files([tmp_path / name])))) for name in ("own", "R3")]
    write_report(summaries[0][1], tmp_path / "one.html")
    _open(browser, tmp_path / "one.html")
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert tuple(figure.get_attribute("id") for figure in figures) == ("dynamics", *PLOTS)
    _assert_drawn(figures[0])
    assert "The reward collapses at step 22" in browser.find_element(By.CLASS_NAME, "warnings").text
    write_comparison(summaries, tmp_path / "two.html", title="Two runs")
    _open(browser, tmp_path / "two.html")
    (figure,) = browser.find_elements(By.TAG_NAME, "figure")
    _assert_drawn(figure)
    rows_of = browser.find_elements(By.CSS_SELECTOR, "#dynamics-table tbody tr")
    assert [row.text.split()[0] for row in rows_of] == ["own", "R3"]
    assert [row.text.endswith(end) for row, end in zip(rows_of, ("step 22", "none"), strict=True)] == [True, True]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#diagnostics tbody tr")) > 20
    _resize(browser, 400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_page_fits_its_window(browser: webdriver.Chrome, tmp_path: Path, width: int):
    path, _ = _page(tmp_path, 2)
    _open(browser, path, width)
    # A page that is wider than its window would have to be pushed to and fro to be read.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for image in browser.find_elements(By.TAG_NAME, "img"):
        # In a narrow window a plot is as wide as its words need, and scrolls in its frame.
        assert image.size["width"] >= 600
        natural = image.get_property("naturalWidth") / image.get_property("naturalHeight")
        assert image.size["width"] / image.size["height"] == pytest.approx(natural, rel=0.01)


def test_a_run_without_routes_says_so(browser: webdriver.Chrome, tmp_path: Path):
    path, _ = _page(tmp_path, 2, routes=False)
    _open(browser, path)
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert [figure.get_attribute("id") for figure in figures] == [name for name in PLOTS if name != ROUTES_PLOT]
    _assert_all_drawn(figures)
    missing = browser.find_element(By.ID, ROUTES_PLOT)
    assert missing.is_displayed() and "no step has the routes of both sides" in missing.text
    assert "No routes in these files" in browser.find_element(By.CLASS_NAME, "warnings").text
    assert "routes that differ" not in browser.find_element(By.ID, "diagnostics").text


def test_a_run_of_a_single_step_has_every_plot(browser: webdriver.Chrome, tmp_path: Path):
    path, _ = _page(tmp_path, 1, names=("old",))
    _open(browser, path)
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert tuple(figure.get_attribute("id") for figure in figures) == PLOTS
    # A single point has little ink of its own.
    _assert_all_drawn(figures[:2] + figures[4:])
    assert browser.find_element(By.CLASS_NAME, "facts").text.startswith("step 0; 168 response tokens")
