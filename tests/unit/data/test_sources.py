"""Folders of tokenized media: what is damaged is one line that names it."""

import json

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.data.sources import RawSample, TokenizedFolder, parse_sample
from tests.unit.data.samples import write_tokenized_folder

DEEP = "[" * 20_000 + "]" * 20_000


def test_a_sample_whose_json_is_nested_too_deep_is_damaged():
    with pytest.raises(InputError, match=r"a.tar: x is damaged \(ValueError\('it is nested deeper than 200'\)\)"):
        parse_sample(RawSample("a.tar: x", {"json": DEEP.encode(), "codes.npy": b""}, 0), 64)


@pytest.mark.parametrize("content", [DEEP, "{", "[]", '{"format_version": 1}', "number"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    folder = write_tokenized_folder(tmp_path / "codes", {"p1": (np.zeros((1, 1), int), ["x"])})
    if content == "number":
        manifest = json.loads((folder / "manifest.json").read_text())
        content = json.dumps({**manifest, "codebook_size": "many"})
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"codes/manifest.json is damaged \(.*\): tokenize again"):
        TokenizedFolder.open(folder)
