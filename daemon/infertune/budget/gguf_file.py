# SPDX-License-Identifier: Apache-2.0
"""The head of a GGUF file: metadata and what tensors there are, never a tensor's data.

Format: ggml/docs/gguf.md of llama.cpp, versions 2 and 3.  The file may be anybody's, so every
count is held against what the file can hold before anything is made of it: the largest head
costs a second and a few MiB.  The library ``gguf`` makes an object of every element of every
array; why it is not used is in docs/dependencies.md.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from infertune.base.errors import Exit, UsageError
from infertune.base.records import dataclass
from infertune.base.units import KIB, MIB, format_size

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | None
"""None: a text or an array that is too long to be a property of a model's shape."""

HEAD_BYTES = 256 * MIB
"""Longest head: vocabularies of 260,000 tokens take 6 MiB to 20 MiB."""
_KEYS = 65_536
_TENSORS = 131_072
"""Kimi K2 has 1,100, a model with one tensor per expert some 40,000."""
_ELEMENTS = 2_000_000
"""Texts in all arrays together: 260,000 tokens, 510,000 merges."""
_KEPT_TEXT = 4 * KIB
_KEPT_ARRAY = 4096
"""Values for each layer are kept; scores of a vocabulary are not."""
_KEY_BYTES = 65_535
"""The format's own limit."""
_PARTS = 1000
_CHUNK = MIB

_SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 36),
    10: ("q2_K", 256, 84),
    11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144),
    13: ("q5_K", 256, 176),
    14: ("q6_K", 256, 210),
    15: ("q8_K", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
"""ggml's types by number: name, elements of a block, bytes of a block (ggml-common.h).

A type that is not here takes the room up to the next tensor.
"""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dims: tuple[int, ...]
    """Innermost first: ``(n_embd, n_vocab)``."""
    type: str
    bytes: int

    @property
    def elements(self) -> int:
        count = 1
        for dim in self.dims:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The heads of all files of one model."""

    files: tuple[str, ...]
    file_bytes: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


class ModelError(UsageError):
    """A file is not a model, or not a whole one.  The message starts with its path."""


class ModelNotPermitted(ModelError):
    """The caller may not read it."""

    exit_code = Exit.NOT_PERMITTED


def read_model(path: str) -> ModelFile:
    """Read the head of the model at ``path``, and those of its other parts.  Raises ModelError."""
    first = _read_head(path)
    heads = [first]
    for number, part in enumerate(_other_parts(path, first), 1):
        heads.append(_read_head(part))
        said = heads[-1].metadata.get("split.no")
        if said != number:
            raise ModelError(
                f"{part}: split.no is {said!r}, and by its name it would be {number}",
                hint="a part under another part's name",
            )
    tensors = tuple(tensor for head in heads for tensor in head.tensors)
    if not tensors:
        raise ModelError(f"{path}: holds no tensors", hint="only a vocabulary, or a damaged file")
    total = first.metadata.get("split.tensors.count")
    if len(heads) > 1 and isinstance(total, int) and total != len(tensors):
        raise ModelError(
            f"{path}: its parts hold {len(tensors)} tensors, and it says {total}",
            hint="a part of another model, or of another version of it",
        )
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError(
            f"{path}: two of its parts hold the same tensor",
            hint="a part of another model, or of another version of it",
        )
    return ModelFile(
        files=tuple(head.path for head in heads),
        file_bytes=sum(head.size for head in heads),
        metadata=first.metadata,
        tensors=tensors,
    )


@dataclass(frozen=True, slots=True)
class _Head:
    path: str
    size: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]


def _other_parts(path: str, first: _Head) -> list[str]:
    count, number = first.metadata.get("split.count"), first.metadata.get("split.no")
    if not isinstance(count, int) or count <= 1:
        return []
    if count > _PARTS:
        raise ModelError(f"{path}: says it has {count} parts; {_PARTS} are possible")
    name = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path, re.DOTALL)
    if not name or int(name[3]) != count:
        raise ModelError(
            f"{path}: one of {count} parts, and not named so",
            hint=f"the first part is named NAME-00001-of-{count:05}.gguf",
        )
    if number != 0 or int(name[2]) != 1:
        raise ModelError(
            f"{path}: not the first part", hint=f"give {name[1]}00001-of-{count:05}.gguf"
        )
    parts = [f"{name[1]}{part:05}-of-{count:05}.gguf" for part in range(2, count + 1)]
    missing = [part for part in parts if not os.path.exists(part)]
    if missing:
        raise ModelError(
            f"{missing[0]}: this part is missing ({count - len(missing)} of {count} are there)"
        )
    return parts


def _read_head(path: str) -> _Head:
    try:
        # Asked first: to open a device may already do something.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelError(f"{path}: not a regular file", hint="a model is a GGUF file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        kind = ModelNotPermitted if isinstance(error, PermissionError) else ModelError
        raise kind(f"{path}: {error.strerror}") from None
    except ValueError:  # a path with a NUL
        raise ModelError(f"{path!r}: not a path") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: not a regular file", hint="a model is a GGUF file")
        cursor = _Cursor(path, fd, status.st_size)
        return _parse(cursor)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)


class _Cursor:
    """Reads forward through the head; knows how much of the file is left."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._chunk = b""
        self._start = 0
        """Offset of the chunk in the file."""
        self._next = 0
        """Offset in the chunk of what comes next."""
        self.elements = 0
        """Texts of arrays seen so far."""

    @property
    def offset(self) -> int:
        return self._start + self._next

    @property
    def left(self) -> int:
        return self.size - self.offset

    def bad(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.path}: {problem} (at byte {self.offset})",
            hint="the file is damaged, or was not loaded to its end",
        )

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; callers have bounded ``count``."""
        if count > self.left:
            raise self.bad(f"ends in the middle of {what}")
        if self.offset + count > HEAD_BYTES:
            raise self.bad(f"its head is longer than {format_size(HEAD_BYTES)}")
        if self._next + count > len(self._chunk):
            self._start, self._next = self.offset, 0
            self._chunk = os.pread(self._fd, max(count, _CHUNK), self._start)
            if len(self._chunk) < count:
                raise self.bad(f"ends in the middle of {what}")
        begin = self._next
        self._next += count
        return self._chunk[begin : self._next]

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise self.bad(f"{what} of {count} bytes, with {self.left} bytes left in the file")
        if self.offset + count > HEAD_BYTES:
            raise self.bad(f"its head is longer than {format_size(HEAD_BYTES)}")
        self._next += count
        if self._next > len(self._chunk):
            self._start, self._next, self._chunk = self.offset, 0, b""

    def number(self, form: str, what: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form), what))[0])

    def text(self, what: str, longest: int) -> str:
        size = self.number("<Q", what)
        if size > min(longest, self.left):
            raise self.bad(f"{what} of {size} bytes, with {self.left} bytes left in the file")
        return self.take(size, what).decode("utf-8", "replace")

    def skip_texts(self, count: int, what: str) -> None:
        """Pass over an array of texts.  A vocabulary is most of a head: no call for each text."""
        self.elements += count
        if count * 8 > self.left or self.elements > _ELEMENTS:
            raise self.bad(f"{what} of {count} texts, with {self.left} bytes left in the file")
        length = struct.Struct("<Q").unpack_from
        while count:
            chunk, position, end = self._chunk, self._next, len(self._chunk) - 8
            while count and position <= end:
                size = length(chunk, position)[0]
                position += 8 + size
                count -= 1
                if position > end:
                    break
            if position == self._next:  # nothing left in this chunk: get the next one
                self.take(8, what)
                self._next -= 8
                continue
            step = position - self._next
            self.skip(step, what)


def _parse(cursor: _Cursor) -> _Head:
    magic = cursor.take(4, "its first four bytes") if cursor.left >= 4 else b""
    if magic != b"GGUF":
        raise ModelError(
            f"{cursor.path}: not a GGUF file", hint="llama-server loads models in GGUF format"
        )
    version = cursor.number("<I", "its version")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise ModelError(
                f"{cursor.path}: a big-endian GGUF file",
                hint="llama.cpp loads it on a big-endian machine only",
            )
        raise ModelError(
            f"{cursor.path}: GGUF version {version}", hint="versions 2 and 3 are known"
        )
    tensor_count = cursor.number("<Q", "its counts")
    key_count = cursor.number("<Q", "its counts")
    # A key takes 13 bytes at least, a tensor 32.
    if key_count > min(_KEYS, cursor.left // 13):
        raise cursor.bad(f"says it has {key_count} keys")
    if tensor_count > min(_TENSORS, cursor.left // 32):
        raise cursor.bad(f"says it has {tensor_count} tensors")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.text("a key", _KEY_BYTES)
        if key in metadata:
            raise cursor.bad(f"has the key '{_short(key)}' twice")
        metadata[key] = _value(cursor, key)
    return _Head(cursor.path, cursor.size, metadata, _tensors(cursor, tensor_count, metadata))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _value(cursor: _Cursor, key: str) -> Value:
    what = f"the value of '{_short(key)}'"
    kind = cursor.number("<I", what)
    if kind == _STRING:
        size = cursor.number("<Q", what)
        if size > _KEPT_TEXT:
            cursor.skip(size, what)
            return None
        return cursor.take(size, what).decode("utf-8", "replace")
    if kind != _ARRAY:
        return _scalar(cursor, kind, what)
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    if kind == _STRING:
        cursor.skip_texts(count, what)
        return None
    if kind not in _SCALARS:
        raise cursor.bad(f"{what} is an array of type {kind}")
    width = struct.calcsize(_SCALARS[kind])
    if count > _KEPT_ARRAY:
        cursor.skip(count * width, what)
        return None
    data = cursor.take(count * width, what)
    return tuple(each[0] for each in struct.iter_unpack(_SCALARS[kind], data))


def _scalar(cursor: _Cursor, kind: int, what: str) -> Scalar:
    if kind not in _SCALARS:
        raise cursor.bad(f"{what} is of type {kind}")
    form = _SCALARS[kind]
    value: Scalar = struct.unpack(form, cursor.take(struct.calcsize(form), what))[0]
    return value


def _tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Value]) -> tuple[Tensor, ...]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in {2**power for power in range(21)}:
        raise cursor.bad(f"general.alignment is {alignment}, which is no power of two")
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for _ in range(count):
        name = cursor.text("a tensor's name", _KEY_BYTES)
        if name in names:
            raise cursor.bad(f"has the tensor '{_short(name)}' twice")
        names.add(name)
        what = f"the tensor '{_short(name)}'"
        rank = cursor.number("<I", what)
        if not 1 <= rank <= 4:
            raise cursor.bad(f"{what} has {rank} dimensions")
        dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, what))
        kind, offset = cursor.number("<I", what), cursor.number("<Q", what)
        found.append((name, dims, kind, offset))
    data = cursor.size - -(-cursor.offset // alignment) * alignment if found else 0
    ends = _ends([offset for *_, offset in found], data)
    return tuple(_tensor(cursor, each, data, ends) for each in found)


def _ends(offsets: list[int], data: int) -> Callable[[int], int]:
    """Where the room of a tensor that starts at an offset ends: at the next one's start."""
    ordered = [*sorted(set(offsets)), data]
    return dict(pairwise(ordered)).__getitem__


def _tensor(
    cursor: _Cursor,
    found: tuple[str, tuple[int, ...], int, int],
    data: int,
    end_of: Callable[[int], int],
) -> Tensor:
    name, dims, kind, offset = found
    what = f"the tensor '{_short(name)}'"
    elements = 1
    for dim in dims:
        elements *= dim
    if not 0 < elements < 2**63:
        raise cursor.bad(f"{what} has the size {' x '.join(map(str, dims))}")
    if offset > data:
        raise cursor.bad(f"{what} starts behind the end of the file")
    if kind not in BLOCKS:
        return Tensor(name, dims, f"type {kind}", end_of(offset) - offset)
    word, block, width = BLOCKS[kind]
    if dims[0] % block:
        raise cursor.bad(f"{what}: rows of {dims[0]} are no whole blocks of {word}")
    size = elements // block * width
    if offset + size > data:
        raise cursor.bad(
            f"{what} ends {format_size(offset + size - data)} behind the end of the file"
        )
    return Tensor(name, dims, word, size)


def tensors_of_layer(tensors: tuple[Tensor, ...]) -> Iterator[tuple[int | None, Tensor]]:
    """Every tensor with the number of its layer; None for embedding, output and the like."""
    for tensor in tensors:
        match = re.match(r"blk\.(\d{1,6})\.", tensor.name)
        yield (int(match[1]) if match else None), tensor
