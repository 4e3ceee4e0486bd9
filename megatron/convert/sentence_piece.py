"""Convert a SentencePiece model to a tokenizer of the `tokenizers` library.

The two libraries agree on most models, not on all, so the caller must compare ids.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.errors import ConfigurationError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # piece types
UNIGRAM, BPE = 1, 2  # model types
NEVER = -1000.0  # a score that excludes a piece from the best segmentation if there is another one
SPACE = "\u2581"  # stands for a space within pieces


def convert(source: bytes, name: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model with contents `source`; `name` is its name in messages.

    Raises: ConfigurationError if the model is neither Unigram nor BPE, or a package is missing.
    """
    proto = _read(source, name)
    result = Tokenizer(_model(proto, name))
    result.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    if not any(SPACE in piece.piece[1:] for piece in proto.pieces):  # splitting before spaces is faster, with equal ids
        result.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=True)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    result.decoder = decoders.Sequence([*steps, *prefix])
    result.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == CONTROL])
    if proto.trainer_spec.model_type == BPE:  # BPE never merges them; in Unigram they are pieces with a score
        user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
        result.add_tokens([AddedToken(symbol, normalized=False) for symbol in user_defined])
    return result


def symbols(source: bytes, name: str) -> list[str]:
    """Return the control and user-defined symbols of a model, as text."""
    return [piece.piece for piece in _read(source, name).pieces if piece.type in (CONTROL, USER_DEFINED)]


def _read(source: bytes, name: str):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigurationError(
            f"{name}: exporting it needs the package protobuf, which cannot be imported ({error}); install it: "
            "bash install.sh --with-eval"
        ) from None
    return sentencepiece_model_pb2.ModelProto.FromString(source)  # pyright: ignore[reportAttributeAccessIssue]


def _normalizers(spec) -> list[normalizers.Normalizer]:
    """Return the normalisation steps of a SentencePiece model."""
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    steps = _character_map(spec.precompiled_charsmap)
    spaces = normalizers.Replace(" ", SPACE)
    if not spec.remove_extra_whitespaces:
        return [*prefix, *steps, spaces]
    # \A and \z, since Oniguruma matches ^ and $ at every line
    steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return [*steps, normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), ""), spaces, *prefix]


def _character_map(source: bytes) -> list[normalizers.Normalizer]:
    """Return the character map of a model.

    SentencePiece maps \\r and \\n separately, the tokenizers library maps \\r\\n as if it were \\r.
    """
    if not source:
        return []
    character_map = normalizers.Precompiled(source)
    equal_newlines = character_map.normalize_str("\r") == character_map.normalize_str("\n")
    return [normalizers.Replace("\r\n", "\n\n"), character_map] if equal_newlines else [character_map]


def _model(proto, name: str) -> models.Model:
    """Return the model of a SentencePiece model; no text encodes to its control pieces or byte pieces as written."""
    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.model_type == UNIGRAM:
        return models.Unigram(_scored(pieces), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != BPE:
        kind = sentence_piece_type(spec.model_type)
        raise ConfigurationError(
            f"{name}: is a SentencePiece model of type {kind}, and transformers supports Unigram and BPE; this run "
            "cannot be exported with its tokenizer"
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = {piece.piece for piece in pieces if piece.type == NORMAL}
    by_score = sorted((piece for piece in pieces if piece.piece in normal), key=lambda piece: -piece.score)
    merges = [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in by_score)
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    options = {"unk_token": spec.unk_piece, "fuse_unk": True, "byte_fallback": spec.byte_fallback}
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def _scored(pieces) -> list[tuple[str, float]]:
    """Return the pieces of a Unigram model with their scores; user-defined ones score by byte length, as upstream."""
    best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)
    return [
        (piece.piece, len(piece.piece.encode()) * best - 0.1)
        if piece.type == USER_DEFINED
        else (piece.piece, piece.score if piece.type == NORMAL else NEVER)
        for piece in pieces
    ]


def sentence_piece_type(number: int) -> str:
    """Return the name of a SentencePiece model type that is neither Unigram nor BPE."""
    return {3: "word", 4: "char"}.get(number, str(number))
