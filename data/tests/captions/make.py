"""Makes metadata.parquet as Hugging Face's datasets do: needs pyarrow."""

import pyarrow
import pyarrow.parquet

table = pyarrow.table(
    {
        "file_name": ["a.png", "b.png"],
        "text": ["a row", 'ein Fuß, "quoted"'],
        "references": [["b.png"], []],
        "width": [8, 9],
        "image": [{"bytes": b"\x00\x01", "path": "a.png"}, None],
    }
)
pyarrow.parquet.write_table(table, "metadata.parquet", compression="snappy")
