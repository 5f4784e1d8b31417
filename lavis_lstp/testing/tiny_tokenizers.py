"""Tokenizer files of the published classes, made on the spot: LLaMA's, T5's and BERT's, a few hundred pieces each.

In: nothing but the built-in text below. Out: name -> content of the files a hub folder has, the same bytes every time.
The sentencepiece models are trained here; the `tokenizer.json` beside each is written from its pieces, because
transformers converts a sentencepiece model only where protobuf is installed.

Ids are those of the hub as far as the size allows: LLaMA has unk 0, <s> 1, </s> 2 and, added behind the last piece,
[PAD]; in InstructBLIP's files `</s>` is also the token put in front and the unknown one, and long texts are cut on the
left. T5 has pad 0, </s> 1, unk 2 and 100 sentinels at the end; like the published one it knows neither `<` nor line
breaks. BERT has [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103; the Q-Former's one more, [DEC].
"""

from __future__ import annotations

import io
import json
import string

from lavis_lstp.models.answer.tiny_tokenizer import WORDS

SENTENCES = (
    "USER: <video>\nwhat does the red circle do after it turns? ASSISTANT: it moves to the left.</s>",
    "USER: what is the person in the picture doing? ASSISTANT: the man is sitting at a table, with food and a dog.",
    "Describe the video. A woman walks through the room; then she picks up the cat, and sits down on the sofa!",
    "How many blue squares are in the first frame? There are two (one behind the other).",
    "Is the triangle green? No, it's yellow - the star is green.",
)
T5_UNKNOWN = "<{}~\\^`"
"""Characters that are no piece of the published T5 tokenizer."""
LLAMA_PIECES = 512
T5_PIECES = 320
T5_SENTINELS = 100
BERT_UNUSED = 99

Files = dict[str, bytes]


def llama_files() -> Files:
    """As in instructblip-vicuna-7b: tokenizer.model, tokenizer.json, their configs; `[PAD]` is the last id."""
    model = _train(
        [*_text(), string.printable.strip()],
        model_type="bpe",
        vocab_size=LLAMA_PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
    )
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
    pieces = [piece for piece, _ in _pieces(model)]
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "LlamaTokenizer",
        "truncation_side": "left",
        **special,
    }
    return {
        "tokenizer.model": model,
        "tokenizer.json": _llama_json(pieces),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
        "added_tokens.json": _json({"[PAD]": len(pieces)}),
    }


def t5_files(truncation_side: str = "right") -> Files:
    """As in the FLAN-T5 folders: spiece.model, tokenizer.json, their configs; InstructBLIP's cuts on the left."""
    letters = "".join(c for c in string.printable.strip() if c not in T5_UNKNOWN)
    text = [line.translate(str.maketrans("", "", T5_UNKNOWN)) for line in _text()]
    model = _train(
        [*text, letters, " ".join(letters)],
        model_type="unigram",
        vocab_size=T5_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special["additional_special_tokens"] = [f"<extra_id_{i}>" for i in range(T5_SENTINELS)]
    config = {
        "clean_up_tokenization_spaces": True,
        "extra_ids": T5_SENTINELS,
        "model_max_length": 512,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "truncation_side": truncation_side,
        **special,
    }
    return {
        "spiece.model": model,
        "tokenizer.json": _t5_json(model),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def bert_vocabulary() -> list[str]:
    words = [word.lower().strip(string.punctuation) for line in _text() for word in line.split()]
    letters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    first = ["[PAD]", *(f"[unused{i}]" for i in range(BERT_UNUSED)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    whole = dict.fromkeys(word for word in words if word.isalpha())
    return list(dict.fromkeys([*first, *letters, *whole, *(f"##{c}" for c in letters)]))


def bert_files(*, qformer: bool = False) -> Files:
    """As in bert-base-uncased; `qformer`: as in InstructBLIP's qformer_tokenizer/, with [DEC] behind the last word."""
    vocabulary = bert_vocabulary()
    special = {name: f"[{name[:-6].upper()}]" for name in ("unk_token", "sep_token", "pad_token", "cls_token")}
    special["mask_token"] = "[MASK]"
    files = {"vocab.txt": ("\n".join(vocabulary) + "\n").encode()}
    config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer", **special}
    added = []
    if qformer:
        special["bos_token"] = config["bos_token"] = "[DEC]"
        config["truncation_side"] = "left"
        added = ["[DEC]"]
        files["added_tokens.json"] = _json({"[DEC]": len(vocabulary)})
    files["tokenizer.json"] = _bert_json(vocabulary, added)
    files["tokenizer_config.json"] = _json(config)
    files["special_tokens_map.json"] = _json(special)
    return files


def vocabulary_size(files: Files) -> int:
    """Ids that a tokenizer of these files hands out."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size()


# ---- sentencepiece --------------------------------------------------------------------------------------------


def _text() -> list[str]:
    sentences = [sentence.replace("\n", " ") for sentence in SENTENCES]  # a line break is a byte, no piece
    return [*sentences, *sentences, *WORDS.split()]


def _train(text: list[str], **settings) -> bytes:
    """A sentencepiece model; one thread and no paths, so that its bytes depend on nothing else."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def _pieces(model: bytes) -> list[tuple[str, float]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]


def _message_field(message: bytes, number: int) -> bytes:
    """The bytes of a length-delimited field of a protobuf message; sentencepiece offers no way to them."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if tag >> 3 == number and kind == 2:
            return message[at : at + size]
        at += size
    raise KeyError(number)


# ---- tokenizer.json -------------------------------------------------------------------------------------------


def _llama_json(pieces: list[str]) -> bytes:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:  # sentencepiece numbers the pieces in the order in which it merged them
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((c for c in cuts if c[0] in ids and c[1] in ids), key=lambda c: (ids[c[0]], ids[c[1]]))
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>", "[PAD]"])
    core.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s>:1 $B:1", special_tokens=[("</s>", ids["</s>"])]
    )
    return _core_json(core)


def _t5_json(model: bytes) -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    sentinels = [f"<extra_id_{i}>" for i in reversed(range(T5_SENTINELS))]
    pieces = [*_pieces(model), *((name, 0.0) for name in sentinels)]
    core = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    normalizer_spec, character_map = 3, 2  # field numbers in sentencepiece_model.proto
    core.normalizer = normalizers.Precompiled(_message_field(_message_field(model, normalizer_spec), character_map))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.decoder = decoders.Metaspace()
    core.add_special_tokens([AddedToken(name, normalized=False) for name in ("<pad>", "</s>", "<unk>", *sentinels)])
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _core_json(core)


def _bert_json(vocabulary: list[str], added: list[str]) -> bytes:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *added])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return _core_json(core)


def _core_json(core) -> bytes:
    return _json(json.loads(core.to_str()))


def _json(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n").encode()
