"""The book and the lectures: built without a warning, whole, without a network; what is dragged is what torch says."""

import base64
import itertools
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from conftest import REPOSITORY, in_a_browser
from test_solutions import CODE, run

from faithkd import experiment, params, watch

BOOK = REPOSITORY / "book"
DATA = json.loads(watch.DATA.read_text(encoding="utf-8"))
INERT = {"canonical", "search", "next", "prev", "index", "genindex"}  # links that a page has and does not load
SHEETS = sorted((BOOK / "sheets").glob("*.md"))
LECTURES = sorted((BOOK / "slides").glob("*.md"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The book, built anew with warnings as errors."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", BOOK, "-d", folder / "trees"]
    done = subprocess.run([*command, REPOSITORY, folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def lectures(tmp_path_factory) -> Path:
    """The slides, built anew."""
    folder = tmp_path_factory.mktemp("slides")
    subprocess.run([sys.executable, BOOK / "slides.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def parts():
    """book/parts.py, imported as the scripts there import each other."""
    sys.path.insert(0, str(BOOK))
    try:
        yield import_module("parts")
    finally:
        sys.path.remove(str(BOOK))


def broken(folder: Path) -> list[str]:
    """Links and pictures of the pages in a folder that lead nowhere, and whatever is loaded from a network."""
    files = [file for file in folder.rglob("*.html") if "_static" not in file.parts]  # there lie the theme's templates
    pages = {file: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in files}
    anchors = {
        file: {tag.get(name) for tag in page.select("[id], [name]") for name in ("id", "name")}
        for file, page in pages.items()
    }
    wrong = []
    for file, page in pages.items():
        where, loads = file.relative_to(folder), [tag["src"] for tag in page.select("[src]")]
        loads += [tag["href"] for tag in page.select("link[href]") if not {*tag.get("rel", [])} & INERT]
        wrong += [f"{where} loads {one}" for one in loads if re.match(r"(\w+:)?//", one)]
        for link in [*(tag["href"] for tag in page.select("a[href]")), *loads]:
            if re.match(r"\w+:|//", link):
                continue
            address, anchor = urldefrag(unquote(link))
            target = (file.parent / address.partition("?")[0]).resolve() if address else file
            if not target.is_file() or anchor and target in pages and anchor not in anchors[target]:
                wrong.append(f"{where} → {link}")
    return wrong


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "one.html").write_text('<a href="two.html#there">x</a><a href="#here">y</a><p id="here">')
    (tmp_path / "two.html").write_text('<p id="there"><a href="three.html">z</a><img src="https://a.b/c.png">')
    assert sorted(broken(tmp_path)) == ["two.html loads https://a.b/c.png", "two.html → three.html"]


@pytest.mark.slow
def test_the_book_is_whole_and_asks_no_network(built):
    assert len(list((built / "notebooks").glob("*.html"))) == len(list((REPOSITORY / "notebooks").glob("*.ipynb")))
    assert broken(built) == []
    for sheet in built.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_solutions_and_drawing_code_are_folded(built):
    pages = {file.stem: file.read_text(encoding="utf-8") for file in (built / "notebooks").glob("*.html")}
    for stem, page in pages.items():
        cells = json.loads((REPOSITORY / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
        folded = [
            c for c in cells if c["cell_type"] == "code" and c["metadata"].get("jupyter", {}).get("source_hidden")
        ]
        assert page.count('<details class="admonition hide') >= len(folded)
        assert page.count("<summary>Solution") == sum("".join(c["source"]).count("<summary>Solution") for c in cells)
        assert "launch-lab-button" in page and "download-source-button" in page


@pytest.mark.slow
def test_lectures_last_ninety_minutes_and_ask_no_network(lectures):
    assert len(LECTURES) == 3
    for file in LECTURES:
        page = (lectures / f"{file.stem}.html").read_text(encoding="utf-8")
        minutes = [int(found) for found in re.findall(r'<section data-minutes="(\d+)"', page)]
        assert sum(minutes) == 90 and min(minutes) >= 1 and max(minutes) <= 15
        assert page.count("<aside><p>") == len(minutes)  # every slide says what to say
    assert broken(lectures) == []


@pytest.mark.parametrize("file", SHEETS, ids=lambda file: file.stem)
def test_sheets_have_twenty_marks_and_their_solutions_run(file):
    text = file.read_text(encoding="utf-8")
    marks = [int(found) for found in re.findall(r"^## .*\((\d+) marks\)$", text, re.MULTILINE)]
    assert sum(marks) == 20 and text.count("<summary>Solution and marks") == len(marks)
    for solution in re.findall(r"<details>.*?</details>", text, re.DOTALL):
        code = "\n".join(CODE.findall(solution))
        assert not code or bool(run(code, {})) is True


# --- what is dragged and watched


def test_what_is_dragged_is_small_and_comes_from_the_committed_networks():
    assert watch.DATA.stat().st_size < 300_000
    p = params.load("digits")
    for name in ("SD", "FD"):
        layers = [layer for layer in experiment.student(p, name) if isinstance(layer, torch.nn.Linear)]
        for layer, written in zip(layers, DATA["digits"]["networks"][name], strict=True):
            weight = np.frombuffer(base64.b64decode(written["weight"]), "<f4")
            assert np.array_equal(weight, layer.weight.detach().numpy().ravel())


def test_brackets_hold():
    for student in DATA["epsilon"]["students"].values():
        lower, upper = np.array(student["lower"]), {rung: np.array(v) for rung, v in student["upper"].items()}
        assert all((lower <= values + 1e-9).all() for values in upper.values())
        for looser, tighter in itertools.pairwise(("interval", "crown", "alpha-crown", "joint", "bab")):
            assert (upper[tighter] <= upper[looser] + 1e-9).all()


def test_the_parts_of_the_square_are_bounded(parts):
    nets = parts.drawn("RT"), parts.drawn("SD")
    fresh, kept = parts.search(), DATA["parts"]
    assert fresh["steps"] == kept["steps"]
    assert np.allclose(fresh["bounds"], kept["bounds"], atol=2e-4)
    ticks = torch.linspace(-1, 1, 201, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    apart = parts.difference(nets, points)
    assert kept["lowers"][-1] <= float(apart.max()) + 1e-3
    covered = torch.zeros(len(points), dtype=torch.bool)
    cut = {step["cut"] for step in kept["steps"]}
    for number, corners in enumerate(kept["polygons"]):
        corners = torch.tensor(corners, dtype=torch.float64)
        edges = corners.roll(-1, 0) - corners
        away = points[:, None] - corners
        inside = (edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0] >= -1e-3).all(1)
        # corners are written with four digits, and the difference has slope below 2
        assert float(apart[inside].amax() if inside.any() else 0) <= kept["bounds"][number] + 5e-3
        if number not in cut:
            covered |= inside
    assert covered.all()
    top = [max(kept["bounds"][k] for k in open_) for open_ in leaves(kept["steps"])]
    assert all(later <= earlier for earlier, later in zip(top, top[1:], strict=False))
    assert top[-1] < top[0] / 3 and kept["lowers"][-1] <= top[-1]


def leaves(steps):
    """The parts that are open after each cut."""
    open_ = {0}
    yield set(open_)
    for number, step in enumerate(steps):
        open_ = open_ - {step["cut"]} | {2 * number + 1, 2 * number + 2}
        yield set(open_)


# --- in a browser


@pytest.fixture
def page(chromium):
    """A phone, dark, offline; `asked` has what the page wanted from elsewhere, `errors` what went wrong in it."""
    context = chromium.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark", offline=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.asked, page.errors = [], []
    page.on("request", lambda request: request.url.startswith("http") and page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()


WAITS = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const images = [...document.images];
    images.forEach((image) => (image.loading = "eager"));
    await Promise.all(images.map((image) => image.decode().catch(() => null)));
    return images.filter((image) => !image.naturalWidth).map((image) => image.src.slice(0, 200));
}"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@in_a_browser
def test_every_page_in_a_browser(built, page):
    files = sorted(
        file for folder in ("", "book", "book/sheets", "notebooks") for file in (built / folder).glob("*.html")
    )
    assert len(files) > 20
    for file in files:
        if file == built / "index.html":
            continue  # it only leads to book/index.html
        page.set_viewport_size({"width": 390, "height": 800})
        page.emulate_media(color_scheme="dark")
        page.goto(file.as_uri())
        assert page.evaluate(WAITS) == [], file.name
        assert page.evaluate("document.documentElement.dataset.theme") == "dark", file.name
        assert page.evaluate(TOO_WIDE) <= 0, file.name
        assert not page.locator("mjx-merror").count(), file.name
        page.set_viewport_size({"width": 1280, "height": 900})
        page.emulate_media(color_scheme="light")
        assert page.evaluate(TOO_WIDE) <= 0, file.name
    assert page.asked == [] and page.errors == []


@in_a_browser
def test_the_book_is_searched(built, page):
    page.goto(f"{(built / 'search.html').as_uri()}?q=EmpLB")
    page.locator("#search-results li a").first.wait_for()
    assert page.locator("#search-results li a[href*='08-']").count()


@in_a_browser
def test_everything_can_be_dragged_and_watched(built, page):
    page.set_viewport_size({"width": 1000, "height": 900})
    page.goto((built / "book/watch.html").as_uri())
    assert page.locator(".watch").count() == 5
    _says_what_torch_says(page)
    figure1 = page.locator("[data-watch=figure1]")
    before = figure1.locator("p[aria-live]").inner_text()
    area = figure1.locator(".area").first
    area.scroll_into_view_if_needed()
    area.click(position={"x": 200, "y": 60})
    dragged = figure1.locator("p[aria-live]").inner_text()
    page.keyboard.press("ArrowLeft")
    assert len({before, dragged, figure1.locator("p[aria-live]").inner_text()}) == 3
    epsilon = page.locator("[data-watch=epsilon]")
    epsilon.locator("input").fill("6")
    assert "ε = 0.3" in epsilon.locator("p[aria-live]").inner_text()
    epsilon.scroll_into_view_if_needed()
    played = re.compile(r"^step ([3-9]|\d\d) |^([4-9]|\d\d) parts")  # on a slow machine it may be past the third
    for name, count, last in (
        ("attacks", 10, "step 10 of 10"),
        ("ascent", 20, "step 20 of 20"),
        ("parts", 30, "31 parts"),
    ):
        root = page.locator(f"[data-watch={name}]")
        root.scroll_into_view_if_needed()
        for _ in range(count):
            root.get_by_role("button", name="Step").click()
        assert last in root.locator("[aria-live]").inner_text()
        root.get_by_role("button", name="Start again").click()
        assert last not in root.locator("[aria-live]").inner_text()
        root.get_by_role("button", name="Play").click()
        root.locator("[aria-live]", has_text=played).wait_for()
    assert page.asked == [] and page.errors == []


def _says_what_torch_says(page) -> None:
    """The page's networks and gradients, against the committed ones by autograd."""
    p = params.load("digits")
    for name, network in (("RT", experiment.teacher(p)), ("FD", experiment.student(p, "FD"))):
        x = torch.linspace(-0.8, 2, 64).view(1, 1, 8, 8).requires_grad_(True)
        logits = network(x)
        (slope,) = torch.autograd.grad(logits[0, 3], x)
        script = """([written, x]) => {
            const net = faithkdWatch.network(written);
            return [net.logits(x), net.pull(x, Array.from({ length: 10 }, (_, c) => Number(c === 3)))];
        }"""
        theirs = page.evaluate(script, [DATA["digits"]["networks"][name], x.detach().flatten().tolist()])
        assert np.allclose(theirs[0], logits.detach().numpy()[0], atol=1e-4)
        assert np.allclose(theirs[1], slope.flatten().numpy(), atol=1e-4)


@in_a_browser
@pytest.mark.parametrize("file", LECTURES, ids=lambda file: file.stem)
def test_a_lecture_is_given_in_a_browser(lectures, page, file):
    page.set_viewport_size({"width": 1280, "height": 720})
    page.emulate_media(color_scheme="light")
    page.goto((lectures / f"{file.stem}.html").as_uri())
    assert page.evaluate(WAITS) == []
    count = page.locator("section").count()
    for number in range(1, count + 1):
        assert page.locator("section.shown").count() == 1 and page.url.endswith(f"#{number}")
        assert page.evaluate(TOO_WIDE) <= 0, f"slide {number}"
        page.keyboard.press("ArrowRight")
    assert not page.locator("mjx-merror").count()
    assert not page.locator("section.shown aside").is_visible()
    page.keyboard.press("n")
    assert page.locator("section.shown aside").is_visible()
    assert page.asked == [] and page.errors == []
