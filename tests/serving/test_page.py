"""The search page in a real browser, in front of a real gateway: type, filter, compare, judge.

Titles and brands of the shop are HTML and scripts, which the page must show as text.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_shops import Models
from processes import PATIENCE_S, free_port
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError
from dpsr_export import inverted_index
from dpsr_serving.gateway.judgments import JudgmentFile
from dpsr_serving.gateway.system import search_system
from dpsr_tf.data.store import Store

pytestmark = pytest.mark.slow

# A number of JavaScript would round these ids.
FIRST_ID = 2**53 + 1
HOSTILE = [
    "red shoes <script>document.title = 'owned'</script>",
    "red shoes <img src=x onerror=\"document.title='owned'\">",
    "red shoes </li></ol></main><h1>&lt;owned&gt;",
    'red shoes "onmouseover="document.title=\'owned\'" ${alert(1)}',
]
BRANDS = ["Acme", "<b>Bold & Co</b>", "Zentra"]


def items() -> Iterator[dict[str, Any]]:
    """30 shoes, the first of which have titles that are HTML, and 10 boots; three shoes are one product."""
    for row in range(40):
        kind = "boots" if row >= 30 else "shoes"
        title = HOSTILE[row] if row < len(HOSTILE) else f"red {kind} number {row}"
        product = "runner" if row in (10, 11, 12) else f"product {row}"
        yield {
            "item": FIRST_ID + row, "title": title, "brand": BRANDS[row % 3], "price": 10.0 + row, "product": product,
        }  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    """A model server whose models are functions: the model finds boots, the ranker likes the last items best."""
    started = Models()
    started.search = lambda inputs: [(FIRST_ID + 30 + i, 1 - i / 10) for i in range(8)]
    started.rank = lambda inputs: [float(item - FIRST_ID) for item in inputs["item_ids"]]
    started.rewrite = lambda inputs: [("red boots", -0.5)]
    yield started
    started.stop()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    """Everything that `dpsr search` reads; judgments.tsv will be beside it."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items()))
    (folder / "log.jsonl").write_text(json.dumps({"query": "red shoes", "item": FIRST_ID}) + "\n")
    (folder / "schema.yaml").write_text(
        """
items:
  files: items.jsonl
  id: item
  text: title
  group: product
  filters: [brand, {column: price, kind: number}]
interactions: {files: log.jsonl, query: query, item: item}
vocabulary: {min_count: 1}
"""
    )
    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    inverted_index.build(Store(folder / "store"), folder / "inverted")
    (folder / "rules.yaml").write_text(f"new boots:\n  contains: [shoes]\n  pin: [{FIRST_ID + 39}]\n")
    (folder / "search.yaml").write_text(
        f"""
index: inverted
models:
  dead: {{target: "127.0.0.1:{free_port()}"}}
  live: {{target: "{models.target}"}}
pipelines:
  ruled: {{recall: {{inverted: {{k: 100}}}}, rerank: {{collapse: true, rules: rules.yaml}}}}
  words: {{recall: {{inverted: {{k: 100}}}}}}
  limping: {{recall: {{inverted: {{k: 100}}, semantic: {{model: dead, deadline_ms: 200}}}}}}
  broken: {{recall: {{semantic: {{model: dead, deadline_ms: 200}}}}}}
  full:
    rewrite: {{model: live, n: 1, deadline_ms: 9000}}
    recall:
      inverted: {{k: 20, deadline_ms: 9000}}
      rewritten: {{k: 20, deadline_ms: 9000}}
      semantic: {{model: live, k: 8, deadline_ms: 9000}}
    fine: {{model: live, size: 30, deadline_ms: 9000}}
    rerank: {{collapse: true}}
    deadline_ms: 9000
"""
    )
    return folder


@pytest.fixture(scope="module")
def address(shop: Path) -> Iterator[str]:
    """The address of a gateway with the page."""
    flags = [f"--config={shop / 'search.yaml'}", "--page", f"--judgments={shop / 'judgments.tsv'}", "--port=0"]
    with open(shop / "search.log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpsr_common", "search", *flags], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout
            found = re.search(r"search ready on (\S+)", process.stdout.readline())
            assert found, (shop / "search.log").read_text()
            yield found[1]
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox does not run as root.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


class Page:
    """What tests do with the page in the browser."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, path: str = "/") -> None:
        self.driver.get(self.address + path)
        self.wait(lambda: self.all("#panes select"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements, read at once."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return list(self.driver.execute_script(script, selector))

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.02).until(lambda _: condition())

    def settle(self) -> None:
        """Waits until no list is being loaded."""
        self.wait(lambda: not self.all(".pane[aria-busy]") and (self.all(".card") or self.all(".notice")))

    def keys(self, text: str) -> None:
        """Types on whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(text)

    def search(self, query: str) -> None:
        box = self.one("#query")
        box.clear()
        box.send_keys(query, Keys.ENTER)
        self.settle()

    def titles(self, pane: int = 1) -> list[str]:
        return self.texts(f".pane:nth-of-type({pane}) .title")

    def complaints(self) -> list[str]:
        """Errors and warnings of the browser's console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(chromium: webdriver.Chrome, address: str) -> Iterator[Page]:
    chromium.get_log("browser")
    found = Page(chromium, address)
    yield found
    assert found.complaints() == []


def titles_of(*kinds: str) -> set[str]:
    return {item["title"] for item in items() if any(kind in item["title"] for kind in kinds)}


def test_type_and_see_results(page: Page) -> None:
    page.open()
    page.search("red shoes")
    # The pinned boots, and the shoes, of which three are one product. A page has 20.
    assert page.titles()[0] == "red boots number 39" and len(page.titles()) == 20
    assert page.texts(".pane .total") == ["38 items"]
    assert page.texts(".card:nth-child(1) .badges .chip") == ["new boots: pinned"]
    assert [text.split()[0] for text in page.texts(".card:nth-child(2) .badge")] == ["inverted"]
    assert page.texts(".card:nth-child(2) .brand")[0] in BRANDS and page.texts(".card:nth-child(2) .price") != [""]
    assert page.texts(".funnel tbody th") == ["inverted", "coarse", "rerank"]
    counts = page.texts(".funnel .n:not(.ms)")
    assert counts == ["40", "40 → 40", "40 → 38"]
    assert all(re.fullmatch(r"\d+(\.\d)? ms", text) for text in page.texts(".funnel .ms"))
    assert page.texts(".terms dd .chip") == ["red", "shoe"]  # words are cut to their stems
    assert page.driver.title == "red shoes · DPSR"
    # The rest of the list, without a gap or an item twice.
    page.one(".more").click()
    page.wait(lambda: len(page.titles()) == 38)
    assert not page.all(".more") and len(set(page.titles())) == 38
    assert "3 variants" in page.texts(".badges .chip")


def test_titles_that_are_html_are_text(page: Page) -> None:
    page.open("/?q=red+shoes&a=words")
    page.settle()
    page.one(".more").click()
    page.wait(lambda: not page.all(".more"))
    assert set(HOSTILE) <= set(page.titles()) and set(page.titles()) == titles_of("shoes", "boots")
    assert "<b>Bold & Co</b>" in page.texts("#facets .value span:nth-of-type(1)")
    assert page.driver.title == "red shoes · DPSR"
    assert page.driver.execute_script("return document.querySelectorAll('h1, img, b, .list script').length") == 0
    # Reasons and the user's clicks show titles too.
    hostile = page.titles().index(HOSTILE[0])
    card = page.all(".card")[hostile]
    for button in card.find_elements(By.CSS_SELECTOR, ".acts button"):
        page.driver.execute_script("arguments[0].click()", button)
    page.settle()
    assert page.one("#clicked .chip").get_attribute("title").startswith(HOSTILE[0])
    page.search('<img src=x onerror="document.title=1"> \\ " { red')
    assert page.texts(".pane .total") == ["40 items"]
    assert page.driver.execute_script("return document.querySelectorAll('img').length") == 0


def test_filters_agree_with_the_list(page: Page) -> None:
    page.open("/?a=words")
    page.search("red")
    values = dict(zip(page.texts("#facets .value span:nth-of-type(1)"), page.texts("#facets .count"), strict=True))
    assert values == {"Acme": "14", "<b>Bold & Co</b>": "13", "Zentra": "13"}

    def choose(brand: str) -> None:
        page.all("#facets .value input")[page.texts("#facets .value span:nth-of-type(1)").index(brand)].click()
        page.settle()

    choose("Zentra")
    page.wait(lambda: page.texts(".pane .total") == ["13 items"])
    assert {*page.texts(".card .brand")} == {"Zentra"}
    choose("<b>Bold & Co</b>")  # beside the first one
    page.wait(lambda: page.texts(".pane .total") == ["26 items"])
    assert {*page.texts(".card .brand")} == {"Zentra", "<b>Bold & Co</b>"}
    page.one("#facet-price-max").send_keys("20", Keys.ENTER)
    page.wait(lambda: page.texts(".pane .total") == ["7 items"])
    assert all(float(price) <= 20 for price in page.texts(".card .price"))
    # The address holds all of it, and "back" takes the last step back.
    page.driver.refresh()
    page.settle()
    assert page.texts(".pane .total") == ["7 items"] and page.one("#facet-price-max").get_attribute("value") == "20"
    page.driver.back()
    page.wait(lambda: page.texts(".pane .total") == ["26 items"])
    page.one("#clear").click()
    page.wait(lambda: page.texts(".pane .total") == ["40 items"])
    page.one("#facet-price-min").send_keys("1000", Keys.ENTER)
    page.wait(lambda: page.texts(".pane .notice") == ["Nothing was found with these filters."])


def test_two_pipelines_side_by_side(page: Page) -> None:
    page.open("/?q=shoes")
    page.settle()
    page.keys("c")
    page.settle()
    page.wait(lambda: len(page.all(".pane")) == 2 and page.titles(2))
    assert [select.get_attribute("value") for select in page.all(".pane select")] == ["ruled", "words"]
    assert page.titles(1)[0] == "red boots number 39" and page.titles(2)[0] != "red boots number 39"
    assert page.texts(".pane:nth-of-type(1) .elsewhere")[:2] == ["only here", "also at 1"]
    assert page.texts(".pane:nth-of-type(2) .elsewhere")[0] == "also at 2"
    # The keys go through the lists.
    page.keys("j")
    page.keys("j")
    page.keys("l")
    active = page.driver.switch_to.active_element
    assert active.get_attribute("aria-label").startswith("2. ") and active in page.all(".pane:nth-of-type(2) .card")
    page.keys("e")
    assert page.texts(".pane:nth-of-type(2) .why th")[:2] == ["inverted", "coarse"]
    assert "b=words" in page.driver.current_url
    page.keys("c")
    assert len(page.all(".pane")) == 1


def test_judgments_are_saved_for_dpsr_evaluate(page: Page, shop: Path) -> None:
    file = shop / "judgments.tsv"
    page.open("/?q=red+boots&a=words&b=ruled")
    page.settle()
    assert not page.one(".grades").is_displayed()
    page.keys("g")
    page.keys("j")
    item = page.driver.switch_to.active_element.get_attribute("data-item")
    assert int(item) >= FIRST_ID  # to the last digit
    page.keys("3")
    page.wait(file.exists)
    assert file.read_text() == f"query\titem\tgrade\nred boots\t{item}\t3\n"
    # The same item in the other list shows the grade too.
    assert len(page.all(f".card[data-item='{item}'] input:checked")) == 2
    page.all(".card:nth-child(2) .grades input")[0].click()
    page.wait(lambda: "2 here, 2 in all" in page.one("#judge").text)
    page.driver.refresh()
    page.wait(lambda: page.all(f".card[data-item='{item}'] input:checked"))
    assert page.one(f".card[data-item='{item}'] input:checked").get_attribute("value") == "3"
    page.keys("j")
    page.keys("3")  # takes it back
    page.wait(lambda: len(file.read_text().splitlines()) == 2)
    page.keys("?")
    assert page.one("#file").text == str(file) and "dpsr evaluate" in page.one("#command").text


def test_all_stages(page: Page, models: Models) -> None:
    page.open("/?q=shoes&a=full")
    page.settle()
    stages = ["rewrite", "inverted", "rewritten", "semantic", "coarse", "fine", "rerank"]
    assert sorted(page.texts(".funnel tbody th")) == sorted(stages)
    assert page.texts(".terms dt")[:2] == ["words", "rewrites"] and page.texts(".terms button") == ["red boots"]
    assert {text.split()[0] for text in page.texts(".badge")} == {"inverted", "rewritten", "semantic"}
    page.keys("j")
    page.keys("e")
    assert {"coarse", "fine", "item"} <= {*page.texts(".card:nth-child(1) .why th")}
    # What the page says about the user reaches the models.
    page.one("#feature-gender").send_keys("f", Keys.ENTER)
    page.settle()
    page.one("#feature-age").send_keys("31", Keys.ENTER)
    page.settle()
    page.one("#past").send_keys("red hats", Keys.TAB)
    page.settle()
    page.all(".card:nth-child(1) .acts button")[1].click()
    page.wait(lambda: "clicked=" in page.driver.current_url)
    page.settle()
    asked = models.requests["search"][-1]
    assert asked["user_gender"].tolist() == [b"f"] and asked["user_age"].tolist() == [31]
    assert asked["past_queries"].tolist() == [[b"red hats"]]
    assert len(asked["clicked_items"][0]) == 1 and asked["clicked_items"][0][0] >= FIRST_ID
    page.one(".terms button").click()  # searches for the rewrite
    page.wait(lambda: page.driver.title == "red boots · DPSR")
    page.settle()


def test_a_user_to_search_as(page: Page) -> None:
    page.open("/?q=red&a=words")
    page.settle()
    page.one("#user-id").send_keys("17", Keys.ENTER)
    page.settle()
    page.keys("j")
    page.one(".card .acts button:nth-of-type(2)").click()
    page.settle()
    assert len(page.all("#clicked .chip")) == 1 and "user=17" in page.driver.current_url
    page.one("#anonymous").click()
    page.settle()
    assert not page.all("#clicked .chip") and page.one("#user-id").get_attribute("value") == ""


def test_stages_that_are_left_out_are_named(page: Page) -> None:
    page.open("/?q=red&a=limping")
    page.settle()
    assert page.texts(".pane-top .chip") == ["without recall.semantic"]
    assert "left out: " in page.texts(".funnel tr.out")[0] and len(page.titles()) == 20


def test_errors_are_shown(page: Page) -> None:
    page.open("/?q=red&a=broken")
    page.settle()
    assert "no source of recall answered" in page.one(".notice.error").text
    (complaint,) = page.complaints()
    assert "503" in complaint
    page.one(".pane select").send_keys("words")
    page.settle()
    page.wait(lambda: len(page.titles()) == 20)


def test_a_phone(page: Page) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open("/?q=red+shoes&a=words&b=ruled")
        page.settle()
        width = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert width == 390, "the page scrolls sideways"
        assert not page.one("#facets").is_displayed()
        page.one("#side > summary").click()
        assert page.one("#facets").is_displayed()
        small = page.driver.execute_script(
            "return [...document.querySelectorAll('header button, .pane select, .acts button')]"
            ".filter(element => element.getBoundingClientRect().height < 28).length"
        )
        assert small == 0, "buttons are too small for fingers"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    page.open("/?q=red+shoes&a=words&b=ruled&judge=")
    page.settle()
    nameless = page.driver.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter(element => !("
        "element.getAttribute('aria-label') || element.labels?.length || element.textContent.trim()))"
        ".map(element => element.outerHTML)"
    )
    assert nameless == []


# Without a browser.


def fetch(url: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/page.json"])
def test_headers_of_the_page(address: str, path: str) -> None:
    status, headers, _ = fetch(address + path)
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy and headers["X-Content-Type-Options"] == "nosniff"
    if path != "/page.json":
        assert fetch(address + path, **{"If-None-Match": headers["ETag"]})[0] == 304


@pytest.mark.parametrize("path", ["/v1/search", "/v1/judgments"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ],
)
def test_other_origins_are_refused(address: str, shop: Path, path: str, headers: dict[str, str]) -> None:
    before = (shop / "judgments.tsv").read_bytes() if (shop / "judgments.tsv").exists() else b""
    body = {"query": "evil", "item": FIRST_ID, "grade": 3} if "judgments" in path else {"query": "red"}
    status, _, answer = fetch(address + path, body, **headers)
    assert status == 403 and "error" in json.loads(answer)
    assert before == ((shop / "judgments.tsv").read_bytes() if (shop / "judgments.tsv").exists() else b"")


def test_clients_without_a_browser_are_not_refused(address: str) -> None:
    assert fetch(f"{address}/v1/search", {"query": "red"})[0] == 200
    assert fetch(f"{address}/v1/search", {"query": "red"}, Origin=address)[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "expected an object with query, item and grade"),
        ({"query": "q", "item": FIRST_ID}, "expected an object with query, item and grade"),
        ({"query": 3, "item": FIRST_ID, "grade": 1}, "query: expected a text"),
        ({"query": "q", "item": 7, "grade": 1}, "item: the index has no item '7'"),
        ({"query": "q", "item": "seven", "grade": 1}, "item: the index has no item 'seven'"),
        ({"query": "q", "item": [1], "grade": 1}, "item: expected an id"),
        ({"query": "q", "item": FIRST_ID, "grade": "3"}, "grade: expected a number"),
        ({"query": "q", "item": FIRST_ID, "grade": True}, "grade: expected a number"),
        ({"query": "q", "item": FIRST_ID, "grade": 9}, "grade: got 9, expected 0 to 3"),
        ({"query": " ", "item": FIRST_ID, "grade": 1}, "query: has 0 characters"),
    ],
)
def test_wrong_judgments_are_refused(address: str, body: Any, words: str) -> None:
    status, _, answer = fetch(f"{address}/v1/judgments", body)
    assert status == 400 and words in json.loads(answer)["error"]


def test_a_judgment_without_the_page(address: str) -> None:
    body = {"query": "blue  shoes", "item": str(FIRST_ID), "grade": 2}
    status, _, answer = fetch(f"{address}/v1/judgments", body)
    assert status == 200 and json.loads(answer)["item"] == str(FIRST_ID)
    saved = json.loads(fetch(f"{address}/v1/judgments?query=blue%20shoes")[2])
    assert saved["grades"] == {str(FIRST_ID): 2}
    assert json.loads(fetch(f"{address}/v1/judgments", {**body, "grade": None})[2])["grade"] is None
    assert json.loads(fetch(f"{address}/v1/judgments?query=blue%20shoes")[2])["grades"] == {}


def test_dpsr_evaluate_asks_a_pipeline(address: str, shop: Path, dpsr: Callable[..., Any]) -> None:
    """The judgments that the page saves measure the pipelines that it shows."""
    file = JudgmentFile(shop / "by_hand.tsv")
    for row, grade in ((39, 3), (30, 0), (7, 0)):
        file.judge("red shoes", str(FIRST_ID + row), grade)
    host = address.removeprefix("http://")
    flags = ["evaluate", f"--judgments={file.path}", f"--store={shop / 'store'}"]
    result = dpsr(*flags, *(f"--system=search:{host}/{name}" for name in ("ruled", "words")))
    recall_at_10 = re.findall(r"^search:\S+/(\w+) +(\d\.\d+)", result.out, re.MULTILINE)[:2]
    assert recall_at_10 == [("ruled", "1.000"), ("words", "0.000")], (result.out, result.errors)
    dpsr(*flags, f"--system=search:{host}/none").fails(1, "has no pipeline 'none', expected one of ruled, words")
    dpsr(*flags, f"--system=search:{host}").fails(2, "expected search:HOST:PORT/PIPELINE")
    dpsr(*flags, f"--system=search:127.0.0.1:{free_port()}/x").fails(1, "the gateway does not answer")


def test_a_pipeline_as_retriever(address: str) -> None:
    retriever = search_system(None, f"{address}/words")
    ids, scores = retriever(["red", "nothing of this"], None, 150)
    assert ids.shape == scores.shape == (2, 150)
    assert sorted(ids[0, :40].tolist()) == list(range(FIRST_ID, FIRST_ID + 40)) and (ids[0, 40:] == -1).all()
    assert (ids[1] == -1).all() and scores[0, :2].tolist() == [-1, -2] and np.isneginf(scores[1]).all()
    assert retriever(["red"], None, 3)[0].tolist() == [ids[0, :3].tolist()]
    with pytest.raises(CommandError, match="'red' was answered without recall"):
        search_system(None, f"{address}/limping")(["red"], None, 3)
    with pytest.raises(CommandError, match="query: has 1001 characters"):
        retriever(["q" * 1001], None, 1)
