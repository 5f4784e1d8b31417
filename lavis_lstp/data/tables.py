"""Rows of tables that others wrote: CSV, TSV and parquet.

In: a table. Out: (place, row) of each row, a dict by column; the place is what an error calls the row.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lavis_lstp.errors import AnnotationError, ConfigError


def delimited_rows(text: str, path: Path, delimiter: str) -> list[tuple[str, Any]]:
    """Rows of a text with one row a line, and names of columns in the first one; all cells are texts.

    Where no comma stands in the first line of a table with commas, a semicolon parts the cells: Excel writes so in
    countries that write 1,5.

    Raises:
        AnnotationError: it is no such table, a row has other cells than the first, or two columns have one name.
    """
    # TGIF-QA's quotes are part of the text; in a table with commas they hold cells together.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    # strict: a quote that nothing closes would make one cell of the rest of the file.
    text = text.lstrip("\ufeff")
    head = text.partition("\n")[0]
    skipped = 1 if (told := _TOLD.fullmatch(head)) else 0
    if told:
        delimiter, text = told[1], text.partition("\n")[2]
    elif delimiter == "," and "," not in head and ";" in head:
        delimiter = ";"
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        rows = [(f"{path}, line {table.line_num + skipped}", row) for row in table]
    except csv.Error as error:
        at, hint = table.line_num + skipped + 1, "a quote in a cell is doubled, and the cell stands in quotes"
        raise AnnotationError(f"{path}, line {at}: cannot be read as a table ({error}); {hint}") from None
    twice = [name for name, count in Counter(table.fieldnames).items() if count > 1] if rows else []
    if twice:
        raise AnnotationError(f"{path}: two columns have the name {twice[0]!r:.80}")
    for place, row in rows:
        if None in row or None in row.values():
            raise AnnotationError(f"{place}: expected {len(table.fieldnames)} cells, as in the first line")
    return rows


_TOLD = re.compile(r"sep=([,;\t])\r?")
"""Excel's own first line says what parts the cells."""
MOST_BYTES = 1 << 30
"""Size of a parquet file's columns when unpacked; the largest benchmark has 30 MB."""


def parquet_rows(path: Path, section: str) -> list[tuple[str, Any]]:
    """Rows of a parquet file, nested lists and structures as Python's.

    Raises:
        ConfigError: pyarrow is not installed.
        AnnotationError: there is no such file, it is none, or it unpacks to more than MOST_BYTES.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow; pip install 'lavis_lstp[parquet]'") from None
    if not path.is_file():
        raise AnnotationError(f"{path}: no such annotation file ({section}.build_info.annotations)")
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
        if sum(groups) > MOST_BYTES:
            raise AnnotationError(
                f"{path}: unpacks to {sum(groups)} bytes, more than {MOST_BYTES}; it is no question file"
            )
        rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]:.200})") from None
    return [(f"{path}, row {number}", _without_nan(row)) for number, row in enumerate(rows)]


def _without_nan(value: Any) -> Any:
    """Plain containers with None for NaN, which pandas writes where a cell is empty."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if value != value else value
