"""Templates of documents: texts with places for pictures and other texts."""

import re
from collections.abc import Sequence

from megatron_ext.config import InputError
from megatron_ext.vocab import Image, Video

Part = str | Image | Video

_PLACE = re.compile(r"\{(\w+)\}")


def fill(template: str, **parts: Part | Sequence[Part]) -> tuple[Part, ...]:
    """The parts of a document: `{name}` in the template stands for the part, or parts, of that name.

    Texts that come to stand side by side are joined, empty ones are dropped. Braces in a part stay as they are.
    """
    found: list[Part] = []
    for number, word in enumerate(_PLACE.split(template)):
        part = parts[word] if number % 2 else word
        for each in [part] if isinstance(part, Part) else part:
            if isinstance(each, str) and found and isinstance(found[-1], str):
                found[-1] += each
            elif each != "":
                found.append(each)
    return tuple(found)


def check_template(field: str, template: str, wanted: set[str]) -> None:
    """Raises InputError: the template lacks one of the places it must have, or has another."""
    if sorted(_PLACE.findall(template)) != sorted(wanted):
        names = " and ".join(f"{{{name}}}" for name in sorted(wanted))
        raise InputError(f"{field} is {template!r}: it must hold {names}, each once, and no other place")
