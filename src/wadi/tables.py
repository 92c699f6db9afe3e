"""Read texts of a user, for every command: files with a text in each line or in each row of a table."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".json", ".parquet")
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its place: the line of a text file, or the row of a table, from 1."""

    text: str
    line: int


def read_text(path: str | os.PathLike) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        WadiError: the file cannot be read, has another encoding, or holds NUL bytes.
    """
    with explain_os_errors(path, "read the file"):
        content = Path(path).read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise WadiError(f"{path}: is UTF-16 text, not UTF-8 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise WadiError(f"{path}: not UTF-8 text (line {line}: {error.reason}); save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise WadiError(f"{path}: line {line} holds a NUL byte; it is no text, or UTF-16: save it as UTF-8")
    return text


def text_lines(text: str) -> list[str]:
    """Lines of a text as editors count them. U+2028, U+0085 and vertical tabs do not end a line."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_rows(path: str | os.PathLike) -> Rows:
    """Rows of a .jsonl, .csv or .tsv file, and of a .json file that holds a list: (line, {column: value}).

    Lines and rows are counted from 1. A CSV row has the line on which it begins. Blank lines are skipped.

    Raises:
        WadiError: the file is of another kind, or has a wrong row; the message names its line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        return _json_rows(path, _json(path, read_text(path)))
    return _jsonl_rows(path)


def read_texts(path: str | os.PathLike, column: str) -> list[Prompt]:
    """Read the texts of a file with one of `SUFFIXES`. Texts are stripped, and blank texts are omitted.

    Args:
        path: .txt, one a line; .jsonl, .csv, .tsv, .parquet, one a row; .json, a list of texts or of objects,
            or COCO's caption annotations, of which each image gives the caption with the lowest id.
        column: key or column of the text, except in .txt and COCO's annotations.

    Rows without a text are skipped, with a warning.

    Raises:
        WadiError: the file cannot be read or is of another kind, there is no such column, or a value is not
            text; the message names the line or row.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        texts = [Prompt(text.strip(), line) for line, text in enumerate(text_lines(read_text(path)), 1)]
        return [text for text in texts if text.text]
    if suffix == ".parquet":
        return with_text(_parquet_values(path, column), str(path), column)
    if suffix == ".json":
        content = _json(path, read_text(path))
        if isinstance(content, dict) and "annotations" in content:
            return _coco(path, content)
        if isinstance(content, list) and any(isinstance(row, str) for row in content):
            return with_text(enumerate(content, 1), str(path), column)
        return with_text(_column(path, _json_rows(path, content), column), str(path), column)
    return with_text(_column(path, read_rows(path), column), str(path), column, "line")


def with_text(
    values: Iterator[tuple[int, Any]] | enumerate, source: str, column: str, unit: str = "row"
) -> list[Prompt]:
    """Convert numbered values to prompts. Missing or blank values are omitted, with a warning.

    Raises:
        WadiError: a value is not text.
    """
    found, empty = [], 0
    for line, value in values:
        text = "" if value is None else _text(value, f"{source}: {unit} {line}")
        if text:
            found.append(Prompt(text, line))
        else:
            empty += 1
    if empty:
        tell(f"{source}: {empty} of {len(found) + empty} rows have no text in {column!r}; they are skipped")
    return found


def check_column(column: str, names: Sequence[str], where: str) -> None:
    """Raise a WadiError that lists `names` if `column` is not among them."""
    if column in names:
        return
    raise WadiError(
        f"{where}: has no column {column!r} but {', '.join(map(str, names))[:200] or 'none'}; name one with "
        "--caption-column (the first line of a .csv names its columns)"
    )


def _csv_rows(path: Path, delimiter: str) -> Rows:
    header = None
    for line, cells in _csv_cells(path, delimiter):
        if header is None:
            header = _header(path, cells)
            continue
        if len(cells) < len(header):
            raise WadiError(
                f"{path}: line {line} has {len(cells)} cells and the header {len(header)}; write the empty "
                "ones too"
            )
        if any(cell.strip() for cell in cells[len(header) :]):
            raise WadiError(
                f"{path}: line {line} has {len(cells)} cells and the header {len(header)}; put a cell that "
                f"holds a {'tab' if delimiter == chr(9) else 'comma'} between double quotes"
            )
        yield line, dict(zip(header, cells, strict=False))


def _csv_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The first line of each row, and its cells. An unclosed double quote ends at the end of its line."""
    lines = io.StringIO(read_text(path), newline="").readlines()
    first, closed = 0, -1
    while first < len(lines):
        reader, start = csv.reader(lines[first:], delimiter=delimiter, strict=True), first
        try:
            for cells in reader:
                line, start = start + 1, first + reader.line_num
                if len(cells) > 1 or (cells and cells[0].strip()):
                    yield line, cells
            return
        except csv.Error as error:
            if closed == start:
                raise WadiError(
                    f"{path}: the row that begins on line {start + 1} cannot be read ({error}); a double "
                    "quote that opens a cell must be closed at its end, and one within it be doubled"
                ) from error
            tell(f"{path}: line {start + 1} opens a double quote that nothing closes; it ends with that line")
            text = lines[start].rstrip("\r\n")
            first = closed = start
            lines[start] = text + '"' + lines[start][len(text) :]


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise WadiError(f"{path}: names the column {twice[0]!r} twice; rename one")
    return names


def _jsonl_rows(path: Path) -> Rows:
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            row = _json(path, text, f"line {line} is ")
            if not isinstance(row, dict):
                raise WadiError(f"{path}: line {line}: has no columns, it is no JSON object")
            yield line, row


def _json_rows(path: Path, content: Any) -> Rows:
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise WadiError(
            f"{path}: neither a list of texts or of objects, nor COCO's caption annotations; use one"
        )
    yield from enumerate(content, 1)


def _json(path: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        hint = "; is it a .json file?" if where and text.lstrip().startswith("[") else ""
        raise WadiError(f"{path}: {where}not valid JSON ({reason}){hint}") from error


def _column(path: Path, rows: Rows, column: str) -> Iterator[tuple[int, Any]]:
    for line, row in rows:
        check_column(column, list(row), f"{path}: line {line}")
        yield line, row[column]


def _parquet_values(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise WadiError(f"{path}: reading .parquet needs pyarrow; pip install datasets") from error
    try:
        with explain_os_errors(path, "read the file"), path.open("rb") as file:
            check_column(column, parquet.read_schema(file).names, str(path))
            values = parquet.read_table(file, columns=[column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise WadiError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from error
    return enumerate(values, 1)


def _coco(path: Path, content: dict[str, Any]) -> list[Prompt]:
    try:
        rows = sorted(content["annotations"], key=lambda row: row["id"])
        first: dict[object, str] = {}
        for row in rows:
            first.setdefault(row["image_id"], " ".join(row["caption"].split()))
    except (KeyError, TypeError, AttributeError) as error:
        raise WadiError(
            f"{path}: not COCO's caption annotations (annotations with id, image_id, caption); name another "
            "file, or .txt, .jsonl, .csv"
        ) from error
    return [Prompt(caption, i) for i, caption in enumerate(first.values(), 1) if caption]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise WadiError(f"{where}: the prompt must be text, but is {value!r:.100}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WadiError(
            f"{where}: holds half of a character (a lone surrogate); write the prompt again"
        ) from error
    return value.strip()
