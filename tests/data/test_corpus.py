"""Splits by group, the corpus hash, the standard library as text, and contamination."""

import hashlib
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from megatron.data.contamination import HeldOut, TrainNgrams, ngram_hashes
from megatron.data.corpus import SPLITS, Fingerprint, corpus_hash, split_of_text
from megatron.data.sources.base import Record
from megatron.data.sources.standard_library import standard_library

SHARES = (80, 10, 10)


def split_of(record: Record, shares) -> str:
    return split_of_text(record.group, record.text.encode(), shares)


def texts(count: int) -> list[Record]:
    return [Record(f"file:{number}", (f"text number {number}",)) for number in range(count)]


def fingerprint(*documents: tuple[str, str]) -> str:
    fingerprints = {split: Fingerprint() for split, _ in documents}
    for split, text in documents:
        fingerprints[split].add(hashlib.sha256(text.encode()).digest(), len(text.encode()))
    return corpus_hash(fingerprints)


@pytest.fixture(scope="module")
def library():
    return list(standard_library())


def test_the_standard_library_is_split_by_top_level_package(library):
    splits = defaultdict(set)
    for document in library:
        assert document.group == document.name.split("/")[0].removesuffix(".py")
        splits[document.group].add(split_of(document, SHARES))
    assert [group for group, names in splits.items() if len(names) > 1] == []
    assert {name for names in splits.values() for name in names} == set(SPLITS)


def test_the_standard_library_is_source_code_and_the_same_at_every_reading(library):
    names = [document.name for document in library]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert names == [document.name for document in standard_library()]
    assert {"abc.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "encodings", "pydoc_data", "__pycache__"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)  # build configuration
    assert all(document.text.strip() for document in library)
    assert sum(len(document.text) for document in library) > 5e6


def test_shares_are_kept_and_nothing_moves_when_text_is_added():
    documents = texts(4000)
    before = {document.text: split_of(document, SHARES) for document in documents[:2000]}
    after = {document.text: split_of(document, SHARES) for document in reversed(documents)}
    assert before.items() <= after.items()
    counts = Counter(after.values())
    assert abs(counts["train"] - 3200) < 4 * 25 and abs(counts["tuning"] - 400) < 4 * 19  # standard deviations


def test_a_group_decides_before_the_text_and_equal_texts_meet():
    grouped = {split_of(Record(f"{number}", (f"{number}",), "package"), SHARES) for number in range(50)}
    equal = {split_of(Record(f"{number}", ("the same",)), (1, 1, 1)) for number in range(50)}
    assert len(grouped) == len(equal) == 1


@pytest.mark.parametrize("shares, split", [((1, 0, 0), "train"), ((0, 0.1, 0), "tuning"), ((0, 0, 7), "validation")])
def test_a_split_of_share_zero_gets_nothing(shares, split):
    assert {split_of(document, shares) for document in texts(200)} == {split}


def test_the_hash_is_stable_and_sees_every_change():
    base = fingerprint(("train", "ab"), ("train", "c"), ("tuning", "d"))
    states = {}
    for split, text in (("train", b"ab"), ("train", b"c"), ("tuning", b"d")):  # the definition
        states[split] = hashlib.sha256(states.get(split, b"") + hashlib.sha256(text).digest()).digest()
    line = f"train={states['train'].hex()} tuning={states['tuning'].hex()} validation="
    assert base == hashlib.sha256(line.encode()).hexdigest()
    assert base == fingerprint(("tuning", "d"), ("train", "ab"), ("train", "c"))  # splits may be read in any order
    others = [
        fingerprint(("train", "a"), ("train", "bc"), ("tuning", "d")),
        fingerprint(("train", "c"), ("train", "ab"), ("tuning", "d")),
        fingerprint(("train", "ab"), ("train", "c"), ("validation", "d")),
        fingerprint(("train", "ab"), ("train", "c"), ("train", "d")),
        fingerprint(("train", "ab"), ("train", "c"), ("tuning", "d"), ("tuning", "")),
        fingerprint(("train", "ab"), ("train", "c"), ("tuning", "D")),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_documents_added_in_any_chunks_give_the_same_fingerprint():
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(10)]
    fingerprints = [Fingerprint() for _ in range(3)]
    for digest in digests:
        fingerprints[0].add(digest, 3)
    fingerprints[1].add(b"".join(digests), 30)
    fingerprints[2].add(b"".join(digests[:4]), 12)
    fingerprints[2] = Fingerprint(**fingerprints[2].state())
    fingerprints[2].add(b"".join(digests[4:]), 18)
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    assert fingerprints[0].sizes() == {"documents": 10, "bytes": 30}


def brute_force(train: list[str], other: list[str]) -> dict:
    """Return the shares of shared 13-grams and of documents with one, by comparing words."""

    def runs(text):
        words = text.encode().split()
        return [tuple(words[start : start + 13]) for start in range(len(words) - 12)]

    known = {run for text in train for run in runs(text)}
    hits = [[run in known for run in runs(text)] for text in other]
    return {
        "ngrams": sum(map(sum, hits)) / max(1, sum(map(len, hits))),
        "documents": sum(map(any, hits)) / max(1, len(hits)),
        "sampled": 1.0,
    }


def shared(train: list[str], other: list[str], *, train_limit: int = 1 << 20, **limit) -> dict:
    held, sample = HeldOut(**limit), TrainNgrams(train_limit)
    for text in other:
        held.add(zlib.crc32(text.encode()), ngram_hashes(text.encode()))
    for text in train:
        sample.add(ngram_hashes(text.encode()))
    return held.shared(sample)


def words(*numbers) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_near_duplicates_equal_brute_force(library):
    groups = defaultdict(list)
    for document in library[:160]:
        groups[split_of(document, (50, 50, 0))].append(document.text)
    # a whole file, and an n-gram inside other text, are in both splits
    copied = " ".join(groups["train"][3].split()[40:90])
    other = [*groups["tuning"], groups["train"][5], f"before {copied} after"]
    assert shared(groups["train"], other) == brute_force(groups["train"], other)
    assert 0 < shared(groups["train"], other)["documents"] < 1


@pytest.mark.parametrize(
    "train, other, ngrams, documents",
    [
        ([words(*range(13))], [words(*range(13))], 1.0, 1.0),
        ([words(*range(12))], [words(*range(12))], 0.0, 0.0),  # too short for a 13-gram
        ([words(*range(13))], [words(*range(12, -1, -1))], 0.0, 0.0),  # order matters
        ([words(*range(14))], [words(*range(1, 15)), "short"], 0.5, 0.5),
        ([words(*range(13))], [words(*range(13)) + " " + words(*range(13))], 2 / 14, 1.0),  # each occurrence counts
        ([], [words(*range(20))], 0.0, 0.0),
        ([words(*range(20))], [], 0.0, 0.0),
    ],
)
def test_near_duplicates_of_small_texts(train, other, ngrams, documents):
    assert shared(train, other) == {"ngrams": ngrams, "documents": documents, "sampled": 0.0 if not other else 1.0}
    assert other == [] or shared(train, other) == brute_force(train, other)


def test_near_duplicates_are_sampled_by_document_where_there_are_too_many():
    other = [words(*range(number * 100, number * 100 + 22)) for number in range(2000)]  # 10 n-grams each
    train = [text for number, text in enumerate(other) if number % 4 == 0]
    limit = 400 * (10 + 16)
    figures = shared(train, other, limit=limit)
    assert 0.1 < figures["sampled"] <= 0.2  # 400 documents at most
    assert abs(figures["ngrams"] - 0.25) < 4 * 0.025 and figures["documents"] == figures["ngrams"]
    assert figures == shared(train, other, limit=limit)
    assert shared(train, other, limit=5) == shared(train, other, limit=10)  # at least one document is sampled


def test_the_sample_does_not_prefer_short_documents():
    other = [words(*range(number * 1000, number * 1000 + 13 + number % 2 * 500)) for number in range(300)]
    held, points = HeldOut(limit=20_000), []
    for text in other:
        crc = zlib.crc32(text.encode())
        held.add(crc, ngram_hashes(text.encode()))
        points.append(crc)
        hashes = sorted(-point for point, _, _ in held._sampled)
        assert hashes == sorted(points)[: len(hashes)]
    assert 20 < len(hashes) < 150


def test_ngrams_of_a_large_training_split_are_sampled():
    other = [words(*range(number * 100, number * 100 + 112)) for number in range(200)]  # 100 n-grams each
    train = [text for number, text in enumerate(other) if number % 4 == 0]
    figures = shared(train, other, train_limit=1000)
    assert figures["documents"] is None and figures["sampled"] == pytest.approx(1000 / 5000, rel=0.2)
    assert figures["ngrams"] == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert figures == shared(train[::-1], other, train_limit=1000)


def test_a_sample_depends_on_the_ngrams_alone():
    """Not on their order or on when it was saved, and what a worker leaves out is not missed."""
    hashes = np.random.default_rng(0).integers(1 << 63, size=20_000, dtype=np.uint64) * np.uint64(2)
    whole, parts = TrainNgrams(500), TrainNgrams(500)
    whole.add(hashes)
    for part in np.split(hashes[::-1], 40):
        parts.add(part[part <= np.uint64(parts.largest)])
    assert np.array_equal(whole.hashes(), np.sort(hashes)[:500]) and np.array_equal(parts.hashes(), whole.hashes())
    restored = TrainNgrams.restored(parts.state())
    assert np.array_equal(restored.hashes(), whole.hashes()) and restored.largest == whole.largest
    held = HeldOut(limit=2000)
    for number in range(300):
        held.add(zlib.crc32(b"%d" % number), hashes[number * 13 : number * 13 + number % 20])
    again = HeldOut.restored(held.state())
    assert held.shared(whole) == again.shared(whole) and again.threshold == held.threshold
