"""Datasets on an object store: prefixes like s3://BUCKET/PATH.

The ids stay there: megatron-core's IndexedDataset reads them by ranges, through boto3 and its settings
(AWS_ENDPOINT_URL, credentials, region). The rest of a dataset is small beside them and is copied once into a local
folder.
"""

import hashlib
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import S3_PREFIX, ObjectStorageConfig, parse_s3_path

from megatron_ext.config import InputError, reason_of
from megatron_ext.data.built_once import build_once

COPIED = (".idx", ".spans.npz")
"""Beside the manifest. The sidecar may be absent: it is then rebuilt, from all ids."""

BYTES_AHEAD = 1
"""megatron-core reads at least this much at once and keeps it. A window's documents lie anywhere: what is beyond a
document would be read for nothing."""


def is_remote(prefix: str | Path) -> bool:
    """Whether a prefix is one of an object store."""
    return str(prefix).startswith(S3_PREFIX)


class RemoteDataset:
    """A dataset on an object store and its local copy, below `cache_dir`.

    Raises:
        InputError: boto3 is not installed; no folder for the copy, or one that cannot be written; an object is missing
            or the store does not answer.
    """

    def __init__(self, prefix: str, cache_dir: str | None):
        if cache_dir is None:
            raise InputError(f"{prefix} is on an object store: set data.cache_dir to a local folder for its index")
        self.bucket, self.key = parse_s3_path(prefix)
        self.prefix = prefix
        self._client = _client(prefix)
        manifest = self._read(".manifest.json")
        # Another dataset under the same name is another manifest, and another folder.
        self._folder = Path(cache_dir) / "object_store" / hashlib.sha256(manifest).hexdigest()[:24]
        self.local_prefix = self._folder / self.bucket / self.key

        def copy(target: Path) -> None:
            local = target / self.bucket / self.key
            local.parent.mkdir(parents=True, exist_ok=True)
            local.with_name(local.name + ".manifest.json").write_bytes(manifest)
            for suffix in COPIED:
                if suffix != ".spans.npz" or self.size(suffix) is not None:
                    self._call("download_file", suffix, Filename=str(local.with_name(local.name + suffix)))

        try:
            build_once(self._folder, copy)
        except OSError as error:
            raise InputError(f"cannot copy {prefix} into {cache_dir} ({error.strerror}): set data.cache_dir") from None

    def open_ids(self) -> IndexedDataset:
        """The ids, read from the store when asked for."""
        # Not through its constructor: that would copy the .idx again, on global rank 0 only, and on other nodes fail.
        dataset = IndexedDataset.__new__(IndexedDataset)
        config = ObjectStorageConfig(path_to_idx_cache=str(self._folder), bin_chunk_nbytes=BYTES_AHEAD)
        dataset.initialize(self.prefix, multimodal=False, mmap=False, object_storage_config=config)
        return dataset

    def size(self, suffix: str) -> int | None:
        """Bytes of PREFIX + suffix; None where it is missing."""
        try:
            return self._client.head_object(Bucket=self.bucket, Key=self.key + suffix)["ContentLength"]
        except self._client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise _unreachable(self.prefix + suffix, error) from None

    def _read(self, suffix: str) -> bytes:
        return self._call("get_object", suffix)["Body"].read()

    def _call(self, operation: str, suffix: str, **arguments: str) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, operation)(Bucket=self.bucket, Key=self.key + suffix, **arguments)
        except (BotoCoreError, ClientError) as error:
            raise _unreachable(self.prefix + suffix, error) from None


def _client(prefix: str) -> Any:
    try:
        import boto3
    except ImportError:
        raise InputError(f"{prefix} is on an object store: install boto3, the extra s3 of this package") from None
    return boto3.client("s3")


def _unreachable(path: str, error: Exception) -> InputError:
    reason = reason_of(error)
    return InputError(f"cannot read {path} ({reason}): check the path, credentials and AWS_ENDPOINT_URL")
