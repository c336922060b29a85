"""The lab notes' site in a real headless Chromium, opened from file://. Skips where there is no Chromium."""

import base64
import json
import os
import shutil
from contextlib import contextmanager

import pytest
import website_sample as sample

from persona_coupling import website

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@contextmanager
def chromium():
    """A headless Chromium that keeps its console and its requests; skips with the reason where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    for argument in ("--headless=new", "--disable-gpu", *(["--no-sandbox"] if root else [])):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with sample.site(tmp_path_factory.mktemp("study")) as built:
        yield built


@pytest.fixture(scope="module")
def browser(site):
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, site):
    """Opens a page of the site on a desk with light colours, nothing remembered."""

    def go(name, **media):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", media.pop("screen", DESK))
        scheme = {"name": "prefers-color-scheme", "value": media.pop("scheme", "light")}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme], **media})
        browser.get((site / "index.html").as_uri())
        browser.execute_script("localStorage.clear()")
        browser.get("about:blank")
        browser.get(site.as_uri() + "/" + name)
        return browser

    return go


def complaints(browser):
    """Console messages, and requests for anything but files and data."""
    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            said += [] if url.startswith(("file:", "data:", "about:", "chrome:")) else [url]
    return said


def elements(browser, selector):
    return browser.find_elements("css selector", selector)


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(condition)


def test_no_page_complains_or_asks_a_network(page, site, browser):
    complaints(browser)  # what came before
    names = sorted(path.name for path in site.glob("*.html"))
    assert len(names) == 5
    for name in [*names, "search.html?q=hippopotamuses"]:
        page(name)
        assert complaints(browser) == [], name


def test_a_complaint_and_a_request_would_be_seen(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<script>throw new Error("broken")</script><img src="http://127.0.0.1:9/pixel.png">')
    browser.get(bad.as_uri())
    found = " ".join(complaints(browser))
    assert "broken" in found
    assert "http://127.0.0.1:9/pixel.png" in found


def test_every_link_of_every_page_opens(page, site, browser):
    """Anchors included: the element is there, and links between pages are files that exist."""
    script = "return [...document.querySelectorAll('a[href]')].map(a => a.href)"
    targets = set()
    for name in sorted(path.name for path in site.glob("*.html")):
        page(name)
        targets |= set(browser.execute_script(script))
    anchored = sorted(target for target in targets if "#" in target and not target.endswith("#"))
    assert len(anchored) > 30
    for target in anchored:
        browser.get(target)
        assert browser.execute_script(
            "return document.getElementById(decodeURIComponent(location.hash.slice(1))) !== null"
        )
    for target in targets:
        assert os.path.isfile(target.removeprefix("file://").split("#")[0]), target


def test_search_finds_a_word_and_shows_where_it_stands(page, browser):
    page("index.html")
    field = elements(browser, "#find")[0]
    field.send_keys("hippopotamuses\n")
    wait(browser, lambda b: elements(b, "ul.search > li .excerpts mark"))
    found = {item.find_element("css selector", "a").text for item in elements(browser, "ul.search > li")}
    assert found == {"Replication: is it so, or not?", "Layers: is it so, or not?"}
    assert {mark.text for mark in elements(browser, "ul.search mark")} == {"hippopotamuses"}
    elements(browser, ".excerpts a")[0].click()
    assert "hippopotamuses" in elements(browser, "main")[0].text


def test_search_that_finds_nothing_says_so(page, browser):
    page("search.html?q=xylophone")
    wait(browser, lambda b: "did not match" in elements(b, "#search-results")[0].text)
    assert elements(browser, "ul.search > li") == []


def test_a_figure_enlarges_by_mouse_and_by_keyboard_and_escape_closes(page, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page("00_first.html")
    dialog, zoom = elements(browser, "dialog.enlarged")[0], elements(browser, "button.zoom")[0]
    assert not dialog.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", zoom)
    zoom.click()
    assert dialog.is_displayed()
    shown = dialog.find_element("css selector", "img")
    assert shown.get_attribute("alt") == "Rates, * of [two] arms_here."
    assert shown.size["width"] > zoom.size["width"]
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    browser.execute_script("arguments[0].focus()", zoom)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert dialog.is_displayed()
    dialog.find_element("css selector", ".close").click()
    assert not dialog.is_displayed()
    assert browser.switch_to.active_element == zoom


def test_code_is_folded_and_one_click_unfolds_one_or_all(page, browser):
    page("00_first.html")
    folds = elements(browser, "details.hide")
    opened = lambda: [fold.get_attribute("open") is not None for fold in folds]  # noqa: E731
    assert len(folds) == 5
    assert not any(opened())
    assert not elements(browser, ".highlight")[1].is_displayed()
    folds[1].find_element("css selector", "summary").click()
    assert opened() == [False, True, False, False, False]
    assert elements(browser, ".highlight")[1].is_displayed()
    button = elements(browser, ".unfold")[0]
    browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", button)
    button.click()
    assert all(opened())
    wait(browser, lambda b: button.text == "Hide all code")
    button.click()
    assert not any(opened())


def ground(browser):
    """Brightness of the page's ground, 0 to 255."""
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour.strip("rgb()").split(",")) / 3


def test_dark_follows_the_system_and_the_switch_is_remembered(page, browser):
    page("index.html", scheme="dark")
    assert ground(browser) < 60
    page("index.html")
    assert ground(browser) > 200
    elements(browser, ".scheme")[0].click()
    assert ground(browser) < 60
    elements(browser, ".cards a")[0].click()
    assert ground(browser) < 60
    elements(browser, ".scheme")[0].click()
    assert ground(browser) > 200


def test_a_phone_scrolls_no_page_sideways_but_wide_tables_inside(page, site, browser):
    for name in sorted(path.name for path in site.glob("*.html")):
        page(name, screen=PHONE)
        width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= 390, (name, width)
        assert width[1] == 390, (name, width)
    page("00_first.html", screen=PHONE)
    inner = "return [...document.querySelectorAll('.cell_output .output')].filter(o => o.scrollWidth > o.clientWidth)"
    wide = browser.execute_script(inner)
    assert len(wide) == 1
    assert wide[0].get_attribute("tabindex") == "0"
    assert browser.execute_script("arguments[0].scrollLeft = 50; return arguments[0].scrollLeft", wide[0]) == 50


def test_a_page_that_is_too_wide_would_be_seen(browser, tmp_path):
    wide = tmp_path / "wide.html"
    wide.write_text('<meta name="viewport" content="width=device-width"><div style="width:900px">x</div>')
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    browser.get(wide.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") >= 900


def test_print_hides_what_is_only_for_a_screen(page, browser):
    page("00_first.html", scheme="dark", media="print")
    for selector in (".bar", ".rail", ".turn", ".unfold", "details.hide"):
        assert elements(browser, selector), selector
        assert not any(element.is_displayed() for element in elements(browser, selector)), selector
    assert all(element.is_displayed() for element in elements(browser, "main h2, .claim, .cell_output img"))
    assert ground(browser) == 255
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")


def test_previous_and_next_lead_through_the_pages_and_back(page, browser):
    page("00_first.html")
    names = []
    while following := elements(browser, "a[rel=next]"):
        browser.get(following[0].get_attribute("href"))
        names.append(browser.current_url.rsplit("/", 1)[1])
    assert names == ["01_second.html", "data.html"]
    for _ in range(3):
        browser.get(elements(browser, "a[rel=prev]")[0].get_attribute("href"))
    assert browser.current_url.endswith("index.html")


def test_the_stamp_stands_on_every_page_of_a_run_that_is_no_evidence(browser, tmp_path, monkeypatch):
    root = sample.write(tmp_path / "smoke", profile="smoke", stamp="smoke: not evidence")
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(root))
    website.build("smoke", root / "site")
    for path in sorted((root / "site").glob("*.html")):
        browser.get(path.as_uri())
        (stamp,) = elements(browser, ".stamp")
        assert "not evidence" in stamp.text.lower(), path.name


def test_pages_of_evidence_carry_no_stamp(page, browser):
    page("index.html")
    assert elements(browser, ".stamp") == []
