"""The page that `hear-map` makes, in headless Chromium, with real recordings.

Needs the extra `test-map`, and Chromium: `apt-get install chromium`.
"""

from __future__ import annotations

import base64
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hear_encoders.cli import map as hear_map
from hear_encoders.cli.map import centered_directions, project

pytest.importorskip("plotly")
pytest.importorskip("sklearn")
playwright = pytest.importorskip("playwright.sync_api")

EXAMPLES = Path(__file__).parents[1] / "examples"
# Names that would do harm, or lead nowhere, if they were read as HTML, as JSON in HTML, as Plotly's text or as a URL.
HOSTILE = [
    "<img src=x onerror=window.harmed=1>.wav",
    "<script>window.harmed=1<",  # with the next "/", a closing tag
    "<!--<script>.wav",
    "<b>bold</b><a href='javascript:harmed=1'>.wav".replace("/", "\N{DIVISION SLASH}"),
    "%{x} $1 \\u003c &lt; 50% of #1?.wav",
    '" onmouseover="window.harmed=1" x=".wav',
    "line\nbreak\u2028.wav",
]
STEPS = 50


def write_sounds(folder: Path) -> list[Path]:
    """Copy the examples' recordings, under other names too, into two folders and one with hostile names."""
    sounds = []
    for name in ("speech.flac", "till.wav", "bell.mp3", "music.ogg"):
        for copy in ("one", "two"):
            sounds.append(folder / copy / f"{copy} {name}")
    sounds += [folder / "odd" / (f"{name}/script>.wav" if name.endswith("<") else name) for name in HOSTILE]
    for sound in sounds:
        sound.parent.mkdir(parents=True, exist_ok=True)
        source = sound.name.split()[-1] if sound.parent.name != "odd" else "till.wav"
        shutil.copy(EXAMPLES / source if (EXAMPLES / source).exists() else EXAMPLES / "till.wav", sound)
    return sorted(sounds, key=str)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with sounds, embeddings of two kinds, and pages of these."""
    folder = tmp_path_factory.mktemp("site")
    sounds = write_sounds(folder / "sounds of #1")
    paths = np.array([str(sound) for sound in sounds])
    random = np.random.default_rng(0)
    steps = random.normal(size=(len(sounds) * STEPS, 24)).astype(np.float32) + 2
    np.savez(folder / "scenes.npz", paths=paths, embeddings=steps.reshape(len(sounds), STEPS, -1).mean(axis=1))
    np.savez(
        folder / "steps.npz",
        paths=paths,
        offsets=np.arange(len(sounds) + 1) * STEPS,
        timestamps_ms=np.tile(40 * np.arange(STEPS, dtype=np.float32) + 15, len(sounds)),
        embeddings=steps,
    )
    (folder / "pages").mkdir()
    for name in ("scenes", "steps"):
        assert hear_map.main([str(folder / f"{name}.npz"), "-o", str(folder / "pages" / f"{name}.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Open a page without a network; at the end, check that it asked for no other and reported no error."""
    pages = []

    def load(path: Path, width: int = 1200, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.problems, page.requests = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#map .scatterlayer .point")
        pages.append(page)
        return page

    yield load
    for page in pages:
        assert page.problems == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
        assert page.evaluate("window.harmed") is None
        page.context.close()


def wait_until(page, expression: str, argument: object = None) -> None:
    """Wait until an expression is true. Playwright's own way needs `eval`, which the page forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, f"not true within a minute: {expression}"
        time.sleep(0.05)


def click_point(page, row: int) -> None:
    """Move the mouse to a sound's point, wait for its name, and click.

    The mouse leaves the point before, so that the name is not still that one's, and waits: a click within 0.3 s of the
    last one would be a double click.
    """
    page.locator("#title").hover()
    page.wait_for_selector("#map .hoverlayer .hovertext", state="detached")
    page.wait_for_timeout(400)
    folder, place = page.evaluate("row => [data.folder[row], rowsOfFolder[data.folder[row]].indexOf(row)]", row)
    box = page.locator("#map .scatterlayer .trace").nth(folder).locator(".point").nth(place).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.wait_for_selector("#map .hoverlayer .hovertext")
    page.mouse.click(x, y)
    wait_until(page, "row => chosen === row", row)


def wait_until_it_plays(page) -> None:
    wait_until(page, "audio.currentTime > 0.05 && !audio.paused && !audio.error")


def names_of(site: Path) -> list[str]:
    paths = np.load(site / "scenes.npz")["paths"]
    return [os.path.relpath(path, site / "sounds of #1") for path in paths]


def test_a_click_on_a_point_plays_its_file_and_lists_its_neighbors(site, open_page):
    page, names = open_page(site / "pages/scenes.html"), names_of(site)
    scenes = np.load(site / "scenes.npz")["embeddings"].astype(np.float64)
    centered = scenes - scenes.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    for row in (names.index("one/one speech.flac"), names.index("two/two bell.mp3")):
        click_point(page, row)
        wait_until_it_plays(page)
        assert page.locator("#name").inner_text().endswith(os.path.basename(names[row]))
        assert page.evaluate("audio.duration") == pytest.approx(
            {"flac": 5.3, "mp3": 4.5}[names[row].split(".")[-1]], abs=0.1
        )
        order = [other for other in np.argsort(-(centered @ centered[row])) if other != row][:10]
        links = page.locator("#neighbors a")
        assert [link.get_attribute("title") for link in links.all()] == [names[other] for other in order]
        shown = [float(text) for text in page.locator("#neighbors .bar").all_inner_texts()]
        np.testing.assert_allclose(shown, (centered @ centered[row])[order], atol=0.006)


def test_a_click_on_a_neighbor_leads_there_and_back_returns(site, open_page):
    page = open_page(site / "pages/scenes.html")
    click_point(page, 0)
    neighbor = page.locator("#neighbors a").nth(3)
    target = int(neighbor.get_attribute("href")[1:])
    neighbor.click()
    wait_until(page, "row => chosen === row", target)
    wait_until_it_plays(page)
    page.go_back()
    wait_until(page, "chosen === 0")


def test_search_and_folders_leave_what_matches(site, open_page):
    page, names = open_page(site / "pages/scenes.html"), names_of(site)
    page.fill("#search", "BELL two")
    page.wait_for_selector("#results a")
    assert page.locator("#results a").all_inner_texts() == ["●\ntwo/two bell.mp3"]
    assert page.locator("#found").inner_text() == f"1 of {len(names)} sounds"
    bright = page.evaluate(
        "map.data.flatMap(trace => trace.customdata.filter((_, i) => trace.marker.opacity[i] > 0.5))"
    )
    assert bright == [names.index("two/two bell.mp3")]
    page.press("#search", "Enter")
    wait_until(page, "row => chosen === row", names.index("two/two bell.mp3"))
    page.fill("#search", "nothing")
    wait_until(page, "byId('found').textContent === 'No such sound'")
    page.fill("#search", "")
    page.get_by_role("button", name="one").click()
    page.wait_for_selector("#results a")
    titles = [link.get_attribute("title") for link in page.locator("#results a").all()]
    assert titles == [name for name in names if name.startswith("one/")]


def test_names_are_text_wherever_they_are_shown(site, open_page):
    page, names = open_page(site / "pages/scenes.html"), names_of(site)
    odd = [row for row, name in enumerate(names) if name.startswith("odd/")]
    assert len(odd) == len(HOSTILE)
    for row in odd:
        page.evaluate("row => go(row)", row)
        wait_until_it_plays(page)  # its link leads to the file
        assert page.locator("#name").evaluate("made => made.textContent") == f"● {os.path.basename(names[row])}"
        click_point(page, row)
        folder, name = os.path.split(names[row])
        label = page.locator("#map .hovertext text").first.text_content()
        assert label == f"{name}{folder}/".replace("\n", " ")
    page.fill("#search", "odd")
    page.wait_for_selector("#results a")
    assert [link.get_attribute("title") for link in page.locator("#results a").all()] == [names[row] for row in odd]
    assert page.locator("body img, #right script, #map a, #right b b").count() == 0


def test_similarity_over_time_is_drawn_and_plays_from_a_click(site, open_page):
    page, names = open_page(site / "pages/steps.html"), names_of(site)
    row = names.index("one/one speech.flac")
    click_point(page, row)
    page.wait_for_selector("#matrix .nsewdrag")
    steps = np.load(site / "steps.npz")["embeddings"][row * STEPS : (row + 1) * STEPS].astype(np.float64)
    steps -= steps.mean(axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    np.testing.assert_allclose(
        page.evaluate("matrix.data[0].z.map(row => Array.from(row))"), steps @ steps.T, atol=0.005
    )
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix .nsewdrag").bounding_box()
    x, y = box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"]
    page.evaluate("audio.pause()")
    page.mouse.move(x, y)
    page.wait_for_selector("#matrix .hoverlayer .hovertext")
    page.mouse.click(x, y)
    wait_until(page, "audio.currentTime > 1.4")  # 0.75 of 50 steps of 40 ms
    click_point(page, names.index("two/two till.wav"))
    assert page.evaluate("matrix.data[0].x0") == pytest.approx(0.02)


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_fits_its_window_and_follows_the_color_scheme(site, open_page, width):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = open_page(site / "pages/steps.html", width, scheme)
        page.evaluate("go(3)")
        page.wait_for_selector("#matrix .nsewdrag")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for part in ("#map", "#search", "#audio", "#neighbors", "#matrix"):
            box = page.locator(part).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] >= 280
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.emulate_media(color_scheme="light")  # while the page is open
    wait_until(page, "map.layout.hoverlabel.bgcolor === '#ffffff'")
    assert backgrounds == {"rgb(255, 255, 255)", "rgb(19, 21, 25)"}


def test_a_page_with_embedded_audio_plays_anywhere(site, open_page, tmp_path):
    assert hear_map.main([str(site / "scenes.npz"), "-o", str(tmp_path / "map.html"), "--embed-audio"]) == 0
    page = open_page(tmp_path / "map.html")
    click_point(page, 1)
    wait_until_it_plays(page)
    assert not [url for url in page.requests if url.startswith("file:") and not url.endswith("map.html")]


def test_a_file_that_is_not_there_is_said(site, open_page, tmp_path, capsys):
    arguments = [str(site / "scenes.npz"), "-o", str(tmp_path / "map.html"), "--audio-root", str(tmp_path)]
    assert hear_map.main(arguments) == 0
    assert "15 of 15 audio files not found" in capsys.readouterr().err
    page = open_page(tmp_path / "map.html")
    click_point(page, 2)
    assert "not found" in page.locator("#problem").inner_text()
    assert not page.locator("#audio").is_visible()


def test_a_file_that_the_browser_cannot_play_is_said(open_page, tmp_path):
    paths = [str(tmp_path / name) for name in ("gone.wav", "noise.aiff", "till.wav")]
    soundfile.write(paths[1], np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    for path in (paths[0], paths[2]):
        shutil.copy(EXAMPLES / "till.wav", path)
    np.savez(tmp_path / "scenes.npz", paths=paths, embeddings=np.eye(3, dtype=np.float32))
    assert hear_map.main([str(tmp_path / "scenes.npz"), "-o", str(tmp_path / "map.html")]) == 0
    os.remove(paths[0])
    page = open_page(tmp_path / "map.html")
    for row in (0, 1):
        click_point(page, row)
        wait_until(page, "!byId('problem').hidden")
        assert "--embed-audio" in page.locator("#problem").inner_text()
    click_point(page, 2)
    wait_until_it_plays(page)
    assert not page.locator("#problem").is_visible()
    page.problems = [line for line in page.problems if "ERR_FILE_NOT_FOUND" not in line]


def test_the_same_embeddings_give_the_same_page(site, tmp_path):
    assert hear_map.main([str(site / "scenes.npz"), "-o", str(site / "pages/again.html")]) == 0
    assert (site / "pages/again.html").read_bytes() == (site / "pages/scenes.html").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_sounds_have_places(count):
    directions = centered_directions(np.random.default_rng(0).normal(size=(count, 5)))
    for method in ("pca", "tsne"):
        if method == "tsne" and count < 3:
            with pytest.raises(ValueError, match="at least 3 files"):
                project(directions, method)
        else:
            places = project(directions, method)
            assert places.shape == (count, 2) and np.isfinite(places).all()
    assert not project(np.zeros((count + 2, 5)), "tsne").any()


def test_the_projection_keeps_groups_together():
    """Of 5 groups of 12, each point's nearest on the map is of its group."""
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(5), 12)
    scenes = random.normal(size=(5, 30))[group] * 2 + random.normal(size=(60, 30)) * 0.5
    places = project(centered_directions(scenes), "tsne")
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (group[distances.argmin(axis=1)] == group).all()


def test_the_scripts_are_the_only_ones_that_the_page_allows(site):
    text = (site / "pages/scenes.html").read_text(encoding="utf-8")
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    assert len(base64.b64decode(policy.split("sha256-")[1].partition("'")[0])) == 32
    assert "script-src 'unsafe-inline'" not in policy
