"""What the program reads: captions and pictures by name or pattern."""

import pytest

from megatron_ext.config import InputError
from tools.generate import GenerateConfig, captions_of, pictures_of


def test_captions_of_files(tmp_path):
    (tmp_path / "all [1].txt").write_bytes("\ufeffa red fox\n\n ein Fuß \r\n".encode())
    (tmp_path / "b.txt").write_text("last")
    config = {"task": "draw", "hf": "x", "output": "x", "caption": ("first",)}
    for given, expected in (("all [1].txt", ["a red fox", "ein Fuß"]), ("*.txt", ["a red fox", "ein Fuß", "last"])):
        assert captions_of(GenerateConfig(**config, captions_file=f"{tmp_path}/{given}")) == ["first", *expected]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"captions_file '.*b.txt': .*utf-8"):
        captions_of(GenerateConfig(**config, captions_file=f"{tmp_path}/b.txt"))
    with pytest.raises(InputError, match="captions_file 'none.txt' is missing"):
        captions_of(GenerateConfig(**config, captions_file="none.txt"))


def test_pictures_of_names_and_patterns(tmp_path):
    for name in ("photo [1].jpg", "b.png"):
        (tmp_path / name).write_bytes(b"")
    given = {"task": "caption", "hf": "x", "output": "x"}
    images = (f"{tmp_path}/photo [1].jpg", f"{tmp_path}/*.png")
    assert pictures_of(GenerateConfig(**given, image=images)) == [
        str(tmp_path / "photo [1].jpg"),
        str(tmp_path / "b.png"),
    ]
    with pytest.raises(InputError, match="image 'none.*' matches no file"):
        pictures_of(GenerateConfig(**given, image=("none*.png",)))
