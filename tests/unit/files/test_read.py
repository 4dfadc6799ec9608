"""What users' files hold, whatever program wrote them."""

import json
import pickle

import pytest

from megatron_ext.config import InputError
from megatron_ext.files import parse_json, reading, text_of
from megatron_ext.files.read import DEEPEST_JSON


def test_a_byte_order_mark_is_no_text():
    assert text_of("\ufeffa fox".encode()) == "a fox" and text_of("\ufeff".encode()) == ""
    assert parse_json('\ufeff{"a": 1}') == parse_json('\ufeff{"a": 1}'.encode()) == {"a": 1}
    with pytest.raises(ValueError, match="utf-8"):
        parse_json('{"a": "é"}'.encode("latin-1"))


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_json_is_refused_before_it_is_too_deep_for_python(opening, closing):
    def nested(depth):
        levels = depth // (opening.count("[") + opening.count("{"))
        return opening * levels + "1" + closing * levels

    deepest = parse_json(nested(DEEPEST_JSON))
    assert json.loads(json.dumps(deepest)) == pickle.loads(pickle.dumps(deepest)) == deepest
    for depth in (DEEPEST_JSON + 2, 900, 100_000):
        with pytest.raises(ValueError, match=f"nested deeper than {DEEPEST_JSON}"):
            parse_json(nested(depth))
    assert parse_json(f"[{'[],' * 500}[]]") == [[]] * 501, "many are not deep"


def test_damage_is_one_line_that_names_the_file():
    import pyarrow

    for error in (OSError(5, "Input/output error"), ValueError("two\n lines"), pyarrow.ArrowNotImplementedError("new")):
        with pytest.raises(InputError, match=r"cannot read table x.parquet: (Input/output error|two lines|new)$"):
            with reading("x.parquet", "table"):
                raise error
    with pytest.raises(InputError, match="^as it is$"), reading("x", "table"):
        raise InputError("as it is")
    with pytest.raises(ZeroDivisionError), reading("x", "table"):
        raise ZeroDivisionError
