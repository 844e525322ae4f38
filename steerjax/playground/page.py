"""The page, in Gradio: what is shown where, and what happens when something is pressed.

Nothing but this process is spoken to: no analytics, no share link, no fonts or scripts from elsewhere. Texts of models
and schemas are shown as text.
"""

import html
import itertools
import os
import threading
import time
from collections.abc import Iterator

from steerjax.errors import DataError, SteerjaxError
from steerjax.inference.steering import Answer, Sampling, Setting
from steerjax.playground.calls import curl_call, python_call
from steerjax.playground.player import Player
from steerjax.playground.ratings import STYLE, ratings_plot
from steerjax.schema import Attribute

SIDES = "AB"
_LONGEST = 4096  # new tokens that the page offers
_STYLE = (
    STYLE
    + """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.gradio-container h3 { font-size: 1.1em; font-weight: 600; margin: .4em 0 0; }
.asked-for { align-items: center; gap: .4em !important; flex-wrap: nowrap !important; }
.asked-for > .tick { flex: 0 0 2em !important; min-width: 2em !important; border: none !important; }
.asked-for > .tick label span { position: absolute; opacity: 0; pointer-events: none; }
.asked-for > .slider { gap: 0 !important; }
.asked-for .html-container, .side > .block .html-container { padding: 0 !important; }
.asked-for .html-container { padding-right: 5.5em !important; overflow-wrap: anywhere; }
.asked-for .slider .head { margin-top: -1.9em; justify-content: flex-end; position: relative; z-index: 1; }
.side { gap: .7em !important; }
.asked-for .slider > .block { overflow: visible !important; }
.faint, .note { color: var(--body-text-color-subdued); font-size: .9em; overflow-wrap: anywhere; }
.problem { color: var(--error-text-color, #b91c1c); font-weight: 600; overflow-wrap: anywhere; }
"""
)
_HEADERS = (
    (b"content-security-policy", b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"),
    (b"referrer-policy", b"no-referrer"),
)


def require_gradio() -> None:
    """For the start, before a model is opened."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SteerjaxError(f"the playground needs gradio ({error})\n  cure: pip install 'steerjax[play]'") from error


def serve(player: Player, sampling: Sampling, host: str, port: int | None, *, block: bool = True) -> str:
    """Serves the page until it is interrupted (not `block`: in a thread); its address. `port` None takes a free one.

    Raises SteerjaxError: the port is taken.
    """
    require_gradio()
    import gradio
    from starlette.middleware import Middleware

    try:
        _, address, _ = build(player, sampling).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            footer_links=[], css=_STYLE, theme=_theme(gradio), show_error=True, max_file_size=1,
            app_kwargs={"middleware": [Middleware(OnlyHere)]}, ssr_mode=False, enable_monitoring=False,
        )  # fmt: skip
    except OSError as error:
        wrong = f"the page cannot be served at {host}" + (f", port {port}: is the port taken?" if port else "")
        raise SteerjaxError(f"{wrong}\n  cure: another --port, or --host 127.0.0.1") from error
    print(f"the playground is at {address} (Ctrl-C ends it)", flush=True)
    while block:
        time.sleep(3600)
    return address


def build(player: Player, sampling: Sampling):
    """The `gradio.Blocks`. What is asked for goes through one queue, so that nobody's answers mix."""
    import gradio as gr

    start = player.default_setting()
    with gr.Blocks(title="steerjax playground", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(player))
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, elem_id="prompt", autofocus=True)
        with gr.Accordion("System text and sampling", open=False, elem_id="more"):
            system = gr.Textbox(label="System text", lines=2, elem_id="system", placeholder="the template's own")
            drawing = _drawing(gr, sampling)
        with gr.Row():
            ask = gr.Button("Ask A and B", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
        problem = gr.HTML(elem_id="problem")
        sides = [None, None]
        with gr.Row(equal_height=False):
            for place, side in enumerate(SIDES):
                with gr.Column(min_width=360, elem_classes="side"):
                    sides[place] = _Side(gr, side, player, start)
        common = [prompt, system, *drawing]
        widgets = [*common, *(widget for side in sides for widget in side.asked)]
        shown = [problem, *(widget for side in sides for widget in side.shown)]
        width = 2 * len(player.schema)

        def sampled(heat, new, seed) -> Sampling:
            return Sampling(float(heat), sampling.top_k, sampling.top_p, int(seed or 0), int(new))

        stopped: dict[str, threading.Event] = {}  # by visitor

        def begin(request: gr.Request) -> None:
            stopped[request.session_hash] = threading.Event()

        def end(request: gr.Request) -> None:
            stopped.setdefault(request.session_hash, threading.Event()).set()

        def leave(request: gr.Request) -> None:
            stopped.pop(request.session_hash, threading.Event()).set()

        def asked(request: gr.Request, prompt, system, heat, new, seed, *values) -> Iterator[list]:
            settings = [setting_of(player.schema.attributes, values[at : at + width]) for at in (0, width)]
            stop = stopped.setdefault(request.session_hash, threading.Event())
            yield from answers(player, prompt, system, settings, sampled(heat, new, seed), stop)

        def calls(prompt, system, heat, new, seed, *values) -> tuple[str, str]:
            setting = setting_of(player.schema.attributes, values)
            made = (player.target, prompt, system, setting, sampled(heat, new, seed))
            return curl_call(*made), python_call(*made)

        queued = {"concurrency_limit": player.at_once, "concurrency_id": "models", "api_visibility": "private"}
        now = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        ask.click(begin, **now).then(asked, widgets, shown, show_progress="hidden", **queued)
        stop.click(end, **now)  # Gradio's own way to cancel leaves "Error" in the answer
        page.unload(leave)
        for side in sides:
            inputs = [*common, *side.asked]
            quick = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
            events = [page.load, *(widget.change for widget in inputs)]
            gr.on(events, calls, inputs, side.calls, queue=False, **quick)
    return page.queue(max_size=64)


def _drawing(gr, sampling: Sampling) -> list:
    """The widgets of temperature, longest answer and seed."""
    longest = max(_LONGEST, sampling.max_new_tokens)
    with gr.Row():
        return [
            gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature (0: most likely token)"),
            gr.Slider(1, longest, sampling.max_new_tokens, step=1, label="Longest answer, in tokens"),
            gr.Number(sampling.seed, precision=0, minimum=0, maximum=2**31 - 1, label="Seed"),
        ]


class _Side:
    """The widgets of one setting: `asked`, tick and slider of each attribute; `shown`, what an answer fills."""

    def __init__(self, gr, side: str, player: Player, start: Setting):
        gr.HTML(f'<h3>Setting {side}</h3><div class="note">What is not ticked is left out of the label line.</div>')
        self.asked = []
        for attribute in player.schema.attributes:
            value, labels, name = start[attribute.name], attribute.labels, attribute.name
            at = value if value is not None else labels[len(labels) // 2]
            with gr.Row(elem_classes="asked-for", elem_id=f"asked-{side}-{name}"):
                tick = gr.Checkbox(
                    value is not None, label=f"{name} in the label of {side}", container=False, min_width=20,
                    elem_id=f"tick-{side}-{name}", elem_classes="tick", scale=0,
                )  # fmt: skip
                with gr.Column(min_width=200, elem_classes="slider"):
                    gr.HTML(_meaning(attribute))  # a slider's own label and info would take it for Markdown
                    slider = gr.Slider(
                        labels[0], labels[-1], at, step=1, label=name, show_label=False, container=False, buttons=[],
                        interactive=value is not None, elem_id=f"slider-{side}-{name}",
                    )  # fmt: skip
            tick.change(
                lambda on: gr.update(interactive=on), tick, slider, queue=False, show_progress="hidden",
                api_visibility="private",
            )  # fmt: skip
            self.asked += [tick, slider]
        answer = gr.Textbox(
            label=f"Answer {side}", lines=6, max_lines=24, interactive=False, buttons=["copy"], elem_id=f"answer-{side}"
        )
        note = gr.HTML(elem_id=f"note-{side}")
        plot = gr.HTML(elem_id=f"plot-{side}", visible=player.judged is not None)
        self.shown = [answer, note, plot]
        with gr.Accordion("The same call elsewhere", open=False, elem_id=f"calls-{side}"):
            code = {
                "interactive": False,
                "wrap_lines": True,
                "show_line_numbers": False,
                "lines": 3,
                "buttons": ["copy"],
            }
            self.calls = [
                gr.Code(language="shell", label="curl, to a server of the export", elem_id=f"curl-{side}", **code),
                gr.Code(language="python", label="Python", elem_id=f"python-{side}", **code),
            ]


def setting_of(attributes: tuple[Attribute, ...], values: tuple) -> dict[str, int | None]:
    """Of (tick, slider) of each attribute; None leaves one out of the label line."""
    return {
        attribute.name: int(rating) if tick else None
        for attribute, tick, rating in zip(attributes, values[::2], values[1::2], strict=True)
    }


def answers(
    player: Player, prompt: str, system: str, settings: list[Setting], sampling: Sampling, stop: threading.Event
) -> Iterator[list[str]]:
    """What the page shows as both answers come: [problem, answer, note, plot of A, the same of B], all texts whole.

    What stands there when `stop` is set stays.
    """
    shown = [["", "", ""] for _ in settings]

    def now(problem: str = "") -> list[str]:
        return [
            f'<div class="problem" role="alert">{html.escape(problem)}</div>' if problem else "",
            *itertools.chain(*shown),
        ]

    yield now()
    for side, setting, parts in zip(SIDES, settings, shown, strict=True):
        try:
            begun, parts[1] = time.monotonic(), _note("answering")
            yield now()
            for piece in player.stream(prompt, system, setting, sampling, stop):
                if isinstance(piece, Answer):
                    parts[0], parts[1] = piece.text, _note(_said(piece, time.monotonic() - begun))
                elif piece:
                    parts[0] += piece
                yield now()
            if stop.is_set():
                parts[1] = _note("stopped")
                yield now()
                return
            if player.judged is not None:
                parts[2] = _rated(player, prompt, system, setting, parts[0])
                yield now()
        except SteerjaxError as error:
            parts[1] = _note("") if parts[1] == _note("answering") else parts[1]
            yield now(f"{side}: {sentence(error)}")
            return


def _rated(player: Player, prompt: str, system: str, setting: Setting, answer: str) -> str:
    """The plot of its ratings, or why it has none: the other side is still asked."""
    try:
        return ratings_plot(player.schema, setting, player.rate(prompt, system, answer), player.judged)
    except DataError as error:
        return _note(f"not rated: {sentence(error)}")


def sentence(error: SteerjaxError) -> str:
    """An error and its cure on one line."""
    return " ".join(str(error).replace("\n  cure:", "; cure:").split())


def _said(answer: Answer, seconds: float) -> str:
    length = f"{answer.tokens} tokens" if answer.tokens is not None else f"{len(answer.text.split())} words"
    return f"{length}, {seconds:.1f} s" + (", cut at the longest answer" if answer.finish == "length" else "")


def _note(text: str) -> str:
    return f'<div class="note">{html.escape(text)}</div>'


def _meaning(attribute: Attribute) -> str:
    """The name, the range, and what raters were asked."""
    meaning = f": {html.escape(attribute.meaning)}" if attribute.meaning else ""
    between = f"{attribute.labels[0]} to {attribute.labels[-1]}"
    return f'<strong>{html.escape(attribute.name)}</strong> <span class="faint">{between}{meaning}</span>'


def _heading(player: Player) -> str:
    about = html.escape(player.target.model) + (f" at {html.escape(player.target.url)}" if player.target.url else "")
    rated = f", rated by {html.escape(player.rated_by)}" if player.judged else ""
    return f'<h1>steerjax playground</h1><div class="note">{about}{rated}</div>'


def _theme(gr):
    """Gradio's own loads a font of Google's."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")


class OnlyHere:
    """ASGI middleware: a policy by which the browser asks no other host, whatever the page names."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sent(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await self.app(scope, receive, sent)
