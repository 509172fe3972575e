# SPDX-License-Identifier: Apache-2.0
"""Heads of GGUF files: what is in them, and that nobody's file does us harm."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf_files
from gguf_files import ALIGNMENT, Spec, entry, head, text
from infertune.budget.gguf_file import ModelError, read_model
from infertune.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]

KEYS = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": [2],
    "general.tags": ["a", "bb", ""],
    "tokenizer.ggml.scores": [0.5] * 5000,
    "tokenizer.chat_template": "x" * 5000,
}
TENSORS = [
    Spec("token_embd.weight", (64, 100), "q8_0"),
    Spec("blk.0.ffn_down.weight", (128, 64), "q4_0"),
    Spec("output_norm.weight", (64,), "f32"),
]
HEAD = head(KEYS, TENSORS)
COUNTS = 4 + 4  # where the number of tensors is


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path / "model.gguf", KEYS, TENSORS)


def test_what_is_there(model: Path) -> None:
    found = read_model(str(model))
    assert found.metadata["llama.attention.head_count_kv"] == (2,)
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["tokenizer.ggml.scores"] is None  # too long to be of use
    assert found.metadata["tokenizer.chat_template"] is None
    assert [(each.name, each.dims, each.type) for each in found.tensors] == [
        (spec.name, spec.dims, spec.type) for spec in TENSORS
    ]
    assert found.tensor_bytes == 64 * 100 // 32 * 34 + 128 * 64 // 32 * 18 + 64 * 4
    assert found.file_bytes == model.stat().st_size


def test_a_type_of_tomorrow_takes_the_room_up_to_the_next(tmp_path: Path) -> None:
    data = bytearray(HEAD)
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 999)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    os.truncate(path, len(data) + 7000 + 5000 + 256)
    first = read_model(str(path)).tensors[0]
    assert (first.type, first.bytes) == ("type 999", 6816)  # 6800, to the next 32


def test_parts_are_added(tmp_path: Path) -> None:
    names = split(tmp_path)
    found = read_model(str(names[0]))
    assert found.files == tuple(map(str, names))
    assert len(found.tensors) == 3
    assert found.file_bytes == sum(name.stat().st_size for name in names)


def split(directory: Path) -> list[Path]:
    names = [directory / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, (name, tensor) in enumerate(zip(names, TENSORS, strict=True)):
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
        gguf_files.write(name, {**(KEYS if number == 0 else {}), **keys}, [tensor])
    return names


# -- broken ones --------------------------------------------------------------------

Make = Callable[[Path], Path]


def data(content: bytes, size: int | None = None) -> Make:
    def make(directory: Path) -> Path:
        path = directory / "model.gguf"
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)
        return path

    return make


def cut(size: int) -> Make:
    return data(HEAD[:size])


def patched(offset: int, form: str, value: int) -> Make:
    content = bytearray(HEAD)
    struct.pack_into(form, content, offset, value)
    return data(bytes(content), len(HEAD) + 20_000)


def after(needle: bytes, skip: int, form: str, value: int) -> Make:
    return patched(HEAD.index(needle) + len(needle) + skip, form, value)


def only(*entries: bytes, keys: int | None = None, size: int | None = None) -> Make:
    count = len(entries) if keys is None else keys
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(entries)
    return data(content, size)


def keyed(**changed: object) -> Make:
    keys = {**KEYS, **{f"llama.{name}": value for name, value in changed.items()}}
    kept = {key: value for key, value in keys.items() if value is not None}

    def make(directory: Path) -> Path:
        return gguf_files.write(directory / "model.gguf", kept, TENSORS)  # type: ignore[arg-type]

    return make


def fifo(directory: Path) -> Path:
    path = directory / "model.gguf"
    os.mkfifo(path)
    return path


def loop(directory: Path) -> Path:
    path = directory / "model.gguf"
    path.symlink_to(path)
    return path


def without_part(number: int) -> Make:
    def make(directory: Path) -> Path:
        names = split(directory)
        names[number].unlink()
        return names[0]

    return make


def parts(change: Callable[[list[Path]], Path]) -> Make:
    return lambda directory: change(split(directory))


def foreign_part(names: list[Path]) -> Path:
    gguf_files.write(names[1], {"split.no": 1, "split.count": 3}, TENSORS[1:])
    return names[0]


def part_twice(names: list[Path]) -> Path:
    names[2].write_bytes(names[1].read_bytes())
    return names[0]


def tensor_twice(names: list[Path]) -> Path:
    gguf_files.write(names[1], {"split.no": 1, "split.count": 3}, TENSORS[:1])
    return names[0]


def lines_in_its_name(directory: Path) -> Path:
    path = directory / "mo\ndel\x1b[31m.gguf"
    path.write_bytes(b"nothing")
    return path


def renamed_part(names: list[Path]) -> Path:
    return names[0].rename(names[0].with_name("model.gguf"))


def many_parts(directory: Path) -> Path:
    keys = {**KEYS, "split.no": 0, "split.count": 65535}
    return gguf_files.write(directory / "m-00001-of-65535.gguf", keys, TENSORS)


def overlong_tensors(directory: Path) -> Path:
    path = gguf_files.write(directory / "model.gguf", KEYS, TENSORS)
    os.truncate(path, path.stat().st_size - 300)
    return path


TEXTS = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2**20)
GIB = 2**30

BROKEN: dict[str, tuple[Make, str]] = {
    "empty": (data(b""), "not a GGUF file"),
    "one byte": (data(b"G"), "not a GGUF file"),
    "magic only": (cut(4), "ends in the middle of its version"),
    "cut in the version": (cut(6), "ends in the middle of its version"),
    "cut in the counts": (cut(12), "ends in the middle of its counts"),
    "cut after the counts": (cut(24), "says it has 10 keys"),
    "cut in a key": (cut(HEAD.index(b"feed_forward")), "bytes left in the file"),
    "cut in an array": (cut(5000), "bytes left in the file"),
    "cut in the template": (cut(HEAD.index(b"xxxx") + 7), "bytes left in the file"),
    "cut in the tensors": (cut(HEAD.index(b"ffn_down") + 30), "ends in the middle of"),
    "cut before the data": (cut(len(HEAD)), "behind the end of the file"),
    "cut in the data": (overlong_tensors, "behind the end of the file"),
    "wrong magic": (data(b"GGML" + HEAD[4:]), "not a GGUF file"),
    "safetensors": (data(b'\x08\0\0\0\0\0\0\0{"a":1} '), "not a GGUF file"),
    "an ELF program": (data(b"\x7fELF" + bytes(1000)), "not a GGUF file"),
    "1 GiB of zeros": (data(b"", GIB), "not a GGUF file"),
    "1 GiB of zeros after the magic": (data(b"GGUF", GIB), "GGUF version 0"),
    "big-endian": (patched(4, ">I", 3), "big-endian"),
    "version 1": (patched(4, "<I", 1), "GGUF version 1"),
    "version 99": (patched(4, "<I", 99), "GGUF version 99"),
    "2^64-1 tensors": (patched(COUNTS, "<Q", 2**64 - 1), "tensors"),
    "100000 tensors": (patched(COUNTS, "<Q", 100_000), "says it has 100000 tensors"),
    "one tensor too many": (patched(COUNTS, "<Q", 4), "tensor"),
    "2^63 keys": (patched(COUNTS + 8, "<Q", 2**63), "keys"),
    "one key too many": (patched(COUNTS + 8, "<Q", 11), "in the file"),
    "a key of 2^63 bytes": (only(struct.pack("<Q", 2**63), bytes(100)), "a key of"),
    "a text of 2^64-1 bytes": (
        only(text("general.name") + struct.pack("<IQ", 8, 2**64 - 1), bytes(100)),
        "general.name",
    ),
    "an array of 2^60 numbers": (
        only(text("a") + struct.pack("<IIQ", 9, 10, 2**60), bytes(100)),
        "the value of 'a'",
    ),
    "an array of 2^61 texts": (
        only(text("a") + struct.pack("<IIQ", 9, 8, 2**61), bytes(100)),
        "texts",
    ),
    "10^8 texts that a sparse file would hold": (
        only(text("a") + struct.pack("<IIQ", 9, 8, 100_000_000), keys=1, size=GIB),
        "texts",
    ),
    "many arrays of many texts": (only(*[TEXTS] * 3, keys=3, size=GIB), "a"),
    "an array of arrays": (
        only(text("a") + struct.pack("<IIQ", 9, 9, 1), bytes(100)),
        "array of type 9",
    ),
    "a head of 1 GiB": (
        only(text("a") + struct.pack("<IIQ", 9, 0, GIB - 1000), keys=1, size=GIB),
        "longer than 256 MiB",
    ),
    "a value of type 77": (only(text("a") + struct.pack("<I", 77), bytes(100)), "of type 77"),
    "the same key twice": (only(entry("a", 1), entry("a", 2)), "'a' twice"),
    "a tensor of 9 dimensions": (after(b"token_embd.weight", 0, "<I", 9), "9 dimensions"),
    "a tensor of 2^63 rows": (after(b"token_embd.weight", 12, "<Q", 2**63), "has the size"),
    "a tensor without rows": (after(b"token_embd.weight", 12, "<Q", 0), "has the size"),
    "a row of half a block": (after(b"token_embd.weight", 4, "<Q", 48), "no whole blocks"),
    "a tensor at 2^63": (after(b"token_embd.weight", 24, "<Q", 2**63), "behind the end"),
    "an alignment of 7": (only(entry("general.alignment", 7)), "no power of two"),
    "no tensors": (only(), "holds no tensors"),
    "no keys": (data(head({}, TENSORS), 20_000), "does not say its architecture"),
    "an architecture that is none": (
        data(head({"general.architecture": "\x1b[2J"}, TENSORS), 20_000),
        "does not say its architecture",
    ),
    "an image encoder": (
        data(head({"general.architecture": "clip"}, TENSORS), 20_000),
        "not a language model",
    ),
    "no layers": (keyed(block_count=0), "0 layers"),
    "10^9 layers": (keyed(block_count=10**9), "layers"),
    "layers that are a text": (keyed(block_count="many"), "is 'many'"),
    "width that is not a number": (keyed(embedding_length=float("nan")), "is nan"),
    "heads that are negative": (keyed(**{"attention.head_count": -1}), "is -1"),
    "no width": (keyed(embedding_length=None), "has no 'llama.embedding_length'"),
    "heads for one layer of two": (keyed(block_count=2), "has 1 values for 2 layers"),
    "the second part missing": (without_part(1), "is missing (2 of 3 are there)"),
    "not the first part": (parts(lambda names: names[1]), "not the first part"),
    "a part of another model": (parts(foreign_part), "and it says 3"),
    "one part under two names": (parts(part_twice), "split.no is 1, and by its name it would be 2"),
    "one tensor in two parts": (parts(tensor_twice), "two of its parts hold the same tensor"),
    "no heads": (keyed(**{"attention.head_count": 0}), "head_count' is 0 or missing"),
    "heads nobody counted": (keyed(**{"attention.head_count": None}), "head_count' is 0 or"),
    "heads of no length": (keyed(**{"attention.key_length": 0}), "key_length' is 0 or missing"),
    "lines in its name": (lines_in_its_name, r"mo\ndel\x1b[31m.gguf: not a GGUF file"),
    "a first part of another name": (parts(renamed_part), "not named so"),
    "65535 parts": (many_parts, "65535 parts"),
    "a FIFO": (fifo, "not a regular file"),
    "a directory": (lambda directory: directory, "not a regular file"),
    "a link to itself": (loop, "symbolic links"),
    "nothing": (lambda directory: directory / "none.gguf", "No such file"),
    "/dev/zero": (lambda _: Path("/dev/zero"), "not a regular file"),
    "/proc/self/mem": (lambda _: Path("/proc/self/mem"), "not a GGUF file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = BROKEN[name]
    path = make(tmp_path)
    assert main(["fit", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line, *hint = err.splitlines()
    assert line.startswith("infertune: /")
    assert says in line
    assert len(line) < 400
    assert len(hint) <= 1
    assert "\x1b" not in err


def test_a_file_that_may_not_be_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(model))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ModelError, match="Permission denied"):
        read_model(str(model))
    assert main(["fit", str(model)]) == 4
    assert capsys.readouterr().err == f"infertune: {model}: Permission denied\n"


def test_a_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for words in (["fit", "./m.gguf"], ["expect", "./m.gguf"], ["doctor", "--smoke", "./m.gguf"]):
        assert main(words) == 2
        assert "./m.gguf: the current directory is gone\n" in capsys.readouterr().err


def test_every_cut_and_every_flipped_byte_is_an_error_or_a_model(tmp_path: Path) -> None:
    """Nothing but ModelError comes out, wherever the file is damaged."""
    from infertune.budget.shape import read_shape

    small = head({key: KEYS[key] for key in list(KEYS)[:7]}, TENSORS)  # type: ignore[arg-type]
    path = tmp_path / "model.gguf"
    fine = 0
    for position in range(len(small)):
        for content in (
            small[:position],
            small[:position] + bytes([small[position] ^ 0xFF]) + small[position + 1 :],
        ):
            path.write_bytes(content)
            os.truncate(path, len(content) + 20_000)
            try:
                read_shape(read_model(str(path)))
                fine += 1
            except ModelError:
                pass
    assert 0 < fine < len(small)


def test_broken_files_take_little_memory_and_no_time(tmp_path: Path) -> None:
    """All of them in one process, which the kernel stops at 400 MB and 60 s of CPU."""
    paths = []
    for number, (make, _) in enumerate(BROKEN.values()):
        directory = tmp_path / str(number)
        directory.mkdir()
        paths.append(str(make(directory)))
    program = (
        "import json, sys\n"
        "from infertune.budget.gguf_file import ModelError, read_model\n"
        "from infertune.budget.shape import read_shape\n"
        "bad = 0\n"
        "for path in json.load(sys.stdin):\n"
        "    try:\n"
        "        read_shape(read_model(path))\n"
        "    except ModelError:\n"
        "        bad += 1\n"
        # Not ru_maxrss: that of whoever forked us stays in it across exec.
        "status = open('/proc/self/status').read()\n"
        "print(bad, status.partition('VmHWM:')[2].split()[0])\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20, 400 * 2**20))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        input=json.dumps(paths),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bad, kib = map(int, done.stdout.split())
    assert bad == len(BROKEN)
    assert kib < 200 * 1024


def test_the_data_is_where_the_head_says() -> None:
    assert len(HEAD) % ALIGNMENT == 0
