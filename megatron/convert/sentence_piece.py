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
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigurationError(
            f"{named}: to export it needs the package protobuf, which cannot be imported ({error}); install it: "
            "bash install.sh --with-eval"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(source)
    made = Tokenizer(_model(proto, named))
    normal = proto.normalizer_spec
    steps = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    made.normalizer = normalizers.Sequence(steps)
    prefix = "always" if normal.add_dummy_prefix else "never"
    split = proto.trainer_spec.split_by_whitespace
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=split)
    spaces = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces])
    made.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return made


def _model(proto, named: str) -> models.Model:
    """Return the model of a SentencePiece model, in which no text spells a control piece or a byte."""
    spec, pieces = proto.trainer_spec, proto.pieces
    spelled = [piece.type in (NORMAL, USER_DEFINED) for piece in pieces]
    if spec.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score if said else NEVER) for piece, said in zip(pieces, spelled, strict=True)]
        return models.Unigram(scored, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != BPE:
        kind = sentence_piece_type(spec.model_type)
        raise ConfigurationError(
            f"{named}: is a SentencePiece model of type {kind}, and transformers has Unigram and BPE; this run cannot "
            "be exported with its tokenizer"
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    known = {piece.piece for piece, said in zip(pieces, spelled, strict=True) if said}
    ordered = sorted((piece for piece in pieces if piece.piece in known), key=lambda piece: -piece.score)
    merges = [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in ordered)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    options = {"unk_token": spec.unk_piece, "fuse_unk": True, "byte_fallback": spec.byte_fallback}
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def sentence_piece_type(number: int) -> str:
    return {3: "word", 4: "char"}.get(number, str(number))
