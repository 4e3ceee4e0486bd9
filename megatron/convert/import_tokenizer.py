"""The tokenizer of a folder of transformers as that of a run, with the token that ends a document."""

import json
from pathlib import Path

from megatron.convert.read_huggingface import Folder, read_object
from megatron.data.tokenizer import END, GPTSentencePieceTokenizer, HFTokenizer, Tokenizer, appended_token
from megatron.errors import ConfigurationError

# where a folder names its end-of-sequence token, by id or as it is spelled: the first that names a special token counts
EOS_FIELDS = {
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
}


def adopt_tokenizer(folder: Folder, aside: Path) -> tuple[Tokenizer | None, str]:
    """Write the tokenizer of `folder` into `aside`; return it, and a line that says which token ends a document.

    That of tokenizer.json, without its mask token, or of tokenizer.model. Where there is none, or it has no token that
    ends a document and that no text becomes, nothing is written, and None is returned with a line that says why.
    """
    if not (folder.path / "tokenizer.json").exists():
        return _sentence_piece(folder, aside)
    path, target = folder.path / "tokenizer.json", aside / "tokenizer.json"
    original = read_object(path)
    added = original.get("added_tokens") or []
    if not all(isinstance(token, dict) and {"id", "content"} <= token.keys() for token in added):
        return None, f"{path}: is not a tokenizer.json"
    state = original | {"added_tokens": _without_mask(added, folder)}
    end, line = _end(state["added_tokens"], folder.path)
    if end is None:
        return None, line
    state["added_tokens"] = [token | {"special": True} if token == end else token for token in state["added_tokens"]]
    if (appended_token(state) or END) != end["content"]:
        state["post_processor"] = _template(end)
    changed = state != original
    target.write_bytes(json.dumps(state, ensure_ascii=False).encode() if changed else path.read_bytes())
    try:
        return HFTokenizer(str(target)), line
    except ConfigurationError as error:
        target.unlink()
        return None, str(error).replace(f"--tokenizer-model {target}", str(path))


def _sentence_piece(folder: Folder, aside: Path) -> tuple[Tokenizer | None, str]:
    """Copy tokenizer.model, whose own end-of-sentence piece ends a document."""
    path, target = folder.path / "tokenizer.model", aside / "tokenizer.model"
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
    """Return the added tokens but for a mask token that is the last id, where a run has it too."""
    last = max((token["id"] for token in added), default=None)
    if folder.mask_row is None or not last == folder.mask_row == folder.config.vocab_size - 1:
        return added
    return [token for token in added if token["id"] != last]


def _end(added: list[dict], path: Path) -> tuple[dict | None, str]:
    """Return the added token that ends a document, None where there is none, and a line that says so.

    It is the first that a field of EOS_FIELDS names, <|endoftext|> before others of the same field, and <|endoftext|>
    where they name none.
    """
    named = []
    for file, field in EOS_FIELDS.items():
        value = read_object(path / file).get(field) if (path / file).exists() else None
        if value is None:
            continue
        named.append(f"{field} {json.dumps(value, ensure_ascii=False)} of {file}")
        tokens = [token for entry in _entries(value) for token in added if entry in (token["id"], token["content"])]
        if tokens:
            end = next((token for token in tokens if token["content"] == END), tokens[0])
            return end, f"{end['content']} (id {end['id']}) ends a document: {named[-1]}"
    fields = " and ".join(named) or "no eos_token_id"
    end = next((token for token in added if token["content"] == END), None)
    if end is None:
        return None, f"{path}/tokenizer.json: has no {END}, and no special token that ends a document ({fields})"
    return end, f"{END} (id {end['id']}) ends a document; no special token of tokenizer.json is meant by {fields}"


def _entries(value) -> list[int | str]:
    """Return the ids or spellings in a field: one or a list of them, or a token with its options."""
    values = value if isinstance(value, list) else [value]
    return [entry.get("content") if isinstance(entry, dict) else entry for entry in values]


def _template(end: dict) -> dict:
    """Return the post-processor that puts `end` after a text."""
    sequence, token = ({"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end["content"], "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": [sequence, token],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}, token],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }
