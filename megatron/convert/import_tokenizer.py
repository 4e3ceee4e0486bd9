"""Import the tokenizer of a transformers folder for a run, and find its end-of-document token."""

import json
from pathlib import Path

from megatron.convert.read_huggingface import Folder, read_object
from megatron.data.tokenizer import END, GPTSentencePieceTokenizer, HFTokenizer, Tokenizer, appended_token
from megatron.errors import ConfigurationError

# file -> field with the end-of-sequence token, as an id or a string; the first that names a special token is used
EOS_FIELDS = {
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
}


def adopt_tokenizer(folder: Folder, output: Path) -> tuple[Tokenizer | None, str]:
    """Write the tokenizer of `folder` into `output`; return it, and a line that names its end-of-document token.

    It is that of tokenizer.json, without the mask token, or else of tokenizer.model. If there is neither, or no special
    token that ends a document, nothing is written and the result is None and a line with the reason.
    """
    if not (folder.path / "tokenizer.json").exists():
        return _sentence_piece(folder, output)
    path, target = folder.path / "tokenizer.json", output / "tokenizer.json"
    original = read_object(path)
    added = original.get("added_tokens") or []
    if not all(isinstance(token, dict) and {"id", "content"} <= token.keys() for token in added):
        return None, f"{path}: is not a tokenizer.json"
    state = original | {"added_tokens": _without_mask(added, folder)}
    end, note = _end_of_document(state["added_tokens"], folder.path)
    if end is None:
        return None, note
    state["added_tokens"] = [token | {"special": True} if token == end else token for token in state["added_tokens"]]
    if (appended_token(state) or END) != end["content"]:
        state["post_processor"] = _append_token(end)
    changed = state != original
    target.write_bytes(json.dumps(state, ensure_ascii=False).encode() if changed else path.read_bytes())
    try:
        return HFTokenizer(str(target)), note
    except ConfigurationError as error:
        target.unlink()
        return None, str(error).replace(f"--tokenizer-model {target}", str(path))


def _sentence_piece(folder: Folder, output: Path) -> tuple[Tokenizer | None, str]:
    """Copy tokenizer.model; its end-of-sentence piece is the end-of-document token."""
    path, target = folder.path / "tokenizer.model", output / "tokenizer.model"
    if not path.exists():
        return None, f"{folder.path}: has no tokenizer.json and no tokenizer.model"
    target.write_bytes(path.read_bytes())
    try:
        tokenizer = GPTSentencePieceTokenizer(str(target))
    except ConfigurationError as error:
        target.unlink()
        return None, str(error).replace(f"--tokenizer-model {target}", str(path))
    return tokenizer, f"id {tokenizer.eod}, the end-of-sentence piece of tokenizer.model, ends a document"


def _without_mask(added: list[dict], folder: Folder) -> list[dict]:
    """Return the added tokens without a mask token that is the last id, since a run adds its own there."""
    last = max((token["id"] for token in added), default=None)
    if folder.mask_row is None or not last == folder.mask_row == folder.config.vocab_size - 1:
        return added
    return [token for token in added if token["id"] != last]


def _end_of_document(added: list[dict], path: Path) -> tuple[dict | None, str]:
    """Return the added token that ends a document (or None), and a line that names it.

    It is the first one named in EOS_FIELDS, <|endoftext|> before others in the same field; without any, <|endoftext|>.
    """
    field_values = []
    for file, field in EOS_FIELDS.items():
        value = read_object(path / file).get(field) if (path / file).exists() else None
        if value is None:
            continue
        field_values.append(f"{field} {json.dumps(value, ensure_ascii=False)} of {file}")
        tokens = [token for entry in _entries(value) for token in added if entry in (token["id"], token["content"])]
        if tokens:
            end = next((token for token in tokens if token["content"] == END), tokens[0])
            return end, f"{end['content']} (id {end['id']}) ends a document: {field_values[-1]}"
    fields = " and ".join(field_values) or "no eos_token_id"
    end = next((token for token in added if token["content"] == END), None)
    if end is None:
        return None, f"{path}/tokenizer.json: has no {END}, and no special token that ends a document ({fields})"
    return end, f"{END} (id {end['id']}) ends a document by default: no other special token is named ({fields})"


def _entries(value) -> list[int | str | None]:
    """Return the ids or strings in a field that holds one of them, a list, or a token with options."""
    values = value if isinstance(value, list) else [value]
    return [entry.get("content") if isinstance(entry, dict) else entry for entry in values]


def _append_token(end: dict) -> dict:
    """Return the post-processor that appends `end` to a text."""
    sequence, token = ({"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end["content"], "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": [sequence, token],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}, token],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }
