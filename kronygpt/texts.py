"""Texts in files: a column of rows in .jsonl, .json and .parquet; a file with another ending is one UTF-8 text."""
import json
from pathlib import Path

from kronygpt.configurator import UserError

ROWS = (".jsonl", ".json", ".parquet")
CHARACTERS_AT_ONCE = 2**20  # of a text that is split


def read_rows(path, column="text"):
    """Yield the texts of a file, None for a row whose text is null; a byte order mark and empty lines are no text.

    Args:
        path: of the file.
        column: name of the column, or field, with the texts.

    Raises:
        FileNotFoundError: there is no file.
        UserError: it is damaged, or has no such column of strings.
    """
    path = Path(path)
    check_is_text(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from parquet_rows(path, column)
    elif kind in ROWS:
        yield from json_rows(path, column) if kind == ".json" else jsonl_rows(path, column)
    else:
        yield "".join(read_pieces(path, newline=""))


def check_is_text(path):
    """Raise an error where there is no file, or one that would be waited for, such as a pipe."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    if not Path(path).is_file():
        raise UserError(f"{path} is no regular file")


def read_pieces(path, separator=None, newline=None):
    """Yield the pieces of a UTF-8 text between separators, or of any size without one.

    Args:
        path: of the file.
        separator: between pieces.
        newline: as of open(): None reads every line end as "\\n", "" leaves all as they are.
    """
    check_is_text(path)
    rest = ""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            while chunk := file.read(CHARACTERS_AT_ONCE):
                *pieces, rest = (rest + chunk).split(separator) if separator else (chunk, "")
                yield from pieces
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    yield rest


def jsonl_rows(path, column):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield text_of(line, column, f"{path}, line {number}")


def json_rows(path, column):
    """The rows of a list of objects or of strings, of one object, or of JSON lines."""
    try:
        rows = json.loads(path.read_bytes())  # which finds a byte order mark
    except (ValueError, RecursionError):
        return jsonl_rows(path, column)
    rows = rows if isinstance(rows, list) else [rows]
    return (row if isinstance(row, str) else text_of(row, column, f"{path}, row {i}") for i, row in enumerate(rows, 1))


def text_of(row, column, where):
    """The text of an object, or of a line of JSON."""
    try:
        row = json.loads(row.decode()) if isinstance(row, bytes) else row
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        fields = f", but {', '.join(row)}" if isinstance(row, dict) and column not in row else ""
        raise UserError(f"{where} is not UTF-8 JSON with a string `{column}`{fields}") from None
    return text


def parquet_rows(path, column):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(f"{path} has the columns {', '.join(schema.names)}, and no `{column}`")
            check_strings(schema.field(column).type, column, path)
            for batch in file.iter_batches(columns=[column]):
                yield from batch.column(column).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None


def check_strings(kind, column, where):
    """Raise UserError unless an Arrow type is one of strings, or of nulls alone."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_kind(value) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise UserError(f"the `{column}` in {where} is {kind}, and strings are needed")
