"""Everything about a model but its arrays: where it lies, and what its folder says."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import pydantic.dataclasses

from steerjax.bundle.reader import is_checkpoint
from steerjax.bundle.verify import checked_folder, checked_step, is_step, newest_sound
from steerjax.chat.source_template import source_template
from steerjax.chat.templates import TEMPLATES, Template, get_template
from steerjax.chat.tokenizer import Tokenizer, load_tokenizer
from steerjax.checksums import LIST, what_is_wrong
from steerjax.errors import CheckpointError, ModelError
from steerjax.hf.adapter import AdapterReader, folder_config, is_adapter
from steerjax.hf.config_json import HuggingFaceConfig
from steerjax.hf.description import About, Description, read_about
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER
from steerjax.hf.weights import resolve_source
from steerjax.models.config import LlamaConfig
from steerjax.schema import Attributes, Schema
from steerjax.typed import STRICT, read_json, typed

EDITION = 2


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TokenizerSource:
    """Where a run had its tokenizer from, and the hash of the file that defines its ids."""

    source: str
    sha256: str


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Provenance:
    """What a checkpoint says about itself (design, decision 13); read again by whoever opens or resumes it."""

    steerjax: str  # version
    kind: Literal["reward", "chat"]
    objectives: tuple[str, ...]  # what was trained
    attributes: Attributes  # the schema
    model: LlamaConfig  # this and the next, and default_ratings: as in `Description`
    template: Template | str
    system_prompt: str | None
    readout: Literal["last", "mean"]
    tokenizer: TokenizerSource
    base_model: str  # where training started from
    data: dict[str, str]  # source -> hash
    config: dict[str, Any]  # the resolved experiment
    rated_attributes: tuple[str, ...] | None = None  # those that had ratings to learn from; of a model that rates
    default_ratings: dict[str, float] | None = None
    accepted: tuple[str, ...] = ()  # changes of data, tokenizer or source between two starts that the user accepted
    source_checksum: str = ""  # of the source model's files, `checksums.folder_checksum`
    checksums: bool = False  # the checkpoint has a list of them (`bundle.verify`); without it, it is damaged
    edition: Literal[2] = EDITION  # of the checkpoint's form


def read_provenance(directory: Path) -> Provenance:
    """Of `checkpoints/STEP`. Raises CheckpointError: a run of another edition, or a broken file."""
    file, cure = directory / "provenance" / "metadata", "another step of the run"
    try:
        edition = json.loads(file.read_text(encoding="utf-8")).get("edition", 1)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"'{file}' is broken ({error})\n  cure: {cure}") from None
    if edition != EDITION:
        said = f"'{directory}' is a run of edition {edition} of steerjax, and this is edition {EDITION}"
        raise CheckpointError(f"{said}\n  cure: train again, or export it with the version that trained it")
    return read_json(Provenance, file, CheckpointError, cure)


def locate(path: str | Path, *, verify: bool = True) -> Path:
    """The folder that a user means: `checkpoints/STEP` of a run (the newest, given the run), or a Hugging Face folder.

    It is what was written, unless `verify` is False (`bundle.verify`); of a run the newest checkpoint that is. Raises
    ModelError, CheckpointError: damage, or nothing of the kind there; says what was looked for.
    """
    folder = Path(os.path.expanduser(path))
    if not os.path.exists(folder):
        return checked_folder(resolve_source(str(path)), verify)
    if is_checkpoint(folder) or (is_step(folder) and folder.absolute().parent.name == "checkpoints"):
        return checked_step(folder, verify)
    for checkpoints in (folder / "checkpoints", folder):
        if newest := newest_sound(checkpoints, verify):
            return newest
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"the run '{folder}' has no whole checkpoint yet; cure: let it train to its first one")
    if (folder / "config.json").is_file() or is_adapter(folder):
        return checked_folder(folder, verify)
    if any(folder.glob("*.safetensors")):
        raise ModelError(f"'{folder}' has no config.json\n  cure: give a whole Hugging Face folder")
    said = f"'{folder}' is neither a run (checkpoints/STEP) nor a Hugging Face folder (config.json)"
    raise ModelError(f"{said}\n  cure: give --workdir of a training, one of its checkpoints, or a model's folder")


def describe(path: str | Path, *, template: str | None = None, verify: bool = True) -> Description:
    """Everything about a model but its arrays.

    `path` is a run's folder (its newest checkpoint), `checkpoints/STEP`, a Hugging Face folder or a hub id. `template`
    is for a folder that does not say how it was trained; "source" is what it says, else its tokenizer's own.
    `verify`: as `locate`.
    Raises SteerjaxError: what is missing and what cures it.
    """
    folder = locate(path, verify=verify)
    if is_checkpoint(folder):
        said = read_provenance(folder)
        model, tokenizer, schema = said.model, _run_tokenizer(folder, said.tokenizer), Schema(said.attributes)
        history = dataclasses.asdict(said) | ({"step": int(folder.name)} if folder.name.isdigit() else {})
    else:
        config = folder_config(folder)
        said = _about(folder, config, template)
        model, tokenizer, schema = config.model, _folder_tokenizer(folder, said), said.schema
        history = said.provenance or {"base_model": str(path)}
    name = said.template if isinstance(said.template, str) else said.template.name
    if template not in (None, "source", name):
        known = f"'{folder}' was trained with the template {name}, not {template}"
        raise ModelError(f"{known}\n  cure: leave --template out")
    if tokenizer.vocab_size > model.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {model.vocab_size} rows"
        raise ModelError(f"'{folder}': {sizes}\n  cure: the tokenizer that the model came with")
    return Description(
        path=folder,
        kind=said.kind,
        model=model,
        tokenizer=tokenizer,
        template=source_template(folder, tokenizer) if said.template == "source" else get_template(said.template),
        schema=schema,
        system_prompt=said.system_prompt,
        readout=said.readout,
        default_ratings=said.default_ratings,
        provenance=history,
    )


def _run_tokenizer(directory: Path, said: TokenizerSource) -> Tokenizer:
    """The copy beside the checkpoints, else where the run had it from; the hash must be the run's."""
    copy = directory.absolute().parent.parent / "tokenizer"
    source = copy if copy.is_dir() else said.source
    if (copy / LIST).exists() and (problem := what_is_wrong(copy)):
        cure = "the command that trained the run, which writes it anew; or delete it, where the source is still there"
        raise CheckpointError(f"'{copy}' is damaged: {problem}\n  cure: {cure}")
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise ModelError(f"'{directory}': its tokenizer cannot be read. {error}") from None
    if tokenizer.hash != said.sha256:
        other = f"'{directory}' was trained with another tokenizer than '{source}'"
        hashes = f"(sha256 {said.sha256}, there {tokenizer.hash})"
        raise CheckpointError(f"{other} {hashes}; cure: put the run's own tokenizer into '{copy}'")
    return tokenizer


def _about(folder: Path, config: HuggingFaceConfig, template: str | None) -> About:
    """What a Hugging Face folder says, or what follows from its config.json."""
    kind = "reward" if config.architecture == CLASSIFIER else "chat"
    if config.architecture == BARE and not config.model.tie_word_embeddings:
        raise ModelError(f"'{folder}' is a {BARE}, which has no head\n  cure: a LlamaForCausalLM")
    said = read_about(folder) or (template and About(kind, template))
    if not said:
        cure = f"--template, one of {', '.join(TEMPLATES)}, or source, its tokenizer's own"
        raise ModelError(f"'{folder}' does not say which chat template it was trained with\n  cure: {cure}")
    first_logit = config.architecture == CAUSAL_LM and said.kind == "reward" and said.schema and len(said.schema) == 1
    if first_logit:  # Nemotron's reward models: the logit of token 0 where the response ends
        return said
    if said.kind != kind or (kind == "reward" and said.schema and said.schema.names != config.labels):
        facts = f"{said.kind} model, {config.architecture}, labels {', '.join(config.labels) or 'none'}"
        wrong = f"steerjax.json and config.json contradict each other ({facts})"
        raise ModelError(f"'{folder}': {wrong}\n  cure: export again")
    return said


def _folder_tokenizer(folder: Path, said: About) -> Tokenizer:
    """An export of a SentencePiece model holds that too, beside the tokenizer.json for servers; it is the original."""
    original = folder / "tokenizer.model"
    if "tokenizer" in said.provenance and original.is_file():
        tokenizer, where = load_tokenizer(original), f"{folder / 'steerjax.json'}: provenance.tokenizer"
        if tokenizer.hash == typed(TokenizerSource, said.provenance["tokenizer"], where, ModelError).sha256:
            return tokenizer
    alone = is_adapter(folder) and not any(folder.glob("tokenizer.*"))
    return load_tokenizer(AdapterReader(folder).base if alone else folder)


def output_names(about: Description) -> tuple[str, ...]:
    """What the outputs of a reward model's head are called, in order; () for a chat model."""
    if about.kind != "reward":
        return ()
    return about.schema.names if about.schema else folder_config(about.path).labels
