"""The page in `space/browser`: the same tags as in Python, in Chromium."""

import functools
import importlib.util
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tokenizers import Tokenizer

from dataset_scripts import load_tagging_dataset

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "space/browser"
IMAGES = ROOT / "examples/images"
TEXTS = [
    "Tent-tree!",
    "e-mail 电子邮件",
    "naïve\tÉTÉ  x",
    "a\u200bb [SEP] \u2028c\u00a0d",
    "\U0001d518nicode 12,5%",
    "x" * 120,
    "İstanbul ΟΔΟΣ",
    "~^`|$",
    # Not assigned, as emoji that are newer than the browser.
    "a\u0378b \ue000c",
]
WAIT_SECONDS = 120
missing = [name for name in ("onnxruntime", "playwright") if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"Not installed: {', '.join(missing)}.", allow_module_level=True)
if shutil.which("npm") is None or shutil.which("chromium") is None:
    pytest.skip("npm or Chromium is not installed.", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402

from optsg.onnx import OnnxTagger  # noqa: E402

expect.set_options(timeout=1000 * WAIT_SECONDS)
pytestmark = pytest.mark.slow


def examples():
    """Bytes and titles of drawings and of ten test examples; some have no title, and the last has no image."""
    rows = load_tagging_dataset("icon_tagging")["test"].cast_column("image", datasets.Image(decode=False))
    rows = rows.select(range(0, 1500, 150))
    drawings = [(path.read_bytes(), path.stem.replace("-", " ")) for path in sorted(IMAGES.glob("*.png"))]
    found = [*drawings, *((row["image"]["bytes"], row["title"]) for row in rows)]
    found = [(image, title if index % 3 else "") for index, (image, title) in enumerate(found)]
    return [*found, (None, "Crème brûlée, 2 \N{DOG FACE}s")]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The folder of onnxruntime-web, in the version that the page names."""
    version = re.search(r"onnxruntime-web@([\d.]+)", (PAGE / "index.html").read_text(encoding="utf-8")).group(1)
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"onnxruntime-web@{version}"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("onnxruntime-web cannot be installed.")
    return folder / "node_modules/onnxruntime-web/dist"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(runtime, exported_checkpoint, tmp_path_factory):
    """The address of the page, with model and runtime beside it, on a server that only sends files."""
    site = tmp_path_factory.mktemp("site")
    links = {"model": exported_checkpoint, "runtime": runtime} | {path.name: path for path in PAGE.iterdir()}
    for name, target in links.items():
        (site / name).symlink_to(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def page(address):
    """The page with the loaded model. It must load nothing from other hosts and raise no errors."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 760, "height": 860})
        urls, errors = [], []
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}index.html?runtime=runtime")
        expect(page.locator("#status")).to_have_text("Ready")
        yield page
        browser.close()
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


TAG = """async ([bytes, title]) => {
  const { Tagger, readImage } = await import("./tagger.js"), ort = await import("./runtime/ort.wasm.min.mjs");
  window.tagger ??= await Tagger.load(new URL("model/", location.href), ort);
  const image = bytes && (await readImage(new Blob([new Uint8Array(bytes)])));
  return window.tagger.tag(image, title);
}"""


def test_the_browser_finds_the_tags_of_python(page, exported_checkpoint):
    tagger = OnnxTagger.from_pretrained(exported_checkpoint, threads=1)
    for image, title in examples():
        found = page.evaluate(TAG, [list(image) if image else None, title])
        expected = tagger({"image": image, "title": title})
        assert [(tag["label"], tag["novel"]) for tag in found] == [(tag["label"], tag["novel"]) for tag in expected]
        assert [tag["score"] for tag in found] == pytest.approx([tag["score"] for tag in expected], abs=1e-3)


def test_titles_are_tokenised_as_in_python(page, exported_checkpoint):
    tokenizer = Tokenizer.from_file(str(exported_checkpoint / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    encode = "texts => texts.map((text) => window.tagger.titles.encode(text))"
    page.evaluate(TAG, [None, "a"])
    assert page.evaluate(encode, [*TEXTS, "a " * 600]) == [tokenizer.encode(text).ids for text in [*TEXTS, "a " * 600]]


def test_a_chosen_image_is_tagged_and_errors_are_shown(page):
    page.locator("#file").set_input_files(IMAGES / "tent-tree.png")
    expect(page.locator("#preview")).to_be_visible()
    page.locator("#title").fill("tent tree")
    page.locator("#title").blur()
    expect(page.locator("#tags li").first).to_contain_text("tent0.89")
    expect(page.locator("#status")).to_contain_text("tags in")
    page.locator("#file").set_input_files(ROOT / "LICENSE")
    expect(page.locator("#error")).to_have_text("LICENSE is not an image that this browser reads.")


def test_an_image_that_the_browser_cannot_draw_is_an_error(page, tmp_path):
    Image.new("RGB", (70_000, 4), "red").save(tmp_path / "wide.png")
    page.locator("#file").set_input_files(tmp_path / "wide.png")
    expect(page.locator("#error")).to_have_text("wide.png is not an image that this browser reads.")


def test_the_tags_of_a_deleted_title_disappear(page, address):
    other = page.context.browser.new_page()
    other.goto(f"{address}index.html?runtime=runtime")
    for title, number in (("tent tree", 1), (" ", 0)):
        other.locator("#title").fill(title)
        other.locator("#title").blur()
        expect(other.locator("#tags li").first).to_have_count(number)
    expect(other.locator("#status")).to_have_text("Ready")
    # Tags of an earlier title do not stay under an error either.
    other.locator("#title").fill("tent tree")
    other.locator("#title").blur()
    expect(other.locator("#tags li").first).to_be_visible()
    other.evaluate("() => { BigInt64Array.from = () => { throw new Error('no memory'); }; }")
    other.locator("#title").fill("bus")
    other.locator("#title").blur()
    expect(other.locator("#error")).to_have_text("no memory")
    expect(other.locator("#tags li")).to_have_count(0)
    other.close()


def test_no_programs_of_other_hosts_are_run(page, address):
    other, urls = page.context.browser.new_page(), []
    other.on("request", lambda request: urls.append(request.url))
    host = address.replace("127.0.0.1", "localhost")
    other.goto(f"{address}index.html?runtime={host}runtime")
    expect(other.locator("#error")).to_have_text("The runtime must be on the host of this page.")
    assert not [url for url in urls if url.startswith(host)]
    other.close()


def test_the_image_that_was_chosen_last_is_shown(page):
    page.evaluate("""() => {
        const read = createImageBitmap, create = URL.createObjectURL, revoke = URL.revokeObjectURL;
        let calls = 0;
        Object.assign(window, { shown: [], revoked: 0 });
        window.createImageBitmap = async (...args) => {
            if (++calls === 1) await new Promise((resolve) => setTimeout(resolve, 1000));
            return read(...args);
        };
        URL.createObjectURL = (file) => (window.shown.push(file.name), create(file));
        URL.revokeObjectURL = (url) => (window.revoked++, revoke(url));
    }""")
    for name in ("bus.png", "tent-tree.png"):
        page.locator("#file").set_input_files(IMAGES / name)
    page.wait_for_timeout(2000)
    assert page.evaluate("[shown, revoked]") == [["tent-tree.png"], 1]


def test_a_missing_model_is_an_error(page, address):
    other = page.context.browser.new_page()
    other.goto(f"{address}index.html?runtime=runtime&model=nothing")
    expect(other.locator("#error")).to_contain_text("settings.json of the model is missing")
    # The error stays when a title is given.
    other.locator("#title").fill("tent")
    other.locator("#title").blur()
    other.wait_for_timeout(200)
    expect(other.locator("#error")).to_be_visible()
    other.close()
