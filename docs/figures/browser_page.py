"""Takes the screenshot of the page in `space/browser` that docs/serving.md shows.

    python docs/figures/browser_page.py http://127.0.0.1:8000

The address is that of the page, served with a model as its README says. Needs playwright and Chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).parent
IMAGE, TITLE = HERE.parents[1] / "examples/images/tent-tree.png", "tent tree"


def main() -> None:
    """Tag an image on the page, and save what it shows."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 720, "height": 820}, color_scheme="light")
        page.goto(sys.argv[1])
        expect(page.locator("#status")).to_have_text("Ready", timeout=120_000)
        page.locator("#file").set_input_files(IMAGE)
        page.locator("#title").fill(TITLE)
        page.locator("#title").blur()
        expect(page.locator("#tags li").first).to_contain_text("tent0.89")
        page.screenshot(path=HERE / "browser_page.png")
        browser.close()


if __name__ == "__main__":
    main()
