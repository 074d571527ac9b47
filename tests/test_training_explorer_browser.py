"""The page of ``fastvae explore`` in Chromium, as a user sees it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

for package in ("lightning", "gradio", "selenium"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[dev]")

from PIL import Image  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests._explorer import serving, train_vae  # noqa: E402

# It starts a browser, which a machine without Debian's chromium-driver does not have.
pytestmark = pytest.mark.prove

LOADED = "return performance.getEntriesByType('resource').map(entry => entry.name)"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(train_vae(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("served")) as (address, _):
        yield address


@pytest.fixture
def browser(address):
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is not installed: apt-get install chromium chromium-driver"
    options = ChromeOptions()
    # The sandbox of Chromium takes no superuser, who runs the tests in a container.
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, ChromeService(driver)) as browser:
        browser.get(address)
        yield browser
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        elsewhere = [name for name in browser.execute_script(LOADED) if not name.startswith((address, "blob:", "data:"))]
        assert elsewhere == []


def visible(browser, selector: str):
    """The first element that is shown, once there is one."""

    def find(browser):
        return next((element for element in browser.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()), None)

    return WebDriverWait(browser, 60).until(find, f"no {selector} is shown")


def open_tab(browser, name: str) -> None:
    def find(browser):
        return next((tab for tab in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text == name), None)

    WebDriverWait(browser, 60).until(find, f"no tab {name} is shown").click()


def address_of(browser, image: str) -> str:
    """Where the image of an element is loaded from; an image that is replaced while this looks for it is looked for again."""
    wait = WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda browser: visible(browser, f"#{image} img").get_attribute("src"))


def changed(browser, image: str, before: str) -> str:
    """Where the image of an element is loaded from, once that is elsewhere."""
    message = f"the image of {image} did not change"
    return WebDriverWait(browser, 60).until(lambda browser: (now := address_of(browser, image)) != before and now, message)


def picture(directory: Path) -> Path:
    """A bright disc on black."""
    rows, columns = np.mgrid[:60, :60] - 30
    path = directory / "disc.png"
    Image.fromarray(np.where(rows**2 + columns**2 < 400, 250, 0).astype(np.uint8)).save(path)
    return path


def test_a_slider_moves_the_image(browser):
    before = address_of(browser, "decoded")
    slider = visible(browser, "input[type=range]")
    value = slider.get_attribute("value")
    slider.send_keys(Keys.ARROW_RIGHT * 20)
    assert slider.get_attribute("value") != value
    changed(browser, "decoded", before)


def test_an_upload_is_reconstructed_and_moves_the_sliders(browser, tmp_path):
    before = address_of(browser, "decoded")
    open_tab(browser, "Reconstruction")
    browser.find_element(By.CSS_SELECTOR, "#upload input[type=file]").send_keys(str(picture(tmp_path)))
    address_of(browser, "taken")
    address_of(browser, "reconstruction")
    visible(browser, "#to-sliders:not([disabled])").click()
    open_tab(browser, "Latent dimensions")
    changed(browser, "decoded", before)


def test_a_bad_upload_is_a_message(browser, tmp_path):
    open_tab(browser, "Reconstruction")
    (tmp_path / "text.png").write_text("no image")
    browser.find_element(By.CSS_SELECTOR, "#upload input[type=file]").send_keys(str(tmp_path / "text.png"))
    assert "image: cannot be read, takes a file of PNG" in visible(browser, ".toast-body").text


def test_samples_and_interpolations_are_drawn(browser):
    open_tab(browser, "Samples")
    address_of(browser, "samples")
    open_tab(browser, "Interpolation")
    visible(browser, "#interpolate").click()
    address_of(browser, "path")


def test_a_click_on_the_map_decodes_its_point(browser):
    """The lower left quarter: the middle of it is a quarter of the way along dimension 0, and along dimension 1."""
    open_tab(browser, "Map")
    address_of(browser, "map")
    overview = visible(browser, "#map img")
    ActionChains(browser).move_to_element_with_offset(
        overview, -overview.size["width"] // 4, overview.size["height"] // 4
    ).click().perform()
    text = WebDriverWait(browser, 60).until(lambda browser: "z = (" in (shown := visible(browser, "#place").text) and shown)
    chosen = [float(number) for number in re.findall(r"-?\d+\.\d+", text)]
    sliders = [browser.find_element(By.CSS_SELECTOR, f"#dimension-{dimension} input[type=range]") for dimension in (0, 1)]
    for value, slider in zip(chosen, sliders, strict=True):
        low, high = (float(slider.get_attribute(end)) for end in ("min", "max"))
        assert (value - low) / (high - low) == pytest.approx(0.25, abs=0.03)
    address_of(browser, "point")
