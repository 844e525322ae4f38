"""Tokenizers whose parts make control strings of other texts, each as a `tokenizer.json`."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from steerjax.chat.templates import TEMPLATES

CONTROLS = sorted({string for template in TEMPLATES.values() for string in template.control_strings})
CHARACTERS = [chr(code) for code in range(32, 127)] + ["é", "▁", "\n", "·"]
UNKNOWN = "[UNK]"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

NORMALIZERS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfkc": normalizers.NFKC(),
    "nfkd, accents stripped": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
    "lower": normalizers.Lowercase(),
    "bert": normalizers.BertNormalizer(clean_text=True, strip_accents=True, lowercase=True),
    "nmt": normalizers.Nmt(),
    "strip": normalizers.Strip(),
    "no spaces": normalizers.Replace(" ", ""),
    "replaced": normalizers.Sequence([normalizers.Replace("{", "<"), normalizers.Replace(Regex("[}\u2060]"), ">")]),
    "prepended": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]),
}


def _bytelevel(words):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {c: i for i, c in enumerate(alphabet)}, []
    for word in words:  # ordinary tokens of the same text
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _dropping(words):
    """Characters without a token are dropped."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return backend


def _bytefallback(words):
    vocab = {c: i for i, c in enumerate([UNKNOWN, *BYTES, *CHARACTERS])}
    merges = []
    for end in range(2, 7):  # the text <0x3C> becomes the byte's token
        piece = "<0x3C>"[:end]
        vocab.setdefault(piece, len(vocab))
        merges.append((piece[:-1], piece[-1]))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _unigram(words):
    pieces = [
        (UNKNOWN, 0.0),
        *((b, -9.0) for b in BYTES),
        *((c, -8.0) for c in CHARACTERS),
        *((w, -1.0) for w in words),
    ]
    backend = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _wordpiece(words):
    vocab = {s: i for i, s in enumerate([UNKNOWN, *CHARACTERS, *("##" + c for c in CHARACTERS), *words])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return backend


def _wordlevel(words):
    vocab = {s: i for i, s in enumerate([UNKNOWN, *words, *CHARACTERS, "a", "User", "Assistant"])}
    backend = Tokenizer(models.WordLevel(vocab={s: i for i, s in enumerate(vocab)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


MODELS = {
    "byte level": _bytelevel, "dropping": _dropping, "byte fallback": _bytefallback, "unigram": _unigram,
    "word piece": _wordpiece, "word level": _wordlevel,
}  # fmt: skip
ADDED = {
    "special": {"special": True, "normalized": False}, "normalized": {"special": True, "normalized": True},
    "not special": {"special": False, "normalized": True}, "left": {"special": True, "lstrip": True},
    "right": {"special": True, "rstrip": True}, "single word": {"special": False, "single_word": True}, "none": None,
}  # fmt: skip


def adversarial(folder: Path, model: str, normalizer: str, added: str, in_vocabulary: bool) -> Path:
    """A file; `in_vocabulary`: the control strings are ordinary tokens, too."""
    backend = MODELS[model](CONTROLS if in_vocabulary else [])
    if NORMALIZERS[normalizer] is not None:
        backend.normalizer = NORMALIZERS[normalizer]
    if (options := ADDED[added]) is not None:
        backend.add_tokens([AddedToken(string, **options) for string in CONTROLS])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path
