"""Every damage to a dataset is found and named; a whole one passes, whatever the tokenizer does to text."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data_tools.dataset_reader import HEADER_BYTES
from data_tools.documents import DocumentRules
from data_tools.manifest import manifest_checksum
from data_tools.preprocess import preprocess
from data_tools.verify import verify
from dsmoe_megatron.tokenizers import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "verify.py"
SUFFIXES = ("bin", "idx", "manifest.json")
DOCUMENTS = 40


def make_dataset(
    prefix: Path, texts: list[str], tokenizer_spec: str, special_tokens: Literal["ordinary", "parse"] = "ordinary"
) -> Path:
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([str(source)], str(prefix), tokenizer_spec, rules=DocumentRules(special_tokens=special_tokens))
    return prefix


@pytest.fixture(scope="module")
def whole(texts: list[str], tokenizer_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    short = [text for text in texts if 20 < len(text) < 500]
    return make_dataset(tmp_path_factory.mktemp("whole") / "data", texts[:4] + short[: DOCUMENTS - 4], tokenizer_spec)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    for suffix in SUFFIXES:
        shutil.copy(f"{whole}.{suffix}", tmp_path / f"data.{suffix}")
    return tmp_path / "data"


def vouch_for(prefix: Path) -> None:
    """Make the manifest vouch for the files as they are now, so that only what is in them can tell."""
    path = Path(f"{prefix}.manifest.json")
    manifest = json.loads(path.read_text())
    for suffix, file in manifest["files"].items():
        content = Path(f"{prefix}.{suffix}").read_bytes()
        file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


def faults_of(prefix: Path, sample: int = 100) -> list[str]:
    return verify(str(prefix), sample).faults


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_dataset_passes(whole: Path) -> None:
    report = verify(str(whole))

    manifest = json.loads(Path(f"{whole}.manifest.json").read_text())
    assert report.faults == []
    assert (report.documents, report.tokens) == (DOCUMENTS, manifest["tokens"])
    assert (report.sampled, report.compared) == (DOCUMENTS, "ids")
    assert verify(str(whole), sample=7).sampled == 7


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_flipped_bit_is_found_in_its_file(suffix: str, copy: Path) -> None:
    path = Path(f"{copy}.{suffix}")
    content = path.read_bytes()
    generator = random.Random(suffix)
    for _ in range(150):
        byte, bit = generator.randrange(len(content)), generator.randrange(8)
        flip(path, byte, bit)

        found = faults_of(copy, sample=0)

        assert found, f"byte {byte}, bit {bit}"
        # a manifest that tells another size or dtype is caught by its checksum before the files are looked at
        assert all(str(path) in fault for fault in found), f"byte {byte}, bit {bit}: {found}"
        path.write_bytes(content)
    assert faults_of(copy) == []


def test_damage_to_both_files_is_told_of_both(copy: Path) -> None:
    flip(Path(f"{copy}.idx"), 0, 0)
    flip(Path(f"{copy}.bin"), 0, 0)

    bin_fault, idx_fault, header_fault = faults_of(copy)
    assert bin_fault.startswith(f"{copy}.bin: its SHA-256")
    assert idx_fault.startswith(f"{copy}.idx: its SHA-256")
    assert header_fault.startswith(f"{copy}.idx is not a Megatron dataset index")


def index_fields(documents: int) -> dict[str, range]:
    """Bytes of the .idx, by what they hold."""
    sizes = {"magic": 9, "version": 8, "dtype": 1, "sequences": 8, "document indices": 8}
    tables = {"lengths": 4 * documents, "starts": 8 * documents, "numbers": 8 * (documents + 1)}
    assert sum(sizes.values()) == HEADER_BYTES
    fields, start = {}, 0
    for name, size in (sizes | tables).items():
        fields[name] = range(start, start + size)
        start += size
    return fields


@pytest.mark.parametrize("field", index_fields(DOCUMENTS))
def test_any_flipped_bit_of_the_index_is_found_by_its_content_alone(field: str, copy: Path) -> None:
    path = Path(f"{copy}.idx")
    content = path.read_bytes()
    places = index_fields(DOCUMENTS)[field]
    generator = random.Random(field)
    for byte in generator.sample(places, min(len(places), 40)):
        flip(path, byte, generator.randrange(8))
        vouch_for(copy)

        found = faults_of(copy, sample=0)

        assert found
        assert all(str(path) in fault for fault in found), found
        path.write_bytes(content)


def test_the_document_of_a_wrong_pointer_or_length_is_named(copy: Path) -> None:
    fields = index_fields(DOCUMENTS)
    path = Path(f"{copy}.idx")
    content = path.read_bytes()
    lengths = np.frombuffer(content[fields["lengths"].start :][: 4 * DOCUMENTS], "<i4")

    flip(path, fields["lengths"][4 * 17], 0)
    vouch_for(copy)
    (found,) = faults_of(copy)
    assert f"document 17 ({lengths[17] ^ 1} tokens at byte {2 * lengths[:17].sum()})" in found

    path.write_bytes(content)
    flip(path, fields["starts"][8 * 17], 0)
    vouch_for(copy)
    (found,) = faults_of(copy)
    assert "document 16 " in found
    assert "1 more like it" in found

    path.write_bytes(content)
    flip(path, fields["lengths"][4 * 17 + 3], 7)  # the sign
    vouch_for(copy)
    assert any(f"document 17 has {int(lengths[17]) - 2**31} tokens" in fault for fault in faults_of(copy))


def set_token(prefix: Path, token: int, value: int) -> None:
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r+")
    tokens[token] = value
    tokens.flush()
    vouch_for(prefix)


def lengths_of(prefix: Path) -> np.ndarray:
    table = Path(f"{prefix}.idx").read_bytes()[HEADER_BYTES:]
    return np.frombuffer(table[: 4 * DOCUMENTS], "<i4")


def test_wrong_ids_are_found_by_themselves_and_named(copy: Path) -> None:
    manifest = json.loads(Path(f"{copy}.manifest.json").read_text())
    vocab_size, end = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["end_of_document_id"]
    last = int(lengths_of(copy)[:8].sum()) - 1  # of document 7
    content = Path(f"{copy}.bin").read_bytes()
    cases = [
        (last - 1, vocab_size, f"document 7: id {vocab_size} at token {last - 1} is not below the vocabulary"),
        (last, 100, f"document 7: id 100 at token {last} is its last, but not the end of document {end}"),
        (last - 1, end, f"document 7: id {end} at token {last - 1} ends the document before its last token"),
    ]
    for token, value, message in cases:
        set_token(copy, token, value)
        (found,) = faults_of(copy, sample=0)
        assert f"{copy}.bin: {message}" in found
        Path(f"{copy}.bin").write_bytes(content)


def test_ids_that_the_tokenizer_would_not_give_are_found(copy: Path, tokenizer_spec: str) -> None:
    tokenizer = load_tokenizer(tokenizer_spec)
    apart = [*tokenizer.encode("t"), *tokenizer.encode("h")]  # it has one id for both
    assert len(tokenizer.encode("th")) == 1
    tokens, start = np.fromfile(f"{copy}.bin", np.uint16), int(lengths_of(copy)[:9].sum())
    tokens[start : start + 2] = apart
    tokens.tofile(f"{copy}.bin")
    vouch_for(copy)

    (found,) = faults_of(copy)

    assert f"{copy}.bin: document 9: decoded and encoded again it has other ids" in found
    assert faults_of(copy, sample=0) == []


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_files_cut_or_swapped_are_found_and_named(
    suffix: str, copy: Path, texts: list[str], tokenizer_spec: str
) -> None:
    path = Path(f"{copy}.{suffix}")
    content = path.read_bytes()
    for size in (0, 10, len(content) - 1):
        path.write_bytes(content[:size])
        (found,) = faults_of(copy)
        assert found.startswith(f"{path}: {size} bytes, where the manifest says {len(content)}: truncated")
    path.write_bytes(content + b"\x00")
    assert str(path) in faults_of(copy)[0]
    path.unlink()
    assert faults_of(copy) == [f"{path}: no such file; the prefix is the path without .bin and .idx"]

    other = make_dataset(copy.with_name("other"), texts[-30:], tokenizer_spec)
    shutil.copy(f"{other}.{suffix}", path)
    assert any(fault.startswith(f"{path}: ") and "another dataset" in fault for fault in faults_of(copy))
    # and where somebody has made the manifest fit, the two files still do not fit each other
    vouch_for(copy)
    assert faults_of(copy)


def test_a_swap_of_equally_long_files_is_found(copy: Path) -> None:
    """The same documents in another order: sizes, counts and totals are all alike."""
    tokens, lengths = np.fromfile(f"{copy}.bin", np.uint16), lengths_of(copy)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    np.concatenate(parts[::-1]).tofile(f"{copy}.bin")

    found = faults_of(copy)
    assert "SHA-256" in found[0]
    vouch_for(copy)
    found = faults_of(copy)
    assert any("is its last, but not the end of document" in fault for fault in found)


def test_counts_of_the_manifest_are_held_against_the_files(copy: Path) -> None:
    path = Path(f"{copy}.manifest.json")
    manifest = json.loads(path.read_text())
    changes: list[tuple[str, dict[str, object]]] = [
        ("documents, but its sources gave", {"documents": DOCUMENTS + 1}),
        ("bytes are not", {"tokens": manifest["tokens"] + 1}),
        ("are not", {"dtype": "int32"}),
        ("none of uint16, int32", {"dtype": "int64"}),
        ("format 2", {"format": 2}),
        ("documents is None", {"documents": None}),
    ]
    for message, change in changes:
        changed = manifest | change
        path.write_text(json.dumps(changed | {"checksum": manifest_checksum(changed)}))
        assert any(message in fault for fault in faults_of(copy)), message
    path.write_text(json.dumps(manifest | {"text_bytes": 1}))
    assert faults_of(copy) == [f"{path} has been changed since it was written: its checksum is not that of its content"]


def test_special_tokens_may_stand_inside_only_where_they_were_parsed(tokenizer_spec: str, tmp_path: Path) -> None:
    texts = ["closes with </s>, he wrote", "plain"]
    parsed = make_dataset(tmp_path / "parsed", texts, tokenizer_spec, special_tokens="parse")
    ordinary = make_dataset(tmp_path / "ordinary", texts, tokenizer_spec)

    assert faults_of(parsed) == faults_of(ordinary) == []
    assert (verify(str(parsed)).compared, verify(str(ordinary)).compared) == ("text", "ids")


def lossy_folder(folder: Path) -> str:
    """A tokenizer that lowers letters and knows a few words only."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_changes_text_is_held_to_the_text_it_leaves(tmp_path: Path) -> None:
    spec = lossy_folder(tmp_path / "lossy")
    prefix = make_dataset(tmp_path / "data", ["One  TWO\tthree", "three FOUR one"], spec)

    report = verify(str(prefix))

    assert (report.faults, report.sampled, report.compared) == ([], 2, "text")


def test_a_tokenizer_that_is_elsewhere_or_another_is_said_so(copy: Path, tokenizer_spec: str, tmp_path: Path) -> None:
    path = Path(f"{copy}.manifest.json")
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["spec"] = "moved/away.model"
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))

    assert faults_of(copy) == ["tokenizer moved/away.model: No such file or directory"]
    assert verify(str(copy), tokenizer_spec=tokenizer_spec).faults == []
    assert faults_of(copy, sample=0) == []
    (found,) = verify(str(copy), tokenizer_spec=lossy_folder(tmp_path / "lossy")).faults
    assert "is not the one that the data was made with" in found


def test_borders_of_blocks_hide_and_invent_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = int(lengths_of(copy)[:7].sum())
    flip(Path(f"{copy}.idx"), index_fields(DOCUMENTS)["starts"][8 * 7], 0)
    vouch_for(copy)
    broken_index = faults_of(copy, sample=0)
    flip(Path(f"{copy}.idx"), index_fields(DOCUMENTS)["starts"][8 * 7], 0)
    for block in (1, 7, 8, DOCUMENTS):
        monkeypatch.setattr("data_tools.verify.BLOCK_DOCUMENTS", block)
        monkeypatch.setattr("data_tools.verify.BLOCK_TOKENS", before if block == 7 else 13 * block)
        vouch_for(copy)
        assert faults_of(copy, sample=0) == []
        flip(Path(f"{copy}.idx"), index_fields(DOCUMENTS)["starts"][8 * 7], 0)
        vouch_for(copy)
        assert faults_of(copy, sample=0) == broken_index
        flip(Path(f"{copy}.idx"), index_fields(DOCUMENTS)["starts"][8 * 7], 0)


def test_command_line_names_the_damaged_one_and_fails(whole: Path, copy: Path) -> None:
    Path(f"{copy}.bin").write_bytes(b"")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(SCRIPT), str(whole), str(copy), "--sample", "3", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plain, as_json = run(), run("--json")

    assert plain.returncode == as_json.returncode == 1
    assert plain.stdout.startswith(f"{whole}: whole: {DOCUMENTS} documents")
    assert f"{copy}: DAMAGED\n" in plain.stdout
    assert plain.stderr.count("\n") == 1
    assert f"verify: error: 1 of 2 datasets failed; the first fault: {copy}.bin: 0 bytes" in plain.stderr
    found = json.loads(as_json.stdout)
    assert not found["whole"]
    assert [(each["prefix"], len(each["faults"])) for each in found["datasets"]] == [(str(whole), 0), (str(copy), 1)]
