"""Test the page in a real browser, against the real application with the toy engine.

The engine's answer is the text between « and »; without them there is no answer. Every test that opens the page also
checks that it sent nothing to other origins and logged nothing to the console.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

from bertqa.manifest import Bundle
from service.api_keys import new_key
from service.app import create_app
from service.settings import Settings
from service.triton.errors import EngineError, EngineOverloaded, EngineTimeout, EngineUnavailable
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine

pytestmark = pytest.mark.browser

QUESTION = "Where was Horovod made?"
TEXT = "Horovod was made at «Uber» and then given away."
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # For this module only: while Playwright's synchronous interface is open, no other test could use asyncio.run.
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.fail("no browser on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shared(bundle: Bundle) -> Iterator[tuple[str, FakeEngine]]:
    """One server for all tests, and its engine."""
    engine = FakeEngine(bundle.manifest.identity)
    with serving(create_app(Settings(), engine=engine, bundle=bundle)) as url:
        yield url, engine


@pytest.fixture
def url(shared: tuple[str, FakeEngine], engine: FakeEngine) -> str:
    return shared[0]


@pytest.fixture
def engine(shared: tuple[str, FakeEngine]) -> FakeEngine:
    """The server's engine, as a new one."""
    vars(shared[1]).update(vars(FakeEngine(shared[1].identity)))
    return shared[1]


class Console:
    """What the browser said and asked for, while a page was open."""

    def __init__(self, context: BrowserContext) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        context.on("console", self._heard)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("request", lambda request: self.requested.append(request.url))

    def _heard(self, message: ConsoleMessage) -> None:
        # A refused request is reported by the browser itself; showing it well is what the tests of failures are about.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own; keyword arguments are the context's."""
    with contextlib.ExitStack() as contexts:
        consoles = []

        def open_page(**options: object) -> Page:
            context = browser.new_context(**options)  # type: ignore[arg-type]
            contexts.callback(context.close)
            consoles.append(Console(context))
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.goto(url)
            return page

        yield open_page
        for console in consoles:
            assert console.requested
            assert [other for other in console.requested if not other.startswith(f"{url}/")] == []
            assert console.complaints == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page(viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"])


def ask(page: Page, question: str = QUESTION, *texts: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    for number, text in enumerate(texts):
        if number > 0 and page.locator("#texts textarea").count() <= number:
            page.get_by_role("button", name="Add another text").click()
        page.locator("#texts textarea").nth(number).fill(text)
    page.get_by_role("button", name="Ask").click()


def ranked(page: Page) -> Locator:
    return page.locator("#ranking button")


# ---- answers ----


def test_type_ask_and_see_the_answer_marked(page: Page) -> None:
    ask(page, QUESTION, TEXT)

    expect(page.locator("#verdict .best")).to_have_text("Uber")
    expect(page.locator("#verdict .sure")).to_have_text("Score over 99.9%")
    expect(page.locator("mark")).to_have_text(["Uber"])
    expect(page.locator("mark")).to_be_in_viewport()
    expect(page.locator("#passage p")).to_have_text(TEXT)
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize(
    "before",
    [
        "😀😀 ",
        "👩‍👩‍👧 \U0001f1f0\U0001f1f7 ",
        "e\u0301 caf\u00e9 ",
        "مرحبا ",
        "漢字 서울 \n\n 😀",
        "tab\t and\r\nline ",
    ],
    ids=["emoji", "joined-emoji", "combining", "right-to-left", "cjk", "line-ends"],
)
def test_the_mark_stands_exactly_on_the_answer(page: Page, before: str) -> None:
    ask(page, QUESTION, f"{before}«Uber 😀 e\u0301» after 😀")

    expect(page.locator("mark")).to_have_count(1)
    parts = page.locator("#passage p").evaluate("node => Array.from(node.childNodes, (child) => child.textContent)")
    shown = before.replace("\r\n", "\n")  # a text field has only line feeds
    assert parts == [f"{shown}«", "Uber 😀 e\u0301", "» after 😀"]


def test_other_answers_are_listed_and_can_be_marked(page: Page) -> None:
    ask(page, QUESTION, TEXT)

    expect(ranked(page)).to_have_count(5)
    expect(ranked(page).first).to_have_attribute("aria-pressed", "true")
    widths = page.locator("#ranking .bar").evaluate_all(
        "bars => bars.map((bar) => parseFloat(getComputedStyle(bar, '::before').width))"
    )
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 10 * widths[1]
    for number in (1, 2, 0):
        words = ranked(page).nth(number).locator(".words").text_content()
        ranked(page).nth(number).click()
        expect(page.locator("mark")).to_have_text([str(words)])
        expect(page.locator('#ranking [aria-pressed="true"] .words')).to_have_text([str(words)])
    ranked(page).nth(3).focus()
    expect(page.locator("mark")).to_have_text([str(ranked(page).nth(3).locator(".words").text_content())])
    expect(page.locator("#verdict .best")).to_have_text("Uber")


def test_an_answer_far_down_is_scrolled_into_view(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, reduced_motion="reduce")

    ask(page, QUESTION, "word " * 3_000 + TEXT + " word" * 3_000)

    expect(page.locator("mark")).to_have_text(["Uber"])
    expect(page.locator("mark")).to_be_in_viewport()
    expect(page.locator("#verdict .best")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_no_answer_is_said_and_the_guesses_are_listed(page: Page) -> None:
    ask(page, "Who?", "Nothing is marked here.")

    expect(page.locator("#verdict .best")).to_have_text("The text does not seem to answer this.")
    expect(page.locator("#verdict .sure")).to_contain_text("“No answer” scores")
    expect(page.get_by_role("heading", name="Closest guesses, not reliable")).to_be_visible()
    expect(page.locator("mark")).to_have_count(0)
    expect(ranked(page)).to_have_count(5)
    ranked(page).nth(1).click()
    expect(page.locator("mark")).to_have_count(1)


def test_several_texts_and_a_blank_one_among_them(page: Page) -> None:
    ask(page, QUESTION, "Nothing is marked here.", "  \n ", f"😀 {TEXT}")

    expect(page.locator("#verdict .sure")).to_contain_text("in text 3")
    expect(page.locator("#passage h4")).to_have_text(["Text 1", "Text 3"])
    expect(page.locator("#passage p").nth(1).locator("mark")).to_have_text("Uber")

    page.get_by_role("button", name="Remove text 2").click()
    page.get_by_role("button", name="Remove text 1").click()
    expect(page.get_by_label("Text", exact=True)).to_be_focused()
    expect(page.get_by_label("Text", exact=True)).to_have_value(f"😀 {TEXT}")
    expect(page.get_by_role("button", name="Remove text 1")).to_have_count(0)


def test_figures_and_the_note_of_a_cut_question(page: Page) -> None:
    ask(page, "where " * 30, TEXT)

    expect(page.locator("#verdict .note")).to_contain_text("too long for the model (30 tokens)")
    expect(page.locator("#timings dt")).to_have_text(["Tokenize", "Engine", "Decode", "Total", "Windows"])
    figures = page.locator("#timings dd").all_text_contents()
    assert all(figure.endswith(" ms") for figure in figures[:4])
    tokenize, engine, decode, total = (float(figure.removesuffix(" ms")) for figure in figures[:4])
    assert 0 < max(tokenize, engine, decode) <= total
    assert figures[4] == "1"
    expect(page.locator("#model")).to_contain_text("toy")


def test_samples_ask_at_once_and_go_with_their_text(page: Page) -> None:
    samples = page.locator("#samples")
    samples.get_by_role("button").nth(1).click()

    expect(ranked(page)).to_have_count(5)
    expect(page.get_by_label("Question", exact=True)).to_have_value("Which elements did she discover?")
    page.get_by_label("Text", exact=True).press_sequentially("My own. ")
    expect(samples).to_be_hidden()


def test_markup_in_a_text_stays_text(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)> «<b>Uber</b>» </p><script>alert(2)</script>"

    ask(page, QUESTION, hostile)

    expect(page.locator("#verdict .best")).to_have_text("<b>Uber</b>")
    expect(page.locator("mark")).to_have_text("<b>Uber</b>")
    expect(page.locator("#passage p")).to_have_text(hostile)
    expect(page.locator("#answer :is(img, b, script)")).to_have_count(0)


# ---- waiting ----


def test_waiting_is_shown_and_moves_nothing(page: Page) -> None:
    held: list[Route] = []
    ask(page, QUESTION, TEXT)
    expect(page.locator("mark")).to_have_text("Uber")
    page.locator("h1").hover()
    places = "Array.from(document.querySelectorAll('#submit, #form, #answer, mark'), (node) => "
    places += "JSON.stringify(node.getBoundingClientRect()))"
    before = page.evaluate(places)
    page.route("**/v1/answer", lambda route: held.append(route))  # noqa: PLW0108 (Playwright writes on its handlers)

    page.get_by_label("Question", exact=True).press("Enter")

    expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#submit")).to_have_text("Asking…")
    assert page.evaluate(places) == before
    held[0].continue_()
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#submit")).to_have_text("Ask")


def test_a_question_asked_anew_replaces_the_one_in_flight(page: Page, engine: FakeEngine) -> None:
    engine.delay_s = 30
    ask(page, QUESTION, "«Slow» text")
    expect(page.locator("#submit")).to_have_text("Asking…")
    assert engine.started.wait(10)
    engine.delay_s = 0

    page.get_by_label("Text", exact=True).fill("«Quick» text")
    page.get_by_label("Text", exact=True).press("Control+Enter")

    expect(page.locator("mark")).to_have_text("Quick")
    assert engine.cancelled.wait(10)  # the browser gave the first one up, and so did the service
    expect(page.locator("#failure")).to_be_empty()


# ---- failures ----


BUSY = [
    (EngineUnavailable("the engine is not reachable at 127.0.0.1:1"), "The service cannot answer right now."),
    (EngineOverloaded("the engine has too many questions waiting"), "The service is still busy."),
]


@pytest.mark.parametrize("failure", [failure for failure, _ in BUSY], ids=["down", "overloaded"])
def test_a_busy_service_is_asked_again_by_itself(page: Page, engine: FakeEngine, failure: EngineError) -> None:
    times: list[float] = []

    def note(request: Request) -> None:
        if request.url.endswith("/answer"):
            times.append(time.monotonic())

    page.on("request", note)
    engine.failure = failure
    ask(page, QUESTION, TEXT)

    waiting = page.locator("#waiting")
    expect(waiting).to_have_text("The service is busy at the moment. Your question will be sent again automatically…")
    expect(page.locator("#submit")).to_have_text("Asking…")
    expect(page.get_by_role("alert")).to_be_empty()

    engine.failure = None
    expect(page.locator("mark")).to_have_text("Uber")
    expect(waiting).to_be_empty()
    assert len(times) >= 2
    assert times[1] - times[0] >= 1.0, "not before retry-after has passed"


@pytest.mark.parametrize(("failure", "headline"), BUSY, ids=["down", "overloaded"])
def test_a_service_that_stays_busy_is_given_up(
    page: Page, engine: FakeEngine, failure: EngineError, headline: str
) -> None:
    page.clock.install()
    engine.failure = failure
    ask(page, QUESTION, TEXT)
    expect(page.locator("#waiting")).not_to_be_empty()
    page.clock.fast_forward(59_000)
    says_why_and_passes(page, engine, failure, headline)


def test_a_slow_engine_is_said_plainly_and_passes(page: Page, engine: FakeEngine) -> None:
    engine.failure = failure = EngineTimeout("the engine did not answer within 10 s")
    ask(page, QUESTION, TEXT)
    says_why_and_passes(page, engine, failure, "The answer took too long.")


def says_why_and_passes(page: Page, engine: FakeEngine, failure: EngineError, headline: str) -> None:
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(headline)
    expect(alert).to_contain_text(str(failure)[1:])
    expect(page.locator("#waiting")).to_be_empty()
    expect(page.locator("#details")).to_be_hidden()
    expect(page.get_by_label("Question", exact=True)).to_have_value(QUESTION)
    expect(page.get_by_label("Text", exact=True)).to_have_value(TEXT)

    engine.failure = None
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator("mark")).to_have_text("Uber")
    expect(alert).to_be_empty()
    expect(page.locator("#submit")).to_be_focused()


def test_a_service_out_of_reach_and_a_stranger_in_its_place(page: Page) -> None:
    page.route("**/v1/answer", lambda route: route.abort())
    ask(page, QUESTION, TEXT)
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached.")

    page.route("**/v1/answer", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The service answered with status 502.")


def test_what_is_missing_or_too_long_is_said_at_its_field(page: Page) -> None:
    question, text = page.get_by_label("Question", exact=True), page.get_by_label("Text", exact=True)
    ask(page, "  ", " ")
    expect(question).to_have_accessible_description(
        "Ctrl + Enter sends the question from anywhere on the page. Please type a question."
    )
    expect(text).to_have_accessible_description("Please enter the text that contains the answer.")
    expect(question).to_be_focused()

    ask(page, "a" * 1_001, TEXT)
    expect(page.locator("#question-problem")).to_contain_text("1,000")
    expect(question).to_be_focused()
    expect(question).to_have_attribute("aria-invalid", "true")
    expect(text).not_to_have_attribute("aria-invalid", "true")

    ask(page, QUESTION, "a" * 200_001)
    expect(page.locator("#text-1-problem")).to_contain_text("200,000")
    expect(text).to_be_focused()
    ask(page, QUESTION, TEXT)
    expect(page.locator("mark")).to_have_text("Uber")
    expect(page.locator("#text-1-problem")).to_be_hidden()


# ---- copy as curl ----


def test_the_curl_command_runs_in_bash_and_answers_the_same(page: Page) -> None:
    hostile = "it's \"quoted\" `id` $HOME $(id) \\ \\n !! 😀 \u202e\u200d %s\nJSON\n'JSON'\n\n«Uber's $5 😀» # end\\"
    ask(page, 'What\'s "$HOME"?', hostile)
    expect(page.locator("mark")).to_have_text("Uber's $5 😀")

    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#copied")).to_have_text("Copied. Paste it into a terminal.")
    command = page.evaluate("navigator.clipboard.readText()")

    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        ["bash", "--norc"], input=command, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    reply = json.loads(done.stdout)
    assert [answer["text"] for answer in reply["answers"]] == page.locator("#ranking .words").all_text_contents()
    assert reply["answers"][0]["text"] == "Uber's $5 😀"
    start = len(hostile[: hostile.index("Uber")].encode("utf-16-le")) // 2
    assert reply["answers"][0]["start"] == start
    assert "\u202e" not in command  # a terminal would turn the line around


def test_without_a_clipboard_the_command_is_shown_to_be_copied(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(page, QUESTION, TEXT)

    page.get_by_role("button", name="Copy as curl").click()

    expect(page.get_by_label("This request as a curl command")).to_be_focused()
    assert page.evaluate("getSelection().toString()").startswith("curl ")


# ---- several models ----


def test_a_model_is_chosen_where_there_are_several(open_page: Callable[..., Page], page: Page) -> None:
    expect(page.get_by_label("Model", exact=True)).to_be_hidden()  # there is one
    models = {"default": "bert_qa", "models": [{"name": "bert_qa"}, {"name": "korean"}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("bert_qa")
    with page.expect_request("**/v1/answer") as sent:
        ask(page, QUESTION, TEXT)
    assert '"model":"bert_qa"' in (sent.value.post_data or "")
    expect(page.locator("mark")).to_have_text("Uber")
    page.get_by_label("Model", exact=True).select_option("korean")
    ask(page)
    expect(page.locator("#failure")).to_contain_text("must be one of bert_qa; got 'korean'")


# ---- without a mouse, without eyes ----


def test_everything_is_reached_with_the_keyboard_in_order(page: Page) -> None:
    focused = "(document.activeElement.id || document.activeElement.textContent).trim()"
    outlined = "getComputedStyle(document.activeElement).outlineStyle"
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        assert page.evaluate(outlined) == "solid"
    assert order == ["Skip to the answer", "API", "Model", "question"]
    page.keyboard.press("Control+a")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "submit"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type(TEXT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("mark")).to_have_text("Uber")
    expect(page.locator("#text-1")).to_be_focused()  # the answer is announced, the place is not lost

    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        assert page.evaluate(outlined) == "solid"
    assert order[:2] == ["add-text", "passage"]
    assert order[2].startswith("Uber")
    second = str(ranked(page).nth(2).locator(".words").text_content())
    expect(ranked(page).nth(2)).to_be_focused()
    expect(page.locator("mark")).to_have_text(second)
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#copied")).to_contain_text("Copied")


def test_the_answer_and_the_landmarks_are_told_to_a_screen_reader(page: Page) -> None:
    ask(page, QUESTION, TEXT)
    expect(page.locator("mark")).to_have_text("Uber")

    for landmark in ("banner", "main", "navigation"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((heading) => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    live = page.locator('[aria-live="polite"]')
    expect(live).to_contain_text("Uber")
    expect(live).to_contain_text("Score")
    expect(page.get_by_role("region", name="Answer")).to_be_visible()
    expect(page.get_by_role("list", name="Answers, best first").get_by_role("button")).to_have_count(5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["start", "answer", "no answer", "several texts", "waiting", "failure", "problem"])
def test_axe_finds_nothing(
    open_page: Callable[..., Page], engine: FakeEngine, javascript_packages: Path, scheme: str, state: str
) -> None:
    page = open_page(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")  # for axe's own script
    if state == "failure":
        engine.failure = EngineTimeout("the engine did not answer within 10 s")
    if state == "waiting":
        engine.failure = EngineUnavailable("the engine is not reachable at 127.0.0.1:1")
    if state == "several texts":
        ask(page, QUESTION, TEXT, "Another text.")
    elif state != "start":
        ask(page, {"problem": " "}.get(state, QUESTION), {"no answer": "Nothing is marked."}.get(state, TEXT))
    shown = {"start": ".empty", "failure": "#failure strong", "problem": "#question-problem"}
    shown |= {"waiting": "#waiting:not(:empty)"}
    expect(page.locator(shown.get(state, "#ranking li")).first).to_be_visible()

    page.add_script_tag(path=javascript_packages / "node_modules" / "axe-core" / "axe.min.js")
    found = page.evaluate("axe.run()")

    assert len(found["passes"]) > 20
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []


def test_no_script_can_be_smuggled_into_the_page(browser: Browser, url: str) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'smuggled = 1'}))")
        assert page.evaluate("typeof smuggled") == "undefined"


# With API keys, and the documentation


@contextlib.contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    console = Console(context)
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.goto(url)
        yield page
        origin = url.rpartition("/")[0]
        assert [other for other in console.requested if not other.startswith(f"{origin}/")] == []
        assert console.complaints == []
    finally:
        context.close()


def test_the_page_asks_for_the_key_and_keeps_it_out_of_addresses(
    browser: Browser, make_app: Callable[..., FastAPI], tmp_path: Path
) -> None:
    key = new_key(tmp_path / "keys", "me", None, None)
    with serving(make_app(api_keys_file=str(tmp_path / "keys"))) as url, opened(browser, f"{url}/") as page:
        addresses: list[str] = []
        page.on("request", lambda request: addresses.append(request.url))
        expect(page.get_by_label("API key")).to_be_hidden()
        ask(page, QUESTION, TEXT)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator("#key-problem")).to_contain_text("API key is required")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#key-problem")).to_contain_text("Unknown API key")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#verdict .best")).to_have_text("Uber")
        expect(page.get_by_label("API key")).to_be_hidden()
        page.reload()
        ask(page, QUESTION, TEXT)
        expect(page.locator("#verdict .best")).to_have_text("Uber")
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.locator("#copied")).to_contain_text("Copied")
        command = page.evaluate("navigator.clipboard.readText()")
        assert '-H "authorization: Bearer $BERTQA_API_KEY"' in command
        assert not [address for address in [*addresses, page.url, command] if key in address]
        assert page.context.cookies() == []


def test_the_documentation_comes_from_here_alone(browser: Browser, url: str) -> None:
    with opened(browser, f"{url}/docs") as page:
        page.locator("#operations-default-answer_v1_answer_post, [id$=answer_v1_answer_post]").first.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")


def test_the_documentation_asks_for_the_key(browser: Browser, make_app: Callable[..., FastAPI], tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys", "me", None, None)
    app = make_app(api_keys_file=str(tmp_path / "keys"), docs="key")
    with serving(app) as url, opened(browser, f"{url}/docs") as page:
        expect(page.locator("#problem")).to_contain_text("API key is required")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Show the API").click()
        expect(page.locator("#api")).to_contain_text("/v1/answer")
        assert key not in page.url
