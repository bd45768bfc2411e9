"""Rows of data files, each with words for where it stands, so that an error can name it."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"

_MOST = "APEXLIB_MOST_UNPACKED"  # an environment variable

Row = tuple[str, dict[str, Any]]  # "file, row n" (from 1), and the row


def file_rows(path: Path, *, documents: bool = False) -> Iterator[Row]:
    """Rows of a file of objects with named fields; a file of `documents` may be plain text, its one field is `text`."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind == ".txt" and documents:
        text = _content(path).replace("\r\n", "\n")
        for number, document in enumerate(re.split(rf"(?m)^{re.escape(SEPARATOR)}[ \t]*$", text), 1):
            if document.strip():  # a file may begin or end with a separator
                yield f"{path}, document {number}", {"text": document.strip("\n")}
    elif kind == ".parquet":
        yield from _parquet_rows(path)
    elif kind == ".jsonl":
        for number, line in enumerate(_content(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON {type(row).__name__}; need an object with named fields")
            yield where, row
    else:
        raise ValueError(f"{path}: unknown kind of file; need .jsonl(.gz) or .parquet, for documents also .txt(.gz)")


def text_field(row: dict[str, Any], field: str, where: str) -> str:
    """Take a string from a row; a field that is missing or no string is an error that names the row."""
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(text := row[field], str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}; need a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: field {field!r} holds half a surrogate pair; need valid Unicode") from None
    return text


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, after row {number}: not readable as parquet ({error})") from None


def _content(path: Path) -> str:
    """Text of a file, unpacked, without a byte order mark."""
    most = int(os.environ.get(_MOST, 500_000_000))  # a few megabytes can unpack to more than any memory
    if path.suffix.lower() != ".gz":
        content = path.read_bytes()
    else:
        try:
            with gzip.open(path) as file:
                content = file.read(most + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not readable as gzip ({error})") from None
        if len(content) > most:
            raise ValueError(f"{path}: unpacks to more than {most:,} bytes; raise {_MOST}, or unpack it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = 1 + error.object[: error.start].count(b"\n"), error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte {byte:#04x} is not UTF-8; need UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
