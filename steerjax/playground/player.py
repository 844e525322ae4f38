"""Who answers: a model of our own, or a server; and a reward model that rates the answers."""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from steerjax.bundle.describe import describe
from steerjax.chat.templates import get_template
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.inference.steering import Answer, Sampling, Setting
from steerjax.playground.calls import Target
from steerjax.schema import SCHEMAS, Schema, round_rating

_WAITING = 2  # pieces that may lie ready
_PATIENCE = 5.0  # seconds that a piece may lie there: Gradio does not close the generator of one who pressed Stop
_SERVED = 8  # answers at once from a server, which batches them


class Player:
    """Answers and rates. Any number of threads may call; the models are used by one at a time.

    A model's work stays in one thread, as JAX keeps the mesh by thread, and a page takes each piece in another.

    Args:
        model: a chat model; with `server` (URL) that answers, and the model only says what it knows.
        reward_model: rates the answers. schema: the preset of a chat model that names none.

    Raises SteerjaxError: a model of the wrong kind, no schema, no server there.
    """

    def __init__(
        self, model: str | None, *, server: str | None = None, server_model: str | None = None,
        reward_model: str | None = None, schema: str | None = None, template: str | None = None, mesh: str = "",
        dtype: str = "auto",
    ):  # fmt: skip
        about = describe(model, template=template) if model else None
        if about and about.kind != "chat":
            raise ModelError(f"'{model}' is a {about.kind} model, which writes no text\n  cure: give a chat model")
        own = about.schema if about else None
        if own is None and schema is None:
            who = f"'{model}' does not" if about else "a server does not"
            cure = "--schema" if about else "--model, the folder that it serves, or --schema"
            raise ModelError(f"{who} say which attributes it takes\n  cure: {cure}, e.g. --schema helpsteer")
        self.schema: Schema = own or SCHEMAS[schema]
        self.defaults: Mapping[str, float] | None = about.default_ratings if about else None
        self.judged: Schema | None = None
        self._closed = threading.Event()
        self._models = ThreadPoolExecutor(1, "model")
        self.at_once = _SERVED if server else 1  # answers
        self._answers = ThreadPoolExecutor(_SERVED, "server") if server else self._models
        if server:
            from steerjax.inference.server import Server

            known = about.template if about else get_template(template) if template else None
            self._backend = functools.lru_cache(4)(
                lambda sampling: Server(server, self.target.model, self.schema, sampling, template=known, attempts=2)
            )
            first = Server(server, server_model, self.schema, Sampling(), template=known, attempts=2)
            self.target = Target(first.model, first.url)
        else:
            from steerjax.inference.engine import Engine

            bundle = _open(model, mesh, template, dtype)
            self._backend = functools.lru_cache(4)(lambda sampling: Engine(bundle, self.schema, sampling, 1))
            self.target = Target(str(model))
        if reward_model:
            from steerjax.inference.scorer import Scorer

            self._scorer = Scorer(_open(reward_model, mesh, None, dtype))
            self.judged = self._scorer.schema
        self.reward_model = reward_model

    def default_setting(self) -> dict[str, int | None]:
        """The model's default ratings; None for what they leave out; without any, the middle of each range."""
        middle = {a.name: (a.low + a.high) / 2 for a in self.schema.attributes}
        ratings = self.defaults or middle
        return {a.name: round_rating(ratings[a.name], a) if a.name in ratings else None for a in self.schema.attributes}

    def stream(self, prompt: str, system: str, setting: Setting, sampling: Sampling) -> Iterator[str | Answer]:
        """Pieces of the answer as they are drawn, then the whole. Raises SteerjaxError: what cannot be answered."""
        conversation = _conversation(prompt, system)

        def pieces() -> Iterator[str | Answer]:
            backend = self._backend(sampling)
            yield from backend.stream(backend.prepare(conversation, [setting], 1))

        return streamed(self._answers, pieces, self._closed)

    def rate(self, prompt: str, system: str, answer: str) -> dict[str, float]:
        """Predicted ratings of an answer. Raises DataError: it is empty, or too long for the reward model."""
        if not answer.strip():
            raise DataError(
                "the answer is empty, so that there is nothing to rate", cure="ask again, or change a rating"
            )
        from steerjax.inference.scorer import predict, predicted_keys

        asked = _conversation(prompt, system)
        whole = Conversation((*asked.turns, Turn("assistant", answer)), asked.system)

        def rated() -> dict[str, float]:
            _, predicted, skipped = predict(self._scorer, [whole], [[len(whole.turns) - 1]], skip=True)
            if skipped:
                raise DataError(f"the reward model cannot rate this: {skipped[0].reason}", cure="a shorter answer")
            return predicted_keys(predicted[0], self.judged)["predicted_ratings"]

        return self._models.submit(rated).result()

    def close(self) -> None:
        """Ends what is still being answered."""
        self._closed.set()
        for pool in (self._answers, self._models):
            pool.shutdown(cancel_futures=True)


def streamed(pool: ThreadPoolExecutor, pieces: Callable[[], Iterator], closed: threading.Event) -> Iterator:
    """The items of `pieces()`, which runs in a thread of the pool; ends early where the caller does, or `closed`.

    What it raises is raised here.
    """
    ready: queue.Queue = queue.Queue(_WAITING)
    left = threading.Event()

    def put(item: tuple) -> bool:
        last = time.monotonic() + _PATIENCE
        while not (left.is_set() or closed.is_set() or time.monotonic() > last):
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        left.set()
        return False

    def work() -> None:
        try:
            if left.is_set():
                return
            with contextlib.closing(pieces()) as made:  # in the thread that began it
                for piece in made:
                    if not put(("piece", piece)):
                        return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    pool.submit(work)
    try:
        while True:
            try:
                kind, value = ready.get(timeout=1)
            except queue.Empty:
                if closed.is_set():
                    return
                if left.is_set():  # the page came back after the model had given it up
                    said = f"the answer ends here, as the page took none of it for {_PATIENCE:.0f} seconds"
                    raise DataError(said, cure="ask again") from None
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        left.set()


def _conversation(prompt: str, system: str) -> Conversation:
    if not prompt.strip():
        raise DataError("the prompt is empty", cure="write a question")
    return Conversation((Turn("user", prompt),), system or None)


def _open(folder: str, mesh: str, template: str | None, dtype: str):
    from steerjax.bundle import open_bundle
    from steerjax.parallel.mesh import parse_mesh

    return open_bundle(folder, parse_mesh(mesh), template=template, dtype=dtype)
