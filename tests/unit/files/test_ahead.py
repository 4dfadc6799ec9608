"""Outputs that cannot be written: said before the work, whichever part of the path is in the way."""

import pytest

from megatron_ext.config import InputError
from megatron_ext.files import check_file, check_folder


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path):
    check_folder(tmp_path, "output")
    check_folder(tmp_path / "new" / "deeper", "output")
    check_file(tmp_path / "new" / "x.model", "output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [check_folder, check_file])
@pytest.mark.parametrize("path", ["file/below", "file/below/deeper", "n" * 300 + "/below"])
def test_what_is_in_the_way_is_told(tmp_path, check, path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^output_prefix: cannot write .*another path$"):
        check(tmp_path / path, "output_prefix")


def test_a_file_in_a_folder_s_place_and_the_reverse(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        check_folder(tmp_path / "file", "output")
    with pytest.raises(InputError, match="it is a folder"):
        check_file(tmp_path, "output")


def test_a_folder_of_the_kernel_s_that_takes_no_files():
    """Whoever asks, root too: /proc has no new files."""
    with pytest.raises(InputError, match=r"^output: cannot write /proc/1/x"):
        check_folder("/proc/1/x", "output")
