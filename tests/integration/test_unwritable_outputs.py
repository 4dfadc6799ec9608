"""An output that cannot be written is told before the work, in every program: also where its inputs are missing."""

import importlib

import pytest

from megatron_ext.config import InputError

PROGRAMS = {
    "tools.caption": "--inputs [{a}] --output {o} --server.base_url http://h/v1 --server.model m",
    "tools.curate_images": "--inputs [{a}] --output {o}",
    "tools.curate_videos": "--inputs [{a}] --output {o}",
    "tools.tokenize_vision": "--inputs [{a}] --tokenizer {a} --output {o}",
    "tools.preprocess_data": "--text [{a}] --output_prefix {o}",
    "tools.merge_datasets": "--inputs [{a}] --output_prefix {o}",
    "tools.inspect_data": "--prefix {a} --output {o}",
    "tools.convert_checkpoint to-hf": "--checkpoint {a} --output {o}",
    "tools.convert_checkpoint from-hf": "--hf {a} --output {o}",
    "tools.generate": "--task draw --hf {a} --caption ['a'] --output {o}",
    "tools.run_report": "--run {a} --output {o}",
    "tokenizer_train.text.train": "--input [{a}] --output {o}",
    "tokenizer_train.vision.evaluate": "--inputs [{a}] --tokenizers [{a}] --output {o}",
    "tokenizer_train.vision.fetch_vgg16": "--archive {a} --folder {o}",
    "examples.fetch_media": "--catalogue {a} --output {o}",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_told_before_the_work(program, tmp_path):
    (tmp_path / "file").touch()
    name, *action = program.split()
    arguments = PROGRAMS[program].format(a=tmp_path / "absent", o=tmp_path / "file" / "below" / "deeper").split()
    with pytest.raises(InputError, match=r"^(output|output_prefix|folder): cannot write .*file") as error:
        importlib.import_module(name).main([*action, *arguments])
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
