"""The user's text files: all supported formats, and one line for every error."""

import bz2
import gzip
import json
import lzma
import os
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron.data.compressed import open_decompressed
from megatron.data.sources import base
from tests.data.sources import read_documents

TEXT = "line one\r\n\nünicode\n" * 50
LINES = "".join(json.dumps({"text": f"text {number} ü", "body": number}) + "\n" for number in range(2000))


def compressed(name: str, data: bytes) -> bytes:
    library = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}.get(Path(name).suffix)
    return library.compress(data) if library else data


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a file, compressed according to its name, and returns its path."""

    def write(name, data, pack=True):
        data = data.encode() if isinstance(data, str) else data
        (tmp_path / name).write_bytes(compressed(name, data) if pack else data)
        return str(tmp_path / name)

    return write


def texts_of(*paths, **options) -> list[str]:
    return [document.text for document in read_documents(paths, **options)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2", ".xz", ".GZ"])
def test_every_kind_is_read_whole(file, ending):
    text, lines = file(f"a.txt{ending}", TEXT, ending != ".GZ"), file(f"b.jsonl{ending}", LINES, ending != ".GZ")
    if ending == ".GZ":
        for path in (text, lines):
            Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))
    assert texts_of(text) == [TEXT]
    assert texts_of(lines) == [f"text {number} ü" for number in range(2000)]
    assert texts_of(lines, text)[-1] == TEXT
    assert [document.name for document in read_documents([lines])][1] == f"{lines}:2"


def test_large_and_joined_compressed_files_are_read_to_the_end(file):
    noise = os.urandom(300_000).hex() + "\n"  # more than a buffer, compressed too
    assert texts_of(file("a.txt.zst", noise)) == [noise]
    for name in ("b.txt.gz", "b.txt.zst", "b.txt.bz2", "b.txt.xz"):
        joined = compressed(name, b"one ") + compressed(name, b"") + compressed(name, b"two")
        assert texts_of(file(name, joined, pack=False)) == ["one two"]


@pytest.mark.parametrize("unit", [b'{"text": "the same line again and again"}\n', b"x"], ids=["lines", "bytes"])
def test_a_highly_compressible_file_is_read_in_bounded_memory_without_copies(file, unit):
    data = unit * ((64 << 20) // len(unit))
    path = Path(file("a.jsonl.zst", data))
    buffer, size, allocated, highest = bytearray(1 << 16), 0, 0, 0
    tracemalloc.start()
    try:
        with open_decompressed(path, "a") as decompressed:
            while True:
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                count = decompressed.readinto(buffer)
                peak = tracemalloc.get_traced_memory()[1]
                allocated, highest = allocated + peak - before, max(highest, peak)
                if not count:
                    break
                size += count
    finally:
        tracemalloc.stop()
    assert size == len(data)
    assert allocated < 2 * size  # more if each read copies what is left of the output
    assert highest < 40 << 20  # two outputs of at most 16 MiB, and less than the 64 MiB of the whole


def test_empty_documents_and_lines_are_left_out(file):
    assert texts_of(file("a.jsonl", '{"text": ""}\n\n{"text": " \\n"}\n  \n{"text": "x"}')) == ["x"]
    assert texts_of(*(file(f"b.txt{ending}", "") for ending in ("", ".gz", ".zst", ".bz2", ".xz"))) == []
    assert texts_of(file("c.txt.zst", b"", pack=False)) == []


def test_another_field_and_a_byte_order_mark(file):
    assert texts_of(file("a.jsonl", '\ufeff{"content": "x", "text": 1}\r\n{"content": "y"}'), key="content") == [
        "x",
        "y",
    ]
    assert texts_of(file("b.txt", "\ufeffx")) == ["x"]
    assert texts_of(file("c.jsonl", "\ufeff\r\n")) == []
    assert texts_of(file("D.JSONL.ZST", zstandard.compress('\ufeff{"text": "x"}'.encode()), pack=False)) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.TXT.zst"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_utf16_is_refused(file, refused, name, encoding):
    with refused(f"{name}: is not UTF-8 (it begins with the bytes", "as UTF-16 does", "iconv -f UTF-16"):
        texts_of(file(name, '{"text": "x"}\n'.encode(encoding)))


def test_a_text_file_is_cut_at_its_separator(file):
    path = file("a.txt", "one\n1\n\n\ntwo\r\n\r\n  \nthree")
    assert texts_of(path, separator="") == ["one\n1\n", "two\r\n", "  \nthree"]
    assert [document.name for document in read_documents([path], separator="")] == [
        f"{path}:{line}" for line in (1, 5, 7)
    ]
    assert texts_of(file("b.txt", "one\n<|end|>\ntwo<|end|>\n<|end|>\n"), separator="<|end|>") == [
        "one\n",
        "two<|end|>\n",
    ]
    assert len(texts_of(path)) == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.jsonl.bz2", "a.txt.xz"])
@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(file, refused, name, left):
    whole = compressed(name, LINES.encode())
    with refused(
        f"--input {file(name, whole[: int(len(whole) * left)], pack=False)}", "is damaged or truncated", "again"
    ):
        texts_of(str(file(name, whole[: int(len(whole) * left)], pack=False)))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.txt.bz2", "a.txt.xz"])
def test_a_damaged_or_foreign_file_is_refused(file, refused, name):
    whole = bytearray(compressed(name, LINES.encode()))
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    # the bzip2 format allows bytes after its end
    for data in (bytes(whole), *([] if name.endswith(".bz2") else [compressed(name, b"x") + b"more"])):
        with refused("--input", name, "is damaged or truncated"):
            texts_of(file(name, data, pack=False))
    with refused("--input", f"{name}: is not in ", "rename it if it is decompressed already"):
        texts_of(file(name, b"plain text", pack=False))


def streamed(window_log: int, data: bytes) -> bytes:
    """Compress as `zstd --long=N` does from a pipe: the frame has no content size."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, write_checksum=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return frame.compress(data) + frame.flush()


def skippable(size: int) -> bytes:
    """Return a skippable frame, as in the files of pzstd and in seekable files."""
    return struct.pack("<II", 0x184D2A50, size) + bytes(size)


@pytest.mark.parametrize("window_log", [27, 28, 30, 31])
def test_a_long_window_is_read_and_its_damage_named(file, refused, window_log):
    whole = streamed(window_log, LINES.encode())
    assert zstandard.get_frame_parameters(whole).window_size == 1 << window_log
    assert len(texts_of(file("a.jsonl.zst", whole, pack=False))) == 2000
    with refused("is damaged or truncated (the file ends inside a frame)"):
        texts_of(file("a.jsonl.zst", whole[:-1], pack=False))
    with refused("is damaged or truncated", "doesn't match checksum"):
        texts_of(file("a.jsonl.zst", whole[:-1] + bytes([whole[-1] ^ 1]), pack=False))


def test_skippable_frames_are_left_out(file, refused):
    first, second = streamed(28, b"one "), streamed(31, b"two")
    for data in (skippable(9) + first + skippable(0) + second, first + skippable(300_000) + second + skippable(1)):
        assert texts_of(file("a.txt.zst", data, pack=False)) == ["one two"]
    assert texts_of(file("a.txt.zst", skippable(9), pack=False)) == []
    with refused("is damaged or truncated (the file ends inside a frame)"):
        texts_of(file("a.txt.zst", first + skippable(9)[:-1], pack=False))


def test_a_sound_file_is_refused_for_what_it_is(file, refused):
    wide = bytearray(streamed(31, LINES.encode()))
    wide[5] = 22 << 3  # exponent of the window size: 2**(10 + 22)
    newer = bytearray(streamed(20, LINES.encode()))
    newer[4] |= 8  # a reserved bit
    dictionary = zstandard.train_dictionary(500, [b"text %d of many" % number * 3 for number in range(500)])
    foreign = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINES.encode())
    for data, parts in (
        (wide, ("a window of more than 2 GiB", "zstd --long=31 at most")),
        (newer, ("a frame of a newer zstd", "update the package zstandard")),
        (foreign, ("was compressed with a dictionary", "zstd -d -D")),
    ):
        with refused(f"--input {file('a.jsonl.zst', bytes(data), pack=False)}: ", *parts):
            texts_of(file("a.jsonl.zst", bytes(data), pack=False))


def test_a_window_that_memory_has_no_room_for_is_named(file, refused):
    path = file("a.jsonl.zst", streamed(31, LINES.encode()), pack=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used_memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_memory + (1 << 30), hard))
    try:
        with refused(f"--input {path}: needs a window larger than the free memory", "without zstd's --long"):
            texts_of(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_zeros_after_a_gzip_file_are_padding(file):
    padded = gzip.compress(b"one ") + gzip.compress(b"two") + bytes(512)
    assert texts_of(file("a.txt.gz", padded, pack=False)) == ["one two"]


def test_integers_of_any_length_are_json(file, refused):
    digits = "1" * 5000  # int() reads 4,300
    path = file("a.jsonl", f'{{"text": "one", "n": {digits}}}\n{{"n": [-{digits}], "text": "two"}}')
    assert texts_of(path) == ["one", "two"]
    with refused('line 1 has a value of type int in "n", not a string'):
        texts_of(path, key="n")


@pytest.mark.parametrize(
    "line, parts",
    [
        (b'{"text": "x"', ["is not JSON", "fix or remove it"]),
        (b"plain text", ["is not JSON"]),
        (b'{"text": "\xff\xfe"}', ["is not UTF-8", "0xff"]),
        (b"[" * 100_000, ["is not JSON"]),
        (b'{"body": "x"}', ['has no field "text"', "--json-keys"]),
        (b'["text"]', ['has no field "text"', "--json-keys"]),
        (b'"text"', ['has no field "text"']),
        (b"null", ['has no field "text"']),
        (b'{"text": 5}', ['has a value of type int in "text", not a string', "--json-keys"]),
        (b'{"text": null}', ["NoneType"]),
        (b'{"text": ["x"]}', ["list"]),
        (b'{"text": "\\ud800"}', ["is not text", "surrogates", "fix or remove it"]),
    ],
)
def test_a_bad_line_is_named(file, refused, line, parts):
    path = file("a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    with refused(f"--input {path}: line 3", *parts):
        texts_of(path)


def test_text_that_is_not_utf8_is_refused(file, refused):
    for separator in (None, ""):
        with refused("--input", "a.txt", "is not UTF-8", "0xe9", "iconv"):
            texts_of(file("a.txt", "fine\ncafé\n".encode("latin-1")), separator=separator)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("nowhere.txt", ["no such file", "give the path"]),
        ("folder.txt", ["no file of the kinds", ".txt", "name its files", "--txt"]),
        ("*.jsonl", ["no file matches", "check the pattern"]),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, refused, name, parts):
    (tmp_path / "folder.txt").mkdir()
    with refused(f"--input {tmp_path / name}: ", *parts):
        texts_of(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a", "a.csv", "a.csv.gz", "a.gz", "a.txt.lz4", "a.parquet.gz"])
def test_another_kind_of_file_is_refused(file, refused, name):
    with refused(f"{name}: is none of .txt, .jsonl", "rename it", "--txt"):
        texts_of(file(name, "x", pack=False))


def test_a_document_too_large_for_the_memory_is_refused(file, refused, monkeypatch):
    monkeypatch.setattr(base, "LONGEST_DOCUMENT", 100)
    path = file("a.txt", "x" * 99 + "\n\n" + "y" * 50 + "\n" + "z" * 51)
    with refused(f"--input {path}", "more than 100 bytes", "--txt-separator"):
        texts_of(path)
    with refused(f"--input {path}:3", "more than 100 bytes"):
        texts_of(path, separator="")
    assert len(texts_of(file("b.txt", "x" * 100))) == 1


def test_a_missing_package_is_named(file, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with refused("a.txt.zst: needs the package zstandard, the extra zstd", "pip install zstandard"):
        texts_of(file("a.txt.zst", b"", pack=False))
