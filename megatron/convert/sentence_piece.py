"""A SentencePiece model as a tokenizer of the `tokenizers` library.

The two libraries agree on most models, not on all, so whoever converts one compares the ids.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.errors import ConfigurationError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
NEVER = -1000.0  # a score that no path through a text takes where there is another one
SPACE = "\u2581"  # how a piece spells a space


def convert(source: bytes, named: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model, read from `source`.

    Raises ConfigurationError where the model is of another type than Unigram and BPE, or a package is missing.
    """
    proto = _read(source, named)
    result = Tokenizer(_model(proto, named))
    result.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    if not any(SPACE in piece.piece[1:] for piece in proto.pieces):  # a cut before spaces is fast, and changes nothing
        result.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=True)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    result.decoder = decoders.Sequence([*steps, *prefix])
    result.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == CONTROL])
    if proto.trainer_spec.model_type == BPE:  # which merges nothing with them; in Unigram they are pieces with a score
        symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
        result.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return result


def symbols(source: bytes, named: str) -> list[str]:
    """Return how a model spells its control and user-defined symbols."""
    return [piece.piece for piece in _read(source, named).pieces if piece.type in (CONTROL, USER_DEFINED)]


def _read(source: bytes, named: str):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigurationError(
            f"{named}: to export it needs the package protobuf, which cannot be imported ({error}); install it: "
            "bash install.sh --with-eval"
        ) from None
    return sentencepiece_model_pb2.ModelProto.FromString(source)


def _normalizers(spec) -> list[normalizers.Normalizer]:
    """Return what a SentencePiece model does to a text, step by step."""
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    steps, spaces = _character_map(spec.precompiled_charsmap), normalizers.Replace(" ", SPACE)
    if not spec.remove_extra_whitespaces:
        return [*prefix, *steps, spaces]
    # in Onig, ^ and $ match at every line
    steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return [*steps, normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), ""), spaces, *prefix]


def _character_map(source: bytes) -> list[normalizers.Normalizer]:
    """Return the character map of a model; the library maps \\r\\n as the single character \\r, SentencePiece both."""
    if not source:
        return []
    mapped = normalizers.Precompiled(source)
    return_and_feed_equal = mapped.normalize_str("\r") == mapped.normalize_str("\n")
    return [normalizers.Replace("\r\n", "\n\n"), mapped] if return_and_feed_equal else [mapped]


def _model(proto, named: str) -> models.Model:
    """Return the model of a SentencePiece model, in which no text spells a control piece or a byte."""
    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.model_type == UNIGRAM:
        return models.Unigram(_scored(pieces), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != BPE:
        kind = sentence_piece_type(spec.model_type)
        raise ConfigurationError(
            f"{named}: is a SentencePiece model of type {kind}, and transformers has Unigram and BPE; this run cannot "
            "be exported with its tokenizer"
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    known = {piece.piece for piece in pieces if piece.type == NORMAL}
    ordered = sorted((piece for piece in pieces if piece.piece in known), key=lambda piece: -piece.score)
    merges = [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in ordered)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    options = {"unk_token": spec.unk_piece, "fuse_unk": True, "byte_fallback": spec.byte_fallback}
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def _scored(pieces) -> list[tuple[str, float]]:
    """Return the pieces of a Unigram model with their scores; SentencePiece scores user-defined ones by their bytes."""
    best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
    return [
        (piece.piece, len(piece.piece.encode()) * best - 0.1)
        if piece.type == USER_DEFINED
        else (piece.piece, piece.score if piece.type == NORMAL else NEVER)
        for piece in pieces
    ]


def sentence_piece_type(number: int) -> str:
    return {3: "word", 4: "char"}.get(number, str(number))
