"""A tokenizer for models that have no published one: tiny models in tests, in the demo and for debugging.

Words of a small vocabulary are one token each; any other printable text is spelled letter by letter, so that a
tiny model takes every question a user may type. It needs no file and no network.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SPECIAL = (PAD, UNK, BOS, EOS)

WORDS = (
    "user assistant video image what which colour color shape is it the that this in moves moved move turns shakes "
    "turned shook left right up down first last before after a an and of to on how many does do happens happen "
    "when where who why yes no none one two three four five "
    "red green blue yellow orange purple cyan pink magenta white black brown grey gray lime teal "
    "circle square triangle star cross heart diamond ring pentagon hexagon "
    "person man woman table food room cat dog sofa picture frame frames"
)


def tiny_vocabulary(extra_words: Iterable[str] = ()) -> dict[str, int]:
    """Token -> id: special tokens (pad is 0), whole words, and every ASCII character alone and inside a word."""
    words = dict.fromkeys(WORDS.split())
    words.update(dict.fromkeys(w.lower() for text in extra_words for w in re.findall(r"\w+", text)))
    letters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    tokens = [*SPECIAL, *words, *letters, *(f"##{c}" for c in letters)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def tiny_tokenizer(*, bos: bool, eos: bool = False, max_length: int = 512, extra_words: Iterable[str] = ()):
    """A `PreTrainedTokenizerFast` over `tiny_vocabulary`, lower-casing, padding on the right.

    Args:
        bos: put `<s>` in front, as LLaMA's tokenizer does.
        eos: put `</s>` behind, as T5's tokenizer does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = tiny_vocabulary(extra_words)
    core = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=UNK, max_input_chars_per_word=200))
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    if bos or eos:
        single = f"{BOS + ' ' if bos else ''}$A{' ' + EOS if eos else ''}"
        ids = [(token, vocabulary[token]) for token, wanted in ((BOS, bos), (EOS, eos)) if wanted]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=max_length,
    )
