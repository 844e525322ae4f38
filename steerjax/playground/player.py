"""Who answers: a model of our own, or a server; and a reward model that rates the answers."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from steerjax.api import Model, ServedModel
from steerjax.errors import DataError
from steerjax.inference.steering import Answer, Sampling, Setting
from steerjax.playground.calls import Target, messages_of
from steerjax.schema import Schema, round_rating

_WAITING = 2  # pieces that may lie ready
_GLANCE = 0.2  # seconds between two looks whether the page has left
_SERVED = 8  # answers at once from a server, which batches them


class Player:
    """Answers and rates. Any number of threads may call; the models are used by one at a time.

    A model's work stays in one thread, as JAX keeps the mesh by thread, and a page takes each piece in another.

    Args:
        chat: what `steerjax.load` or `steerjax.connect` gave. reward_model: rates the answers.

    Raises ModelError: a model of the wrong kind.
    """

    def __init__(self, chat: Model | ServedModel, reward_model: Model | None = None):
        for model, kind in ((chat, "chat"), (reward_model, "reward")):
            if isinstance(model, Model):
                model.description.expect(kind)
        self._chat, self._reward_model = chat, reward_model
        self.schema, self.defaults = chat.schema, chat.default_ratings
        self.judged: Schema | None = reward_model.schema if reward_model else None
        self.target = Target(chat.name, chat.url if isinstance(chat, ServedModel) else None)
        self.rated_by = str(reward_model.description.path) if reward_model else None
        self._closed = threading.Event()
        self._models = ThreadPoolExecutor(1, "model")
        self.at_once = _SERVED if self.target.url else 1  # answers
        self._answers = ThreadPoolExecutor(_SERVED, "server") if self.target.url else self._models

    def default_setting(self) -> dict[str, int | None]:
        """The model's default ratings; None for what they leave out; without any, the middle of each range."""
        middle = {a.name: (a.low + a.high) / 2 for a in self.schema.attributes}
        ratings = self.defaults or middle
        return {a.name: round_rating(ratings[a.name], a) if a.name in ratings else None for a in self.schema.attributes}

    def stream(
        self, prompt: str, system: str, setting: Setting, sampling: Sampling, stop: threading.Event
    ) -> Iterator[str | Answer]:
        """Pieces of the answer as they are drawn, then the whole; ends early where `stop` is set.

        Raises SteerjaxError: what cannot be answered.
        """
        if not prompt.strip():
            raise DataError("the prompt is empty", cure="write a question")
        asked = messages_of(prompt, system)
        return streamed(self._answers, lambda: self._chat.pieces(asked, setting, sampling), stop, self._closed)

    def rate(self, prompt: str, system: str, answer: str) -> dict[str, float]:
        """Predicted ratings of an answer. Raises DataError: it is empty, or too long for the reward model."""
        if not answer.strip():
            raise DataError("the answer is empty: there is nothing to rate", cure="ask again, or change a rating")
        return self._models.submit(self._reward_model.rate, messages_of(prompt, system), answer).result()

    def close(self) -> None:
        """Ends what is still being answered."""
        self._closed.set()
        for pool in (self._answers, self._models):
            pool.shutdown(cancel_futures=True)


def streamed(
    pool: ThreadPoolExecutor, pieces: Callable[[], Iterator], stop: threading.Event, closed: threading.Event
) -> Iterator:
    """The items of `pieces()`, which runs in a thread of the pool. What it raises is raised here.

    Both ends leave off where `stop` is set, also by the caller's end, or `closed`.
    """
    ready: queue.Queue = queue.Queue(_WAITING)

    def ended() -> bool:
        return stop.is_set() or closed.is_set()

    def put(*item) -> None:
        while not ended():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=_GLANCE)

    def work() -> None:
        try:
            if ended():
                return
            with contextlib.closing(pieces()) as made:  # in the thread that began it
                for piece in made:
                    put("piece", piece)
                    if ended():
                        return
            put("end", None)
        except BaseException as error:
            put("error", error)

    pool.submit(work)
    try:
        while not ended():
            try:
                kind, value = ready.get(timeout=_GLANCE)
            except queue.Empty:
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    except GeneratorExit:
        stop.set()
        raise
