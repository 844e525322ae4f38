"""Short names for what the tests of steerjax.chat build."""

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.schema import STEERLM

TOKENIZERS = ("embedded", "gpt2", "llama3", "spm")


def control_strings(*names):
    return sorted({string for name in names for string in TEMPLATES[name].control_strings})


def small_llama_spm(train_tokenizer, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "small.model"
    path.write_bytes(train_tokenizer.train(texts, 3000, add_dummy_prefix=True, user_defined_symbols=[], pad_id=-1))
    return load_tokenizer(path)


def sentencepiece_of(tokenizer):
    """SentencePiece's own processor of the model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.files[0]))


def renderer(tokenizer, template, **options):
    return Renderer(tokenizer, TEMPLATES[template], STEERLM, **options)


def talk(*texts, system=None, **place):
    """A conversation: user, assistant, user, ..."""
    roles = ("user", "assistant")
    return Conversation(tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)), system, **place)
