"""The one way to open a model: a run, a checkpoint, a Hugging Face folder or a hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.bundle.reader import CheckpointReader, is_checkpoint, load_checkpoint
from steerjax.chat.templates import TEMPLATES, Template, get_template
from steerjax.chat.tokenizer import Tokenizer, load_tokenizer
from steerjax.config import MeshConfig
from steerjax.errors import CheckpointError, ConfigError, ModelError
from steerjax.hf.config import read_config
from steerjax.hf.description import ModelDescription
from steerjax.hf.keys import BARE, CLASSIFIER
from steerjax.hf.weights import load_parameters, resolve_source
from steerjax.models.config import LlamaConfig
from steerjax.schema import schema_from_json

if TYPE_CHECKING:
    from flax import linen as nn
    from jax.sharding import Mesh

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class OpenModel:
    """A model that can be run.

    Attributes:
        description: all but the arrays.
        params: in their shards on the mesh, in the dtype of the computation; a reward head is float32.
        model: RewardModel or CausalLM, without frozen layers, whatever training froze.
        mesh: set it (`jax.set_mesh`) around a call.
    """

    description: ModelDescription
    params: dict
    model: nn.Module
    mesh: Mesh


def locate_model(path: str | Path) -> Path:
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


def describe_model(path: str | Path, *, template: str | None = None) -> ModelDescription:
    """Everything about a model but its arrays.

    Args:
        path: a run's folder (its newest checkpoint), `checkpoints/STEP`, a Hugging Face folder, or a hub id.
        template: for a folder that does not say how it was trained.

    Raises:
        SteerjaxError: says what is missing and what cures it.
    """
    folder = locate_model(path)
    return _describe_checkpoint(folder, template) if is_checkpoint(folder) else _describe_folder(folder, path, template)


def _describe_checkpoint(directory: Path, template: str | None) -> ModelDescription:
    provenance = CheckpointReader(directory).provenance
    try:
        settings = provenance["config"]
        system_prompt = settings["chat"]["system_prompt"]
        description = ModelDescription(
            path=directory,
            kind=provenance.get("kind", "reward"),  # checkpoints of before there were chat models
            model=LlamaConfig.from_json(settings["model"]),
            tokenizer=_run_tokenizer(directory, provenance["tokenizer"]),
            template=_template(provenance["template"], template, directory),
            schema=schema_from_json(provenance["attributes"]),
            system_prompt=None if system_prompt == "default" else system_prompt,
            readout=settings["head"]["readout"],
            default_ratings=provenance.get("default_ratings"),
            provenance=provenance | {"step": int(directory.name)} if directory.name.isdigit() else provenance,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{directory}': the provenance lacks {error}; cure: a checkpoint of this version of steerjax"
        ) from error
    _check_vocabulary(description)
    return description


def _run_tokenizer(directory: Path, said: Mapping[str, str]) -> Tokenizer:
    """The copy beside the checkpoints, else where the run had it from; the hash must be the run's."""
    copy = directory.absolute().parent.parent / "tokenizer"
    source = copy if copy.is_dir() else said["source"]
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise ModelError(f"'{directory}': its tokenizer cannot be read. {error}") from None
    if tokenizer.hash != said["sha256"]:
        raise CheckpointError(
            f"'{directory}' was trained with another tokenizer than '{source}' (sha256 {said['sha256']}, there "
            f"{tokenizer.hash}); cure: put the run's own tokenizer into '{copy}'"
        )
    return tokenizer


def _describe_folder(folder: Path, source: str | Path, template: str | None) -> ModelDescription:
    config = read_config(folder)
    about = _about(folder)
    kind = "reward" if config.architecture == CLASSIFIER else "chat"
    if config.architecture == BARE and not config.model.tie_word_embeddings:
        raise ModelError(f"'{folder}' is a {BARE}, which has no head\n  cure: a LlamaForCausalLM")
    schema = schema_from_json(about["attributes"]) if about.get("attributes") else None
    if about.get("kind", kind) != kind or (kind == "reward" and schema and schema.names != config.labels):
        raise ModelError(
            f"'{folder}': steerjax.json and config.json contradict each other "
            f"({about.get('kind')} model, {config.architecture}, labels {', '.join(config.labels) or 'none'})\n"
            "  cure: export again"
        )
    description = ModelDescription(
        path=folder,
        kind=kind,
        model=config.model,
        tokenizer=_folder_tokenizer(folder, about),
        template=_template(about.get("template"), template, folder),
        schema=schema,
        system_prompt=about.get("system_prompt"),
        readout=about.get("readout", "last"),
        default_ratings=about.get("default_ratings"),
        provenance=about.get("provenance") or {"base_model": str(source)},
    )
    _check_vocabulary(description)
    return description


def _about(folder: Path) -> dict:
    """steerjax.json of an export of ours; empty for other folders."""
    file = folder / "steerjax.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{file}' cannot be read ({error})\n  cure: export again") from None


def _folder_tokenizer(folder: Path, about: Mapping) -> Tokenizer:
    """An export of a SentencePiece model holds that too, beside the tokenizer.json for servers; it is the original."""
    original = folder / "tokenizer.model"
    said = ((about.get("provenance") or {}).get("tokenizer") or {}).get("sha256")
    if said and original.is_file():
        tokenizer = load_tokenizer(original)
        if tokenizer.hash == said:
            return tokenizer
    return load_tokenizer(folder)


def _template(own: str | None, asked: str | None, folder: Path) -> Template:
    if own is None and asked is None:
        raise ModelError(
            f"'{folder}' does not say which chat template it was trained with\n"
            f"  cure: --template, one of {', '.join(TEMPLATES)}"
        )
    if own is not None and asked not in (None, own):
        raise ModelError(f"'{folder}' was trained with the template {own}, not {asked}\n  cure: leave --template out")
    return get_template(own or asked)


def _check_vocabulary(description: ModelDescription) -> None:
    size, rows = description.tokenizer.vocab_size, description.model.vocab_size
    if size > rows:
        raise ModelError(
            f"'{description.path}': the tokenizer has {size} tokens and the embedding {rows} rows\n"
            "  cure: the tokenizer that the model came with"
        )


def open_model(
    path: str | Path, mesh_config: MeshConfig | None = None, *, template: str | None = None, dtype: str = "auto"
) -> OpenModel:
    """Description, module and parameters, each process reading only what its devices hold.

    Args:
        path, template: see `describe_model`.
        mesh_config: None puts all devices on the data axis.
        dtype: of the computation: float32, bfloat16, or "auto", bfloat16 on accelerators and float32 on a CPU.

    Raises:
        SteerjaxError: as `describe_model`, or weights that do not fit it.
    """
    import jax

    from steerjax.parallel.mesh import make_mesh

    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; cure: one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    description = describe_model(path, template=template)
    mesh = make_mesh(mesh_config or MeshConfig())
    if is_checkpoint(description.path):
        reader = CheckpointReader(description.path)
        model = build_model(description, mesh, dtype, len(description.schema), "reward_bias" in reader.shapes)
        params = load_checkpoint(reader, abstract_parameters(model, mesh, dtype))
    else:
        config = read_config(description.path)
        model = build_model(description, mesh, dtype, len(config.labels))
        params = load_parameters(description.path, config, abstract_parameters(model, mesh, dtype))
    return OpenModel(description, params, model, mesh)


def build_model(
    description: ModelDescription, mesh: Mesh, dtype: str, num_attributes: int, use_bias: bool = False
) -> nn.Module:
    """The module, set up for inference."""
    import jax
    import jax.numpy as jnp

    from steerjax.models.llama import CausalLM, Compute
    from steerjax.models.reward_head import RewardModel

    on_cpu = jax.default_backend() == "cpu"
    compute = Compute(
        dtype=jnp.dtype(dtype),
        unroll=description.model.num_layers if on_cpu else 1,
        attention="blockwise" if on_cpu and mesh.shape["context"] == 1 else "chunked",
    )
    if description.kind == "chat":
        return CausalLM(description.model, compute)
    return RewardModel(description.model, num_attributes, description.readout, use_bias, compute)


def abstract_parameters(model: nn.Module, mesh: Mesh, dtype: str) -> dict:
    """Shapes, dtypes and shardings of a model's parameters; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    from flax.core import meta

    from steerjax.models.attention.mask import Layout
    from steerjax.models.reward_head import RewardInputs, RewardModel
    from steerjax.parallel.rules import parameter_shardings

    one = jnp.zeros((1, 1), jnp.int32)
    layout = Layout(one, one)
    inputs = (RewardInputs(one, one, layout, one),) if isinstance(model, RewardModel) else (one, one, layout)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def leaf(path, array, sharding):
        kind = array.dtype if path[0].key.startswith("reward") else jnp.dtype(dtype)  # the head computes in float32
        return jax.ShapeDtypeStruct(array.shape, kind, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, meta.unbox(boxed), parameter_shardings(boxed, mesh))
