"""Every token that SFT trains, written out: the response and its end; not the header, the names or the label line.

Source of the rule: NeMo `gpt_sft_chat_dataset.py`.
"""

import numpy as np
import pytest
from chat_helpers import renderer, talk

from steerjax.chat.render import TokenRole
from steerjax.data.conversation import Conversation, Turn
from tests import needs_shared

# Three exchanges: with a label, with a response that looks like one, with a label again.
TALK = Conversation(
    (
        Turn("user", "Hi"),
        Turn("assistant", "Hello there.\n\nHow are you?", {"quality": 4, "verbosity": 1}),
        Turn("user", "quality:4,verbosity:0"),
        Turn("assistant", "quality:4\nno"),
        Turn("user", "Last"),
        Turn("assistant", "Bye!", {"helpfulness": 0}),
    ),
    system="SYS",
)
# template -> the text between the trained runs.
MASKED = {
    "extra_id": [
        "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4,verbosity:1\n",
        "User\nquality:4,verbosity:0\n<extra_id_1>Assistant\n",
        "User\nLast\n<extra_id_1>Assistant\n<extra_id_2>helpfulness:0\n",
    ],
    "chatml": [
        "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<|attributes|>quality:4,verbosity:1\n",
        "\n<|im_start|>user\nquality:4,verbosity:0<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nLast<|im_end|>\n<|im_start|>assistant\n<|attributes|>helpfulness:0\n",
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|attributes|>quality:4,verbosity:1\n",
        "<|start_header_id|>user<|end_header_id|>\n\nquality:4,verbosity:0<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>user<|end_header_id|>\n\nLast<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|attributes|>helpfulness:0\n",
    ],
    "llama2": [
        "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nHi [/INST] <|attributes|>quality:4,verbosity:1\n",
        "<s>[INST] quality:4,verbosity:0 [/INST]",
        "<s>[INST] Last [/INST] <|attributes|>helpfulness:0\n",
    ],
}
# template -> the trained pieces of each exchange; in the embedded tokenizer Llama 3's <|eot_id|> is eight pieces.
EOT = ["<", "<0x7C>", "e", "ot", "_", "id", "<0x7C>", ">"]
EMBEDDED = {
    "extra_id": [
        ["H", "el", "lo", "▁there", ".", "\n", "\n", "How", "▁are", "▁you", "?", "\n", "<extra_id_1>"],
        ["qu", "ality", ":", "4", "\n", "n", "o", "\n", "<extra_id_1>"],
        ["B", "ye", "!", "\n", "<extra_id_1>"],
    ],
    "chatml": [
        ["H", "el", "lo", "▁there", ".", "\n", "\n", "How", "▁are", "▁you", "?", "<|im_end|>"],
        ["qu", "ality", ":", "4", "\n", "n", "o", "<|im_end|>"],
        ["B", "ye", "!", "<|im_end|>"],
    ],
    "llama3": [
        ["H", "el", "lo", "▁there", ".", "\n", "\n", "How", "▁are", "▁you", "?", *EOT],
        ["qu", "ality", ":", "4", "\n", "n", "o", *EOT],
        ["B", "ye", "!", *EOT],
    ],
    "llama2": [
        ["H", "el", "lo", "▁there", ".", "\n", "\n", "How", "▁are", "▁you", "?", "▁", "</s>"],
        ["▁quality", ":", "4", "\n", "n", "o", "▁", "</s>"],
        ["B", "ye", "!", "▁", "</s>"],
    ],
}
SMOLLM2_CHATML = [
    ["Hello", "Ġthere", ".", "Ċ", "Ċ", "How", "Ġare", "Ġyou", "?", "<|im_end|>"],
    ["quality", ":", "4", "Ċ", "no", "<|im_end|>"],
    ["By", "e", "!", "<|im_end|>"],
]
MISTRAL_LLAMA2 = [
    ["Hello", "▁there", ".", "<0x0A>", "<0x0A>", "How", "▁are", "▁you", "?", "▁", "</s>"],
    ["▁quality", ":", "4", "<0x0A>", "no", "▁", "</s>"],
    ["By", "e", "!", "▁", "</s>"],
]


def runs(conversation, tokenizer, template):
    """(masked text, trained pieces) of each exchange."""
    rendered = renderer(tokenizer, template).render(conversation, [turn.ratings for turn in conversation.turns])
    stop = rendered.responses[-1].stop
    trained = np.isin(rendered.roles[:stop], (TokenRole.RESPONSE, TokenRole.END))
    edges = np.flatnonzero(np.diff(trained)) + 1  # masked, trained, masked, ..., trained
    parts = np.split(rendered.tokens[:stop], edges)
    masked = [tokenizer.decode(part, continuation=number > 0) for number, part in enumerate(parts[::2])]
    return masked, [[tokenizer.backend.id_to_token(int(index)) for index in part] for part in parts[1::2]]


@pytest.mark.short
@pytest.mark.parametrize("template", EMBEDDED)
def test_every_trained_token(embedded, template):
    assert runs(TALK, embedded, template) == (MASKED[template], EMBEDDED[template])


@pytest.mark.smollm2
def test_every_trained_token_of_smollm2(smollm2):
    if smollm2.vocab_size != 49152:
        pytest.skip("STEERJAX_SMOLLM2 names no folder (shared/tools/get_smollm2.py makes one)")
    assert runs(TALK, smollm2, "chatml") == (MASKED["chatml"], SMOLLM2_CHATML)


def test_every_trained_token_of_a_llama2_tokenizer(llama_spm):
    needs_shared("data/tokenizers/mistral_v1.model")  # else `llama_spm` is a small one
    assert runs(TALK, llama_spm, "llama2") == (MASKED["llama2"], MISTRAL_LLAMA2)


def test_one_end_of_turn_token_is_trained_where_the_tokenizer_has_it(llama3_like):
    _, trained = runs(TALK, llama3_like, "llama3")
    assert [pieces[-1] for pieces in trained] == ["<|eot_id|>"] * 3


@pytest.mark.short
def test_the_references_example(embedded):
    """The markers are single tokens here, as in the reference's own tokenizer."""
    ratings = [None, {"quality": 4}, None, {"quality": 2}]
    plain = talk("Hi", "Yo", "More", "OK", system="SYS")
    turns = (Turn(turn.role, turn.content, rated) for turn, rated in zip(plain.turns, ratings, strict=True))
    masked, trained = runs(Conversation(tuple(turns), "SYS"), embedded, "extra_id")
    assert masked == [
        "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4\n",
        "User\nMore\n<extra_id_1>Assistant\n<extra_id_2>quality:2\n",
    ]
    assert ["".join(pieces) for pieces in trained] == ["Yo\n<extra_id_1>", "OK\n<extra_id_1>"]
