"""The page in a real browser: hover, keys, addresses, dark mode, playback."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from models.exploration.page import Shown, make_page
from models.exploration.reading import read
from models.network.operands import attention_operands
from tests.made_up import run_of

TEXT = "def attend(q, k):\n    return relu(q @ k)\n\n" * 24
LENGTH = len(TEXT)
DEAD = (1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory, compile_cache):
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.py").write_text(TEXT)
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    model = run_of(folder / "run", folder / "text.py", **sizes)
    model.blocks[1].attention.beta[...] = jnp.array([1.0, 0.8, 1.2, 99.0])
    return model


@pytest.fixture(scope="module")
def reading(model):
    return read(model, list(TEXT.encode()), layers=[0, 1])


@pytest.fixture(scope="module")
def html(reading, tmp_path_factory):
    """The page of all of the text, as a file."""
    shown = Shown(reading, "ReLU³", "made up")
    page = make_page([shown], list(TEXT), title="text.py", notes=["A note."])
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page.html, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, or the reason why there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: make setup"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here (Debian, Ubuntu: apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, html, tmp_path):
    """Opens the page at an address; at the end nothing may have gone wrong in it."""
    contexts, wrong = [], []

    def open_page(address="", *, width=1280, dark=False, html=html):
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url))
        wrong_before = len(wrong)
        page.goto(f"{html.as_uri()}{address}")
        assert all(x.startswith(html.as_uri()) for x in wrong[wrong_before:]), wrong
        del wrong[wrong_before:]
        comes(page, "document.documentElement.dataset.ready", "true")
        return page

    yield open_page
    for number, context in enumerate(contexts):
        context.pages[0].screenshot(path=tmp_path / f"page-{number}.png")
        context.close()
    assert not wrong


def comes(page, expression, wanted=True):
    """Waits until JavaScript has a value; Playwright's own way, eval, is forbidden."""
    for _ in range(500):
        found = page.evaluate(expression)
        if found == wanted:
            return
        page.wait_for_timeout(20)
    pytest.fail(f"{expression} is {found!r}, not {wanted!r}")


SHOWN = "[state.layer, state.head, Number($('query').textContent)]"


@pytest.fixture(scope="module")
def weights(model):
    """Shares of the weights f64[L, N, T, T], by numpy in float64."""
    found = []
    for given in attention_operands(model, jnp.asarray([list(TEXT.encode())])):
        query, key, edge = (
            np.asarray(x[0], np.float64)
            for x in (given.query, given.key, given.activation.bias)
        )
        scores = np.einsum("tnh,snh->nts", query, np.repeat(key, 2, axis=1))
        above = np.maximum(scores - edge.T[..., None], 0) ** given.activation.power
        above *= np.tri(LENGTH)
        total = above.sum(-1, keepdims=True)
        found.append(above / np.where(total > 0, total, 1))
    return np.array(found)


def coloured(page):
    """Numbers of the tokens with a background of weights."""
    return page.evaluate(
        """[...document.querySelectorAll('#text span')]
           .filter((x) => x.style.background.includes('--own'))
           .map((x) => Number(x.dataset.at))"""
    )


def listed(page):
    """Shares of the weight by key, as the table has them, of those that fire."""
    rows = page.evaluate(
        """[...document.querySelectorAll('#keys tbody tr:not(.silent)')]
           .map((x) => [Number(x.dataset.at), x.cells[3].textContent])"""
    )
    number = lambda text: float(text.replace("< ", "").replace(" %", "")) / 100
    return {key: number(text) for key, text in rows}


def hover(page, token):
    page.locator(f'#text span[data-at="{token}"]').first.hover()
    comes(page, "Number($('query').textContent)", token)


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 2), (1, 3)])
def test_hover_shows_the_keys_that_fire(show, weights, layer, head):
    page = show(f"#layer={layer}&head={head}")
    for token in (0, 57, 400, LENGTH - 2):
        hover(page, token)
        own = weights[layer, head, token]
        keys = np.flatnonzero(own)
        sentence = page.locator("#sentence").inner_text()
        if not len(keys):
            assert sentence.startswith("Empty row: none of")
            assert listed(page) == {} and coloured(page) == []
            continue
        assert sentence.startswith(f"{len(keys):,} of {token + 1:,} visible")
        shown = listed(page)
        best = np.argsort(-own, kind="stable")[: len(shown)]
        assert len(shown) == min(len(keys), 64)
        assert set(shown) == set(best.tolist()) == set(coloured(page))
        for key, share in shown.items():
            assert share == pytest.approx(own[key], rel=0.05, abs=3e-3)


def test_the_ladder_goes_down(show, reading):
    page = show("#layer=0&head=0&query=300")
    numbers = page.locator("#ladder .number").all_inner_texts()
    visible, possible, looked, fire, softmax = (
        int(x.replace(",", "")) for x in numbers
    )
    assert visible == 301 >= possible >= fire > 0
    assert looked >= possible  # with the other head of these keys
    assert fire < softmax <= visible
    head = reading.heads[0, 0]
    found = head.possible[300], head.looked[300], head.count[300], head.soft[300]
    assert (possible, looked, fire, softmax) == found


def test_keys_move_and_a_click_pins(show):
    page = show("#query=100&layer=0&head=0")
    comes(page, SHOWN, [0, 0, 100])
    for key, expected in (
        ("ArrowRight", [0, 0, 101]),
        ("ArrowLeft", [0, 0, 100]),
        ("]", [0, 1, 100]),
        ("[", [0, 0, 100]),
        ("[", [0, 3, 100]),
        ("}", [1, 3, 100]),
        ("e", [1, 3, 101]),  # a dead head
        ("End", [1, 3, LENGTH - 1]),
        ("Home", [1, 3, 0]),
        ("ArrowLeft", [1, 3, 0]),
    ):
        page.keyboard.press(key)
        comes(page, SHOWN, expected)
    page.keyboard.press("ArrowDown")
    comes(page, SHOWN, [1, 3, TEXT.index("\n") + 1])
    page.keyboard.press("ArrowUp")
    comes(page, SHOWN, [1, 3, 0])
    page.locator('#text span[data-at="5"]').click()
    page.locator('#text span[data-at="30"]').hover()
    comes(page, SHOWN, [1, 3, 5])
    page.keyboard.press("Escape")
    hover(page, 60)


def test_help_is_a_key_away(show):
    page = show()
    assert page.locator("footer").is_visible()
    assert not page.locator("#help").is_visible()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert "deep" not in page.locator("#help").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_the_address_says_what_is_shown(show):
    page = show("#layer=1&head=2&query=77&view=map")
    assert page.locator("#view-map").is_visible()
    page.keyboard.press("]")
    page.keyboard.press("1")
    comes(page, "location.hash.includes('head=3')")
    address = page.evaluate("location.hash")
    again = show(address)
    assert again.evaluate("hashNow()") == address
    assert again.locator("#view-query").is_visible()
    # As if the page wrote over it before it hears of it.
    again.evaluate(
        "location.hash = '#layer=0&head=1&query=9&view=play';"
        "history.replaceState(null, '', hashNow())"
    )
    comes(again, SHOWN, [0, 1, 9])
    assert again.locator("#view-play").is_visible()


@pytest.mark.parametrize(
    "address", ["#layer=99&head=-3&query=1e9&view=no", "#%%%", "#x"]
)
def test_any_address_shows_something(show, address):
    page = show(address)
    assert page.locator("#view-query").is_visible()
    assert page.locator("#sentence").inner_text()


def test_dark_follows_the_system_and_the_toggle(show):
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = show().evaluate(paper), show(dark=True).evaluate(paper)
    assert light == "rgb(253, 253, 252)" and dark == "rgb(20, 22, 26)"
    page = show()
    page.keyboard.press("t")
    assert page.evaluate(paper) == dark
    page.locator("#theme").click()
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == light  # what was chosen stays


def test_all_heads_by_sparsity(show, weights):
    page = show("#view=heads")
    page.wait_for_selector("#grid button.chosen")
    buttons = page.locator("#grid button")
    assert buttons.count() == 8
    assert page.locator("#grid .dead").count() == 1
    assert buttons.nth(7).get_attribute("class") == "dead"
    fired = (weights > 0).sum((-2, -1)) / (LENGTH * (LENGTH + 1) / 2)
    for number, share in enumerate(fired.ravel()[:7]):
        said = float(buttons.nth(number).inner_text().replace("%", ""))
        assert said == pytest.approx(100 * share, rel=0.06)
    assert "1 is dead" in page.locator("#heads-sentence").inner_text()
    buttons.nth(6).click()
    comes(page, SHOWN, [1, 2, LENGTH - 1])
    page.locator('[data-metric="empty"]').click()
    assert buttons.nth(7).inner_text().replace("\u2009", "") == "100%"


def test_playback_counts_what_is_looked_at(show):
    page = show("#layer=0&head=0&query=300&view=play")
    looked = page.evaluate("[...models[0].get(0, 0).looked]")
    said = page.locator("#so-far").inner_text()
    assert f"So far {round(sum(looked[:301])):,} exact scores" in said
    assert f"{301 * 302 // 2:,}" in said
    page.select_option("#speed", "256")
    page.locator("#play").click()
    comes(page, "Number($('query').textContent) > 320")
    page.keyboard.press(" ")  # the button has the focus: it is pressed
    assert "play" in page.locator("#play").inner_text()
    assert page.locator("#text .later").count() > 0


def test_a_step_changes_few_elements(show):
    """What a step costs does not grow with the text."""
    page = show("#layer=1&head=2&query=600")
    changed = page.evaluate(
        """async () => {
          const seen = new Set(), watch = new MutationObserver(
            (all) => all.forEach((one) => seen.add(one.target)));
          watch.observe($("text"), {attributes: true, childList: true, subtree: true});
          await go({query: 599});
          await new Promise((go) => setTimeout(go));
          return seen.size;
        }"""
    )
    assert 2 <= changed < 200 < LENGTH


def test_a_phone_has_no_sideways_scrolling(show):
    page = show("#view=query&query=200", width=390)
    for view in "1234":
        page.keyboard.press(view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#text").bounding_box()["height"] > 250
    page.locator('#text span[data-at="210"]').click()
    assert page.locator("#query").inner_text() == "210"


def page_of(folder, *readings):
    shown = [Shown(x, "ReLU³", f"model {n}") for n, x in enumerate(readings)]
    file = folder / "other.html"
    page = make_page(shown, list(TEXT), title="text.py", notes=["A note."])
    file.write_text(page.html, encoding="utf-8")
    return file


def test_what_is_not_in_the_page_is_said(show, reading, tmp_path):
    some = {at: head for at, head in reading.heads.items() if at[0] == 1}
    page = show("#layer=0&head=2", html=page_of(tmp_path, reading._replace(heads=some)))
    comes(page, "[state.layer, state.head]", [1, 2])
    notes = page.locator("#notes")
    assert "A note." in notes.inner_text() and "--layers 0" in notes.inner_text()
    notes.locator("button").click()
    assert not notes.is_visible()
    page.keyboard.press("}")  # round to the only layer there is
    comes(page, "[state.layer, state.head]", [1, 2])
    page.keyboard.press("2")
    page.locator("#grid button").first.click()
    assert "--layers 0" in notes.inner_text()


def test_a_second_model_beside_the_first(show, reading, tmp_path):
    dense = {at: head for at, head in reading.heads.items() if at[1] < 2}
    other = reading._replace(heads=dense)
    page = show("#layer=1&head=0&query=500", html=page_of(tmp_path, reading, other))
    assert page.locator("#soft-head").inner_text() == "ReLU³ model 1"
    cells = """[...document.querySelectorAll('#keys tbody tr')]
      .map((x) => [3, 4].map((i) => x.cells[i].textContent))"""
    rows = page.evaluate(cells)
    assert len(rows) > 3 and all(own == soft for own, soft in rows)
    page.keyboard.press("ArrowLeft")
    comes(page, SHOWN, [1, 0, 499])
    page.evaluate("go({head: 2})")  # of which the second has no lists
    comes(page, SHOWN, [1, 2, 499])
    assert all(own != soft for own, soft in page.evaluate(cells))
