"""Everything about a model but its arrays: where it lies, and what its folder says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from steerjax.bundle.provenance import TokenizerSource, read_provenance
from steerjax.bundle.reader import is_checkpoint
from steerjax.chat.templates import TEMPLATES, get_template
from steerjax.chat.tokenizer import Tokenizer, load_tokenizer
from steerjax.errors import CheckpointError, ModelError
from steerjax.hf.config_json import read_config
from steerjax.hf.description import About, Description, read_about
from steerjax.hf.keys import BARE, CLASSIFIER
from steerjax.hf.weights import resolve_source
from steerjax.schema import Schema
from steerjax.typed import typed


def locate(path: str | Path) -> Path:
    """The folder that a user means: `checkpoints/STEP` of a run (the newest, given the run), or a Hugging Face folder.

    Raises:
        ModelError, CheckpointError: nothing of the kind there; says what was looked for.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return resolve_source(str(path))
    if is_checkpoint(folder):
        return folder
    for checkpoints in (folder / "checkpoints", folder):
        steps = [step for step in checkpoints.glob("*") if step.name.isdigit() and is_checkpoint(step)]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"the run '{folder}' has no whole checkpoint yet; cure: let it train to its first one")
    if (folder / "config.json").is_file():
        return folder
    if any(folder.glob("*.safetensors")):
        raise ModelError(f"'{folder}' has no config.json\n  cure: give a whole Hugging Face folder")
    raise ModelError(
        f"'{folder}' is neither a run (checkpoints/STEP) nor a Hugging Face folder (config.json)\n"
        "  cure: give --workdir of a training, one of its checkpoints, or a model's folder"
    )


def describe(path: str | Path, *, template: str | None = None) -> Description:
    """Everything about a model but its arrays.

    Args:
        path: a run's folder (its newest checkpoint), `checkpoints/STEP`, a Hugging Face folder, or a hub id.
        template: for a folder that does not say how it was trained.

    Raises:
        SteerjaxError: says what is missing and what cures it.
    """
    folder = locate(path)
    found = _describe_checkpoint(folder) if is_checkpoint(folder) else _describe_folder(folder, path, template)
    if template not in (None, found.template.name):
        raise ModelError(
            f"'{folder}' was trained with the template {found.template.name}, not {template}\n"
            "  cure: leave --template out"
        )
    size, rows = found.tokenizer.vocab_size, found.model.vocab_size
    if size > rows:
        raise ModelError(
            f"'{folder}': the tokenizer has {size} tokens and the embedding {rows} rows\n"
            "  cure: the tokenizer that the model came with"
        )
    return found


def _describe_checkpoint(directory: Path) -> Description:
    said = read_provenance(directory)
    return Description(
        path=directory,
        kind=said.kind,
        model=said.model,
        tokenizer=_run_tokenizer(directory, said.tokenizer),
        template=get_template(said.template),
        schema=Schema(said.attributes),
        system_prompt=said.system_prompt,
        readout=said.readout,
        default_ratings=said.default_ratings,
        provenance=dataclasses.asdict(said) | ({"step": int(directory.name)} if directory.name.isdigit() else {}),
    )


def _run_tokenizer(directory: Path, said: TokenizerSource) -> Tokenizer:
    """The copy beside the checkpoints, else where the run had it from; the hash must be the run's."""
    copy = directory.absolute().parent.parent / "tokenizer"
    source = copy if copy.is_dir() else said.source
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise ModelError(f"'{directory}': its tokenizer cannot be read. {error}") from None
    if tokenizer.hash != said.sha256:
        raise CheckpointError(
            f"'{directory}' was trained with another tokenizer than '{source}' (sha256 {said.sha256}, there "
            f"{tokenizer.hash}); cure: put the run's own tokenizer into '{copy}'"
        )
    return tokenizer


def _describe_folder(folder: Path, source: str | Path, template: str | None) -> Description:
    config, said = read_config(folder), read_about(folder)
    kind = "reward" if config.architecture == CLASSIFIER else "chat"
    if config.architecture == BARE and not config.model.tie_word_embeddings:
        raise ModelError(f"'{folder}' is a {BARE}, which has no head\n  cure: a LlamaForCausalLM")
    if said is None:
        if template is None:
            raise ModelError(
                f"'{folder}' does not say which chat template it was trained with\n"
                f"  cure: --template, one of {', '.join(TEMPLATES)}"
            )
        said = About(kind, template)
    if said.kind != kind or (kind == "reward" and said.schema and said.schema.names != config.labels):
        raise ModelError(
            f"'{folder}': steerjax.json and config.json contradict each other "
            f"({said.kind} model, {config.architecture}, labels {', '.join(config.labels) or 'none'})\n"
            "  cure: export again"
        )
    return Description(
        path=folder,
        kind=kind,
        model=config.model,
        tokenizer=_folder_tokenizer(folder, said),
        template=get_template(said.template),
        schema=said.schema,
        system_prompt=said.system_prompt,
        readout=said.readout,
        default_ratings=said.default_ratings,
        provenance=said.provenance or {"base_model": str(source)},
    )


def _folder_tokenizer(folder: Path, said: About) -> Tokenizer:
    """An export of a SentencePiece model holds that too, beside the tokenizer.json for servers; it is the original."""
    original = folder / "tokenizer.model"
    if "tokenizer" in said.provenance and original.is_file():
        tokenizer = load_tokenizer(original)
        where = f"{folder / 'steerjax.json'}: provenance.tokenizer"
        if tokenizer.hash == typed(TokenizerSource, said.provenance["tokenizer"], where, ModelError).sha256:
            return tokenizer
    return load_tokenizer(folder)


def output_names(about: Description) -> tuple[str, ...]:
    """What the outputs of a reward model's head are called, in order; () for a chat model."""
    if about.kind != "reward":
        return ()
    return about.schema.names if about.schema else read_config(about.path).labels
