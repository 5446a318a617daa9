"""Formats a user would pick instead: how each writes and reads records of one sample's rows.

A peer is write(folder, records) and open(folder) -> (count, get), by sample or by block. All give the same flat batch (`collate`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, BLOCK, POOL = 16, 512, 4
IDS = os.environ.get("READ_IDS", "u2")
"""Type of the peers' ids: READ_IDS=u4 for vocabularies over 65,536."""

FIELDS = (
    ("ids", IDS, 64),
    ("logits", "f2", 64),
    ("tail", "i2", 8),
    ("label_logit", "f4", 1),
    ("inputs", IDS, 1),
    ("labels", IDS, 1),
)
ROW = sum(np.dtype(kind).itemsize * width for _, kind, width in FIELDS)


def pack(values: dict[str, np.ndarray]) -> bytes:
    """Return a sample as one record: its fields one after the other."""
    return b"".join(np.ascontiguousarray(values[name], dtype=kind).tobytes() for name, kind, _ in FIELDS)


def collate(records: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the flat batch of some records."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in FIELDS}
    for record in records:
        rows, place = len(record) // ROW, 0
        for name, kind, width in FIELDS:
            found = np.frombuffer(record, dtype=kind, count=rows * width, offset=place)
            parts[name].append(found.reshape(rows, width) if width > 1 else found)
            place += found.nbytes
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return {
        "ids": torch.from_numpy(joined["ids"]).to(torch.int32),
        "logits": torch.from_numpy(joined["logits"]).to(torch.float32),  # numpy takes three times as long
        "tail": torch.from_numpy(joined["tail"]).to(torch.float32).mul_(1 / 1024),
        "label_logit": torch.from_numpy(joined["label_logit"]),
        "inputs": torch.from_numpy(joined["inputs"]).to(torch.int64),
        "labels": torch.from_numpy(joined["labels"]).to(torch.int64),
    }


class Records(torch.utils.data.Dataset):
    """Records by number, opened in the process that reads them."""

    def __init__(self, open_: Callable[[Path], tuple[int, Callable[[int], Any]]], folder: Path):
        self.open, self.folder, self.get = open_, folder, None
        self.size = open_(folder)[0]

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        if self.get is None:
            self.get = self.open(self.folder)[1]
        return [self.get(number) for number in numbers]


class Blocks(torch.utils.data.IterableDataset):
    """Batches out of pools of shuffled blocks, shared out between workers by block."""

    def __init__(self, open_: Callable[[Path], tuple[int, Callable[[int], list[Any]]]], folder: Path):
        self.open, self.folder = open_, folder

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        count, read = self.open(self.folder)
        random = np.random.default_rng(0)
        order = random.permutation(count)[slice(None) if worker is None else slice(worker.id, None, worker.num_workers)]
        for start in range(0, len(order), POOL):
            records = [record for block in order[start : start + POOL] for record in read(int(block))]
            mixed = random.permutation(len(records))
            for first in range(0, len(mixed), BATCH):
                yield collate([records[number] for number in mixed[first : first + BATCH]])


# -- peers: write(folder, records) and open(folder) -> (count, get)


def npy_write(folder: Path, records: list[bytes]) -> None:
    np.save(folder / "ends.npy", np.cumsum([len(one) for one in records]))
    np.save(folder / "data.npy", np.frombuffer(b"".join(records), dtype=np.uint8))


def npy_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    ends, data = np.load(folder / "ends.npy"), np.load(folder / "data.npy", mmap_mode="r")
    return len(ends), lambda number: data[ends[number - 1] if number else 0 : ends[number]]


def arrow_write(folder: Path, records: list[bytes], codec: str | None = None) -> None:
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink:
        schema = pa.schema([("record", pa.large_binary())])
        with pa.ipc.new_file(sink, schema, options=options) as writer:
            for start in range(0, len(records), BLOCK):
                writer.write_batch(
                    pa.record_batch([pa.array(records[start : start + BLOCK], pa.large_binary())], schema=schema)
                )


def arrow_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(folder / "data.arrow"))).read_all()
    column = table["record"]
    return len(column), lambda number: column[number].as_buffer()


def arrow_blocks(folder: Path) -> tuple[int, Callable[[int], list[Any]]]:
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(folder / "data.arrow")))
    return file.num_record_batches, lambda block: [one.as_buffer() for one in file.get_batch(block).column(0)]


def parquet_write(folder: Path, records: list[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"record": pa.array(records, pa.large_binary())})
    pq.write_table(
        table,
        folder / "data.parquet",
        compression="zstd",
        compression_level=1,
        row_group_size=BLOCK,
        use_dictionary=False,
    )


def parquet_blocks(folder: Path) -> tuple[int, Callable[[int], list[Any]]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(folder / "data.parquet")
    return file.num_row_groups, lambda block: [one.as_buffer() for one in file.read_row_group(block)["record"]]


def datasets_write(folder: Path, records: list[bytes]) -> None:
    from datasets import Dataset

    Dataset.from_dict({"record": records}).save_to_disk(folder / "data")


def datasets_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    from datasets import load_from_disk

    found = load_from_disk(folder / "data")
    return len(found), lambda number: found[number]["record"]


def array_record_write(folder: Path, records: list[bytes], options: str = "group_size:1,zstd:1") -> None:
    from array_record.python import array_record_module as module

    writer = module.ArrayRecordWriter(str(folder / "data.array_record"), options)
    for record in records:
        writer.write(record)
    writer.close()


def array_record_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    from array_record.python import array_record_module as module

    reader = module.ArrayRecordReader(str(folder / "data.array_record"))
    return reader.num_records(), lambda number: reader.read([number])[0]


def mds_write(folder: Path, records: list[bytes], compression: str | None = None) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "data"), columns={"record": "bytes"}, compression=compression) as writer:
        for record in records:
            writer.write({"record": record})


def mds_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    from streaming import StreamingDataset

    found = StreamingDataset(local=str(folder / "data"), shuffle=False, batch_size=BATCH)
    return found.num_samples, lambda number: found[number]["record"]


def lance_write(folder: Path, records: list[bytes]) -> None:
    import lance
    import pyarrow as pa

    lance.write_dataset(pa.table({"record": pa.array(records, pa.large_binary())}), str(folder / "data.lance"))


def lance_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    import lance

    found = lance.dataset(str(folder / "data.lance"))
    return found.count_rows(), lambda number: found.take([number])["record"][0].as_buffer()


def litdata_write(folder: Path, records: list[bytes]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "data"), chunk_bytes="64MB")
    for number, record in enumerate(records):
        writer.add_item(number, record)
    writer.done()
    writer.merge()


def litdata_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    from litdata import StreamingDataset

    found = StreamingDataset(str(folder / "data"))
    return len(found), lambda number: found[number]


def webdataset_write(folder: Path, records: list[bytes]) -> None:
    import webdataset as wds

    with wds.ShardWriter(str(folder / "data-%05d.tar"), maxcount=BLOCK, verbose=0) as sink:
        for number, record in enumerate(records):
            sink.write({"__key__": f"{number:08d}", "bin": record})


def webdataset_blocks(folder: Path) -> tuple[int, Callable[[int], list[Any]]]:
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))

    def read(block: int) -> list[Any]:
        return [one["bin"] for one in wds.WebDataset([tars[block]], shardshuffle=False, empty_check=False)]

    return len(tars), read


def zarr_open(folder: Path) -> tuple[int, Callable[[int], Any]]:
    """Plain zarr-python on a kdcache store of the preset raw: what the format gives without kdcache."""
    import pyarrow.parquet as pq
    import zarr

    group = zarr.open_group(str(folder), mode="r")
    table = pq.read_table(folder / "samples")
    first, rows = table["first_row"].to_numpy(), table["rows"].to_numpy()
    names = {"ids": "head_ids", "logits": "head_logits", "tail": "tail_log_partition", "inputs": "input_ids"}
    arrays = {name: group[f"columns/{names.get(name, name)}"] for name, _, _ in FIELDS}

    def get(number: int) -> bytes:
        here = slice(int(first[number]), int(first[number] + rows[number]))
        return b"".join(np.ascontiguousarray(arrays[name][here]).tobytes() for name, _, _ in FIELDS)

    return len(first), get


PEERS: dict[str, tuple[Any, Any, bool]] = {
    "npy memmap": (npy_write, npy_open, False),
    "Arrow IPC": (arrow_write, arrow_open, False),
    "Arrow IPC zstd": (lambda folder, records: arrow_write(folder, records, "zstd"), arrow_blocks, True),
    "Parquet zstd": (parquet_write, parquet_blocks, True),
    "HF datasets": (datasets_write, datasets_open, False),
    "ArrayRecord": (
        lambda folder, records: array_record_write(folder, records, "group_size:1,uncompressed"),
        array_record_open,
        False,
    ),
    "ArrayRecord zstd": (array_record_write, array_record_open, False),
    "MDS": (mds_write, mds_open, False),
    "MDS zstd": (lambda folder, records: mds_write(folder, records, "zstd:1"), mds_open, False),
    "LitData": (litdata_write, litdata_open, False),
    "Lance": (lance_write, lance_open, False),
    "WebDataset": (webdataset_write, webdataset_blocks, True),
    "zarr-python": (None, zarr_open, False),
}
