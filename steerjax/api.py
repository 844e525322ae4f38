"""The Python interface: `load`, `connect`, `recipe`, `fit`. Nothing here imports jax before it is called."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerjax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from steerjax.bundle import Bundle
    from steerjax.hf.description import Description
    from steerjax.inference.answerer import Answerer
    from steerjax.inference.steering import Answer, Sampling
    from steerjax.schema import Schema

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Prompt = str | Sequence[Message]
Ratings = dict[str, float]


def load(
    path: str | Path, *, template: str | None = None, schema: str | None = None, mesh: str = "", dtype: str = "auto",
    verify: bool = True,
) -> Model:  # fmt: skip
    """Opens a run, a checkpoint, a Hugging Face folder or a hub id.

    Args:
        template: for a folder that does not say which chat template it was trained with: extra_id, chatml, llama3,
            llama2, or source for the model's own.
        schema: of a chat model that names no attributes: helpsteer, oasst or steerlm (which it is without).
        mesh: how the parameters lie on the devices, as `fsdp=2,tensor=4`; all devices on the data axis where empty.
        dtype: of the computation: float32, bfloat16, or auto (float32 on a CPU, bfloat16 elsewhere).
        verify: compare a checkpoint or an export with its checksums.

    Raises SteerjaxError: nothing to open there, or damage; says what cures it.
    """
    from steerjax.bundle import open_bundle
    from steerjax.parallel.mesh import parse_mesh

    return Model(open_bundle(path, parse_mesh(mesh), template=template, dtype=dtype, verify=verify), schema)


def connect(
    url: str, *, model: str | None = None, like: str | Path | None = None, template: str | None = None,
    schema: str | None = None, attempts: int = 8,
) -> ServedModel:  # fmt: skip
    """A chat model that an OpenAI-compatible server (vLLM, SGLang) has: `http://localhost:8000`.

    Args:
        model: the served name; where the server has one model, that.
        like: the exported folder that it serves, for the names and ranges of its attributes; without it they are those
            of `schema` (helpsteer, oasst, or steerlm, the default), and the server says which it takes.
        template: of the served model, where `like` does not say it.
        attempts: tries of a request, with growing pauses.

    Raises SteerjaxError: no server there, or no such folder.
    """
    from steerjax.bundle import describe
    from steerjax.inference.answerer import of_server

    about = describe(like, template=template) if like else None
    return ServedModel(of_server(url, model, about, schema=schema, template=template, attempts=attempts))


def recipe(name: str) -> ConfigDict:
    """The config of a recipe, to change and give to `fit`.

    Args:
        name: of one that comes with the package, as `rm`; or the path of a Python file with `get_config()`.

    Raises SteerjaxError: neither.
    """
    from steerjax.flags import find_recipe

    found = runpy.run_path(find_recipe(name))
    if "get_config" not in found:
        raise ConfigError(f"{name}: no recipe; cure: a Python file with get_config(), as {find_recipe('rm')}")
    return found["get_config"]()


def fit(config: Mapping | Any, workdir: str | Path) -> dict[str, Mapping[str, float | None]]:
    """Trains a model, as `steerjax train`; run again with the same workdir, it resumes.

    Args:
        config: what `recipe` or a recipe's `get_config()` returns, or `steerjax.config.default_config()`, with changes.
        workdir: the run's folder; `load` opens it.

    Returns:
        Of each objective the metrics on the validation split at the end, by name; None where one is undefined.

    Raises SteerjaxError: bad config or data, a workdir of another experiment, gradients that stay non-finite.
    """
    from steerjax.config import resolve
    from steerjax.flags import local_folder
    from steerjax.training.train import train

    experiment = resolve(config.to_dict() if hasattr(config, "to_dict") else config)
    return {name: found.values for name, found in train(experiment, local_folder(str(workdir))).items()}


class _Chat:
    """What writes answers: a model of our own or a server's."""

    _answerer: Answerer

    @property
    def name(self) -> str:
        """The folder, or the name that the server knows."""
        return self._answerer.backend.model

    @property
    def attributes_known(self) -> bool:
        """Whether the model says what it takes, or a `schema` was given; else `schema` has the papers' attributes."""
        return self._answerer.known

    @property
    def default_ratings(self) -> Mapping[str, float] | None:
        """Those of the label line without `attributes`; None where there are none, or a server's are not known."""
        return self._answerer.defaults

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        attributes: Mapping[str, float | None] | None = None,
        *,
        samples: int = 1,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        max_new_tokens: int = 512,
        batch_size: int = 8,
    ) -> Any:
        """Answers to one prompt, or to each of a list.

        Args:
            prompt: a text, or messages (`{"role": ..., "content": ...}`) that end with the user's; or a list of these.
            attributes: the ratings that are asked for, over the model's defaults; None leaves an attribute out.
            samples: answers to each prompt.
            temperature: 0 takes the likeliest token; without one it is 0, or 1 where something asks to sample.
            seed: the same seed and prompt give the same text, whatever the batch.
            batch_size: answers that are decoded together.

        Returns:
            A text; with several `samples` a list of texts; of a list of prompts a list of either.

        Raises SteerjaxError: an unknown attribute, a rating outside its range, a prompt that leaves no room.
        """
        if samples < 1 or batch_size < 1 or (samples > 1 and temperature == 0):
            cure = "at least 1 of each, and a temperature above 0 for several samples"
            raise ConfigError(f"samples {samples}, batch_size {batch_size}, temperature {temperature}; cure: {cure}")
        sampling = _sampling(temperature, top_k, top_p, seed, max_new_tokens, samples)
        backend, setting = self._answerer.backend.drawing(sampling, batch_size), self._setting(attributes)
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
        requests = [backend.prepare(conversation_of(p), [setting], samples) for p in ([prompt] if one else prompt)]
        found = [[answer.text for answer in answers] for answers in backend.run(requests)] if requests else []
        found = [answers[0] for answers in found] if samples == 1 else found
        return found[0] if one else found

    def stream(
        self, prompt: Prompt, attributes: Mapping[str, float | None] | None = None, *, temperature: float | None = None,
        top_k: int = 0, top_p: float = 1.0, seed: int = 0, max_new_tokens: int = 512,
    ) -> Iterator[str]:  # fmt: skip
        """The pieces of one answer as they are written; together they are what `generate` returns."""
        for piece in self.pieces(prompt, attributes, _sampling(temperature, top_k, top_p, seed, max_new_tokens, 1)):
            if isinstance(piece, str) and piece:
                yield piece

    def pieces(
        self, prompt: Prompt, attributes: Mapping[str, float | None] | None, sampling: Sampling
    ) -> Iterator[str | Answer]:
        """Pieces of one answer as `stream` has them, then the whole `Answer`: its text, tokens, whether it was cut."""
        backend = self._answerer.backend.drawing(sampling, 1)
        yield from backend.stream(backend.prepare(conversation_of(prompt), [self._setting(attributes)], 1))

    def _setting(self, attributes: Mapping[str, float | None] | None) -> dict[str, int | None]:
        from steerjax.schema import check_rating, round_rating

        found = {}
        for name, value in (attributes or {}).items():
            attribute = self.schema[name]
            found[name] = None if value is None else round_rating(check_rating(value, attribute), attribute)
        return found


class Model(_Chat):
    """An opened model. `load` makes one.

    Attributes:
        kind: "reward", which has `rate`, or "chat", which has `generate` and `stream`, and `rate` where the model has
            learnt to (`attribute_lm`).
        schema: its attributes in order, each with name, low, high and meaning.
        description: all else that is known of it.
    """

    def __init__(self, bundle: Bundle, schema: str | None = None):
        self._bundle, self._preset = bundle, schema
        self.description: Description = bundle.description
        self.kind = self.description.kind
        self.schema: Schema = (self._scorer if self.kind == "reward" else self._answerer).schema

    def __repr__(self) -> str:
        return f"<steerjax {self.kind} model '{self.description.path}': {', '.join(self.schema.names)}>"

    @functools.cached_property
    def _answerer(self) -> Answerer:
        from steerjax.inference.answerer import of_bundle

        return of_bundle(self._bundle, self._preset)

    @functools.cached_property
    def _scorer(self):
        from steerjax.inference.scorer import Scorer

        return Scorer(self._bundle)

    def rate(self, prompt: Prompt, responses: str | Sequence[str]) -> Ratings | list[Ratings]:
        """Predicted ratings of responses to a prompt; what they share is computed once.

        Args:
            prompt: a text, or messages before the response (`{"role": ..., "content": ...}`).

        Returns:
            Of one response its ratings by attribute; of a list, a list.

        Raises SteerjaxError: a chat model that has not learnt to rate, or a response that is too long with its prompt.
        """
        from steerjax.data.loading import Skipped
        from steerjax.inference.scorer import predicted_ratings

        one = isinstance(responses, str)
        asked = conversation_of(prompt)
        each = [answered(asked, text) for text in ([responses] if one else responses)]
        found = predicted_ratings(self._scorer, each, [len(c.turns) - 1 for c in each], skip=False)
        for refused in (one for one in found if isinstance(one, Skipped)):
            raise DataError(f"cannot be rated: {refused.reason}", "responses", "a shorter prompt or response")
        return found[0] if one else found


class ServedModel(_Chat):
    """A chat model that a server has. `connect` makes one."""

    kind = "chat"

    def __init__(self, answerer: Answerer):
        self._answerer = answerer
        self.url, self.schema = answerer.backend.url, answerer.schema

    def __repr__(self) -> str:
        return f"<steerjax chat model '{self.name}' at {self.url}: {', '.join(self.schema.names)}>"


def conversation_of(prompt: Prompt):
    """The conversation that a text or messages begin. Raises DataError, which names the message."""
    from steerjax.data.conversation import Conversation, Turn
    from steerjax.data.formats import check_turns

    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = []
    for place, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"no message: {message!r:.80}", f"[{place}]", 'use {"role": ..., "content": ...}')
        if not isinstance(message["content"], str):
            raise DataError("no text", f"[{place}].content", "give a text")
        turns.append(Turn(message["role"], message["content"]))
    check_turns(turns, "prompt")
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if not turns or turns[-1].role != "user":
        raise DataError("no user turn at the end", "prompt", "end it with what the user says")
    return Conversation(tuple(turns), system)


def answered(conversation, text: str):
    """The conversation with a response."""
    from steerjax.data.conversation import Turn

    return dataclasses.replace(conversation, turns=(*conversation.turns, Turn("assistant", text)))


def _sampling(
    temperature: float | None, top_k: int, top_p: float, seed: int, max_new_tokens: int, samples: int
) -> Sampling:
    from steerjax.inference.steering import make_sampling

    asked = {"top_k": top_k, "top_p": top_p, "seed": seed, "max_new_tokens": max_new_tokens}
    return make_sampling(temperature, samples, "sampling", **asked)
