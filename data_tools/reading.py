"""Reads the pieces of an input as raw records: lines of JSON, files of source code, rows of a column.

Every piece is read in chunks of about a megabyte, always the same ones, so that a stopped run can go on after the last
chunk that it kept. What was read of a file is hashed on the way.
"""

import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.opening import UnreadableInputError, open_input, open_parquet
from data_tools.sources import COMPRESSED_READ_BYTES, Piece, open_hub_dataset
from dsmoe_megatron.errors import DataError

CHUNK_BYTES = 1 << 20
PLAIN_READ_BYTES = 1 << 20
ZSTD_MAX_WINDOW_BYTES = 1 << 31  # of `zstd --long=31`; the library's own limit is 128 MiB
ROWS_PER_BATCH = 256
HUB_RECORDS_PER_CHUNK = 256

Form = Literal["json", "file", "value"]


@dataclass
class Chunk:
    """Some records of one source.

    Args:
        source: number of its source.
        path: of the source.
        form: json: lines of JSON; file: contents of source files; value: texts, or what stands in their place.
        records: in order.
        first: number of the first record: a line or row from 1; None where the lines before are not known.
        offset: byte of the file that the first record begins at, where `first` is None.
        names: of the files, relative to the source.
        sets: name of the set that each value belongs to, or nothing where they are not asked for.
        consumed: bytes of the stored input that it stands for.
        damage: why nothing more can be read of its file.
    """

    source: int
    path: str
    form: Form
    records: list[Any] = field(default_factory=list)
    first: int | None = 1
    offset: int = 0
    names: list[str] = field(default_factory=list)
    sets: list[Any] = field(default_factory=list)
    consumed: int = 0
    damage: str = ""


@dataclass(frozen=True)
class Columns:
    """Where a record keeps what is wanted.

    Args:
        text: key of the text.
        set: keys, from the outside in, of the name of the set; none where sets are not asked for.
    """

    text: str = "text"
    set: tuple[str, ...] = ()


class Digest:
    """SHA-256 of what a piece is made of."""

    def __init__(self) -> None:
        self._hash: Any = hashlib.sha256()

    def update(self, content: bytes) -> None:
        self._hash.update(content)

    def hexdigest(self) -> str:
        return str(self._hash.hexdigest())


def read_piece(piece: Piece, columns: Columns, digest: Digest | None = None) -> Iterator[Chunk]:
    """Everything in a piece, in order.

    Args:
        piece: of an input.
        columns: of the records.
        digest: takes in the stored bytes of the piece; whole once all chunks have been read. None where nobody asks,
            since a parquet file is read once more for it.

    Raises:
        UnreadableInputError: a file cannot be read, is damaged, or ends too early; all whole records before the damage
            have been given by then.
        DataError: there is no such column.
    """
    if piece.kind == "tree":
        yield from _read_tree(piece, digest or Digest())
    elif piece.kind == "parquet":
        # the first piece answers for the whole file, which is not read from end to end otherwise
        if digest is not None and piece.start == 0:
            _take_in_file(piece.path, digest)
        yield from _read_parquet(piece, columns)
    elif piece.kind == "hub":
        yield from _read_hub(piece, columns)
    else:
        yield from _read_lines(piece, digest or Digest())


def _read_lines(piece: Piece, digest: Digest) -> Iterator[Chunk]:
    """The lines that begin in the piece, each whole."""
    blocks = (_plain_blocks if piece.kind == "jsonl" else _unpacked_blocks)(piece, digest)
    stop = math.inf if piece.stop is None else piece.stop
    known = piece.kind == "compressed" or piece.start == 0
    line, line_start = 1, piece.start  # number and first byte of the line that is unfinished, or begins next
    chunk, held = Chunk(piece.source, piece.path, "json"), 0
    unfinished: list[bytes] = []
    begun_here: bool | None = None  # whether that line began in the piece; None where it has not begun
    damage: DataError | None = None
    while True:
        try:
            block, position, consumed = next(blocks)
        except StopIteration:
            break
        except UnreadableInputError as error:
            damage = error
            break
        here = piece.start <= position < stop
        if begun_here is None:
            begun_here = here
        if position >= stop and not begun_here:
            break
        chunk.consumed += consumed
        first, *more = block.split(b"\n")
        unfinished.append(first)
        if not more:
            continue
        # joined only when the line ends, so that a very long one is not copied again and again
        lines = [b"".join(unfinished)] if begun_here else []
        lines += more[:-1] if here else []
        if lines and not chunk.records:
            chunk.first = (line if begun_here else line + 1) if known else None
            chunk.offset = line_start if begun_here else position + len(first) + 1
        chunk.records += lines
        held += sum(map(len, lines))
        line += len(more)
        line_start = position + len(block) - len(more[-1])
        unfinished, begun_here = ([more[-1]], here) if more[-1] else ([], None)
        if held >= CHUNK_BYTES:
            yield chunk
            chunk, held = Chunk(piece.source, piece.path, "json"), 0
    if begun_here and unfinished and damage is None:
        if not chunk.records:
            chunk.first, chunk.offset = line if known else None, line_start
        chunk.records.append(b"".join(unfinished))
    yield chunk
    if damage is not None:
        raise damage


def _plain_blocks(piece: Piece, digest: Digest) -> Iterator[tuple[bytes, int, int]]:
    """Blocks of a file from the byte before the piece on, each with its position and the bytes of the piece in it.
    Where the piece ends a block ends."""
    with open_input(piece.path) as file:
        position = piece.start
        if position:
            # whether a line begins at the start is told by the byte before
            file.seek(position - 1)
            yield file.read(1), position - 1, 0
        while True:
            inside = piece.stop is None or position < piece.stop
            left = piece.stop - position if inside and piece.stop is not None else PLAIN_READ_BYTES
            block = file.read(min(PLAIN_READ_BYTES, left))
            if not block:
                return
            if inside:
                digest.update(block)
            yield block, position, len(block) if inside else 0
            position += len(block)


def _unpacked_blocks(piece: Piece, digest: Digest) -> Iterator[tuple[bytes, int, int]]:
    """Unpacked blocks of a file from its beginning on, each with the position of the packed one that it came from and
    the bytes of the piece in that."""
    stop = math.inf if piece.stop is None else piece.stop
    with open_input(piece.path) as file:
        decompressor, inside, begun, position = _decompressor(piece.path), False, False, 0
        while packed := file.read(COMPRESSED_READ_BYTES):
            size = len(packed)
            here = piece.start <= position < stop
            if here:
                digest.update(packed)
            consumed = size if here else 0
            while packed:
                if not inside and not (packed := packed.lstrip(b"\0")):
                    break  # zeros after the last member are padding (tape blocks)
                try:
                    begun = inside = True
                    block = decompressor.decompress(packed)
                except Exception as error:  # zlib.error or zstandard.ZstdError
                    raise UnreadableInputError(
                        f"{piece.path}: damaged compressed data after byte {position} ({error}): fetch the file again"
                    ) from error
                if block:
                    yield block, position, consumed
                    consumed = 0
                packed = decompressor.unused_data
                if decompressor.eof:  # one file may hold several compressed streams one after the other
                    decompressor, inside = _decompressor(piece.path), False
            position += size
        if inside or not begun:  # of nothing, too, a packer makes some bytes; a failed copy leaves none, or zeros
            raise UnreadableInputError(
                f"{piece.path}: the compressed data ends too early, at byte {position}: fetch the file again"
            )


def _decompressor(path: str) -> Any:
    """An object with decompress, eof and unused_data: unlike the libraries' file readers it tells a cut stream."""
    if path.endswith(".gz"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES).decompressobj()


def _read_tree(piece: Piece, digest: Digest) -> Iterator[Chunk]:
    chunk, held = Chunk(piece.source, piece.path, "file"), 0
    for name in piece.files:
        try:
            with open_input(str(Path(piece.path, name))) as file:
                content = file.read()
        except UnreadableInputError:
            yield chunk
            raise
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        chunk.records.append(content)
        chunk.names.append(name)
        chunk.consumed += len(content)
        held += len(content)
        if held >= CHUNK_BYTES:
            yield chunk
            chunk, held = Chunk(piece.source, piece.path, "file"), 0
    yield chunk


def _take_in_file(path: str, digest: Digest) -> None:
    with open_input(path) as file:
        while block := file.read(PLAIN_READ_BYTES):
            digest.update(block)


def _read_parquet(piece: Piece, columns: Columns) -> Iterator[Chunk]:
    with open_parquet(piece.path) as parquet:
        names = _wanted_columns(parquet.schema_arrow.names, columns, piece.path)
        rows_of = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
        # pyarrow would leave the others out without a word
        _require_rows(piece.path, sum(rows_of), parquet.metadata.num_rows)
        groups = range(piece.start, len(rows_of) if piece.stop is None else piece.stop)
        row, rows = 1 + sum(rows_of[: piece.start]), sum(rows_of[group] for group in groups)
        for batch in parquet.iter_batches(ROWS_PER_BATCH, row_groups=list(groups), columns=names):
            yield Chunk(
                piece.source,
                piece.path,
                "value",
                _raw_values(batch.column(batch.schema.names.index(columns.text))),
                first=row,
                sets=_set_names(batch, columns.set),
                consumed=round(piece.bytes * len(batch) / max(rows, 1)),
            )
            row += len(batch)
        _require_rows(piece.path, row - 1 - sum(rows_of[: piece.start]), rows)


def _require_rows(path: str, found: int, told: int) -> None:
    if found != told:
        raise UnreadableInputError(f"{path}: damaged parquet file ({found} rows where {told} are told): fetch it again")


def _wanted_columns(found: Sequence[str], columns: Columns, path: str) -> list[str]:
    wanted = [columns.text, *columns.set[:1]]
    for name in wanted:
        if name not in found:
            key = "--text-key" if name == columns.text else "--set-key"
            raise DataError(f"{path}: no column {name!r} (columns: {', '.join(found[:8])}); see {key}")
    return wanted


def _raw_values(column: Any) -> list[Any]:
    """Texts as bytes, since a file may hold bytes that are no UTF-8."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    return _python_values(column)


def _set_names(batch: Any, keys: tuple[str, ...]) -> list[Any]:
    return [look_up(value, keys[1:]) for value in _python_values(batch.column(keys[0]))] if keys else []


def _python_values(column: Any) -> list[Any]:
    """None stands for what Python has no value for: a name that is no UTF-8, a date after the year 9999."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        return [_python_value(scalar) for scalar in column]
    return values


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def look_up(record: Any, keys: Sequence[str]) -> Any:
    """What a record holds under nested keys; None where there is nothing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _read_hub(piece: Piece, columns: Columns) -> Iterator[Chunk]:
    dataset, _ = open_hub_dataset(piece.path)
    shard = iter(dataset.shard(num_shards=dataset.num_shards, index=piece.start))
    number = 1
    while True:
        chunk = Chunk(piece.source, f"{piece.path}#{piece.start}", "value", first=number)
        for record in _some(shard, piece.path):
            if columns.text not in record:
                raise DataError(f"{piece.path}: no column {columns.text!r} (columns: {', '.join(record)})")
            chunk.records.append(record[columns.text])
            chunk.sets += [look_up(record, columns.set)] if columns.set else []
        if not chunk.records:
            return
        number += len(chunk.records)
        yield chunk


def _some(shard: Iterator[Any], path: str) -> Iterator[Any]:
    for _ in range(HUB_RECORDS_PER_CHUNK):
        try:
            yield next(shard)
        except StopIteration:
            return
        except Exception as error:  # the library, the hub and the network have errors of their own
            raise UnreadableInputError(f"{path}: {error or type(error).__name__}") from error


def line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line of a plain file that begins at this byte."""
    lines, left = 1, offset
    with open_input(path) as file:
        while left and (block := file.read(min(PLAIN_READ_BYTES, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
