"""Tests of the running Space: its API, and its page in Chromium."""

import csv
import importlib.util
import io
import json
import shutil
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest
import torch

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "examples/images"
SCRIPT = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>"

missing = [name for name in ("gradio", "gradio_client", "playwright") if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"Not installed: {', '.join(missing)}.", allow_module_level=True)

from gradio_client import handle_file  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

sys.path.insert(0, str(ROOT / "benchmarks"))
from space_load import (  # noqa: E402
    attack,
    megabytes,
    mixed_requests,
    patient_client,
    run_round,
    running_space,
    send,
    stop,
)

WAIT_SECONDS = 60
expect.set_options(timeout=1000 * WAIT_SECONDS)


@pytest.fixture(scope="module")
def space():
    with running_space(OMP_NUM_THREADS="1") as running:
        yield running


@pytest.fixture(scope="module")
def address(space):
    return space[0]


@pytest.fixture(scope="module")
def client(address):
    return patient_client(address)


@pytest.fixture(scope="module")
def direct():
    """Tags a file with the model itself, without the Space."""
    folder = ROOT / "checkpoints/optsg-icon-small"
    processor = OPTSGProcessor.from_pretrained(folder)
    model = OPTSGForTagGeneration.from_pretrained(folder)

    def tags(path, title=None, **settings):
        kind = "videos" if path.suffix == ".mp4" else "images"
        with torch.no_grad():
            # The page shows what every slot generates, so its search is exact.
            outputs = model.generate(**processor(**{kind: [path]}, titles=[title]), output_slots=True, **settings)
        return {tag["tag"]: tag["score"] for tag in processor.batch_decode(outputs)[0]}

    return tags


def png_header(width, height):
    """A PNG whose header promises pixels that it does not hold."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 100)
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("name, title", [("bus.png", "bus"), ("ship-wheel.mp4", "ship wheel")])
def test_the_api_returns_the_tags_of_the_model(client, direct, name, title):
    path = IMAGES / name
    for decoding in ("parallel", "sequential"):
        answer = client.predict(handle_file(path), title=title, decoding=decoding, api_name="/tag")
        expected = direct(path, title, decoding=decoding)
        assert {row["tag"]: row["score"] for row in answer["tags"]} == pytest.approx(expected, abs=2e-3) and expected
        assert {row["mark"] for row in answer["tags"]} <= {"common", "rare", "novel"}
        assert len(answer["slots"]) == 20


def test_many_files_are_returned_as_csv(client, direct):
    files = [IMAGES / "tent-tree.png", IMAGES / "tea-bag.png"]
    answer = client.predict([handle_file(path) for path in files], threshold=0.2, api_name="/tag_many")
    rows = list(csv.DictReader(io.StringIO(answer["csv"].lstrip("\ufeff"))))
    for path in files:
        expected = direct(path, path.stem.replace("-", " "), threshold=0.2)
        assert {row["tag"] for row in rows if row["file"] == path.name} == set(expected) and expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.jpg", b"not an image", "neither an image nor a video"),
        ("bomb.png", png_header(60_000, 60_000), "million pixels"),
        ("empty.png", b"", "empty|neither"),
    ],
)
def test_the_api_refuses_unreadable_files_with_a_message(client, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=message) as error:
        client.predict(handle_file(tmp_path / name), api_name="/tag")
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "file", [{"path": "/etc/passwd"}, {"path": str(IMAGES / "bus.png")}, {"path": "http://127.0.0.1:9/x.png"}]
)
def test_the_api_reads_only_uploaded_files(address, file):
    data = {"data": [file | {"meta": {"_type": "gradio.FileData"}}, "", "parallel", 0.1, False]}
    request = urllib.request.Request(
        f"{address}gradio_api/call/tag", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 403 and "was not uploaded to this Space" in refused.value.read().decode()
    for name in ("/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/x"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={name}", timeout=20)
        assert refused.value.code in (403, 404)


def test_concurrent_requests_are_answered_like_single_ones(space, tmp_path):
    address, process = space
    clients = [patient_client(address) for _ in range(12)]
    requests = mixed_requests(tmp_path, len(clients))
    alone = [send(clients[0], request) for request in requests]
    found = run_round(requests, alone, clients, process)
    assert found["same_as_alone"] == len(requests) and found["tagged"] == 10


@pytest.mark.parametrize("name", ["both headers, JSON", "both headers, upload", "chunks without end", "two lengths"])
def test_requests_without_end_do_not_fill_the_memory(space, client, name):
    address, process = space
    before = megabytes(process)
    found = attack(address, name)
    assert found["status"] in (400, 411, None) and found["seconds"] < WAIT_SECONDS
    assert megabytes(process) < before + 30
    assert client.predict(handle_file(IMAGES / "bus.png"), title="bus", api_name="/tag")["tags"]


def test_sigterm_ends_the_space_while_it_answers(tmp_path):
    with running_space(OMP_NUM_THREADS="1", TMPDIR=str(tmp_path)) as (address, process):
        requests = mixed_requests(tmp_path, 2)
        assert stop([patient_client(address) for _ in requests], requests, process) < 10
        assert process.returncode == 0 and not list(tmp_path.glob("optsg-space-*"))


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian package: chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The loaded page. It must load nothing from other hosts and raise no errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(1000 * WAIT_SECONDS)
    page = context.new_page()
    urls, errors = [], []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(page.locator("#predict")).to_be_visible()
    yield page
    context.close()
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def drop(page, path, where="#file"):
    page.locator(f"{where} input[type=file]").first.set_input_files(path)


def names(page):
    return page.locator("#tags .name").all_inner_texts()


def test_the_page_tags_an_image_and_applies_the_threshold(page, direct):
    page.get_by_label("Title").first.fill("swimming pool")
    drop(page, IMAGES / "swimming-pool.png")
    expect(page.locator("#tags .name").first).to_be_visible()
    expected = direct(IMAGES / "swimming-pool.png", "swimming pool")
    assert set(names(page)) == set(expected)
    assert page.locator("#tags li").first.inner_text().count("%") == 1
    marks = set(page.locator("#tags .count b").all_inner_texts())
    assert marks and marks <= {"common", "rare", "novel"}, "a mark needs a word, not only a colour"
    assert page.locator("#slots .slot").count() == 20 and page.locator("#slots .frame img").count() >= 1

    number = page.locator("input[type=number]").first
    number.fill("0.5")
    number.press("Enter")
    fewer = {tag for tag, score in expected.items() if score >= 0.5}
    assert 0 < len(fewer) < len(expected)
    expect(page.locator("#tags .name")).to_have_count(len(fewer))
    assert set(names(page)) == fewer

    number.fill("1")
    number.press("Enter")
    expect(page.locator("#tags .advice")).to_contain_text("Lower the threshold")
    expect(page.locator("#tags .advice")).to_contain_text("icons and simple drawings")
    assert names(page) == []


def test_the_page_says_which_images_the_model_knows(page):
    expect(page.locator("#scope")).to_contain_text("This model knows icons and simple drawings")


def test_the_page_shows_each_frame_of_a_video(page):
    drop(page, IMAGES / "ship-wheel.mp4")
    expect(page.locator("#preview video")).to_be_visible()
    expect(page.locator("#slots .slot").first.locator(".frame")).to_have_count(8)


def test_the_tags_of_many_files_are_downloaded_as_csv(page, direct):
    page.get_by_role("tab", name="Many files").click()
    drop(page, [IMAGES / "bus.png", IMAGES / "tea-bag.png"], "#files")
    link = page.get_by_role("link", name="Download tags.csv")
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"))))
    assert {row["tag"] for row in rows if row["file"] == "bus.png"} == set(direct(IMAGES / "bus.png", "bus"))


def test_the_page_shows_markup_in_a_title_as_text(page):
    page.get_by_label("Title").first.fill(SCRIPT)
    drop(page, IMAGES / "bus.png")
    expect(page.locator("#tags h3 small")).to_contain_text(SCRIPT)
    assert page.evaluate("window.hit") is None
    assert page.locator("#tags script, #slots script, #tags img").count() == 0


def test_the_page_shows_a_message_for_an_unreadable_file(page, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    drop(page, tmp_path / "notes.txt")
    expect(page.get_by_role("alert").first).to_contain_text("neither an image nor a video")


def test_the_page_fits_a_phone_and_has_a_dark_mode(page, browser, address):
    page.set_viewport_size({"width": 360, "height": 740})
    drop(page, IMAGES / "bus.png")
    expect(page.locator("#slots .slot").first).to_be_visible()
    width = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]")
    assert max(width[:2]) <= 360 and width[2] == 360
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    expect(page.locator("body.dark #predict")).to_be_visible()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light and brightness(dark) < 60 < brightness(light)
    assert brightness(page.evaluate("getComputedStyle(document.querySelector('#introduction p')).color")) > 150


def brightness(colour: str) -> float:
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3


def test_an_example_is_chosen_with_the_keyboard(page):
    focused = "document.activeElement"
    reached = []
    while "bus" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"({focused}.innerText ?? '').trim()"))
        assert len(reached) < 40, f"The keyboard reaches no example, only {reached}."
    page.keyboard.press("Enter")
    expect(page.locator("#tags .name").first).to_be_visible()
    outline = page.evaluate(f"getComputedStyle({focused}).outlineStyle + getComputedStyle({focused}).boxShadow")
    assert outline != "nonenone", "the focus must be visible"
