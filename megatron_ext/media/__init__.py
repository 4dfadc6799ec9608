"""Raw inputs: pictures and clips, found, decoded safely and brought to size; text corpora (module texts)."""

from megatron_ext.media.clips import Clip, decode_clip, decode_frames
from megatron_ext.media.errors import MediaError
from megatron_ext.media.headers import Header, read_header
from megatron_ext.media.index import MediaIndex, build_index
from megatron_ext.media.listing import Listing, Part, list_samples, listing_of, parts_of
from megatron_ext.media.pictures import decode_picture
from megatron_ext.media.resize import ResizeConfig, resize, smart_resize
from megatron_ext.media.samples import Fault, Sample, readable_name

__all__ = [
    "Clip",
    "Fault",
    "Header",
    "Listing",
    "MediaError",
    "MediaIndex",
    "Part",
    "ResizeConfig",
    "Sample",
    "build_index",
    "decode_clip",
    "decode_frames",
    "decode_picture",
    "list_samples",
    "listing_of",
    "parts_of",
    "read_header",
    "readable_name",
    "resize",
    "smart_resize",
]
