"""Files made to do harm, each the smallest that once did; what they are is in their names."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
import zlib

EPS_LOOP = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n"
"""A PostScript program that never ends; some picture libraries hand it to Ghostscript."""


def png(width: int, height: int, *, data: bytes = b"", colour_type: int = 2, depth: int = 8) -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def safetensors(header: bytes | object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_tensor(metadata: object = None, *, shape: object = (1,), dtype: str = "F32", size: int = 4) -> bytes:
    """A safetensors file with a tensor `x` as stated, whatever its bytes."""
    header = {"__metadata__": metadata, "x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    return safetensors(header, bytes(size))


HEADERS: dict[str, bytes] = {
    "metadata is a list": safetensors({"__metadata__": [1]}),
    "metadata is no text": one_tensor({"format": 7}),
    "header is a list": safetensors([1, 2, 3]),
    "header is nested deep": safetensors(b"[" * 100_000),
    "header has NaN": safetensors(b'{"x": NaN}'),
    "shape is no whole number": one_tensor(shape=[1.5]),
    "shape is negative": one_tensor(shape=[-1]),
    "shape has 5,000 digits": safetensors(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
    "shape is text": one_tensor(shape="12"),
    "shape is absurd": one_tensor(shape=[1 << 40, 1 << 40]),
    "offsets are backwards": safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "type is unknown": one_tensor(dtype="F99", shape=[9]),
}
"""Safetensors files whose header is wrong, by how."""

WRONG_RANKS = {
    "a scalar U-Net": {"conv_in.weight": [], "down_blocks.0.x": [], "time_embedding.x": []},
    "a flat U-Net": {
        "model.diffusion_model.input_blocks.0.0.weight": [1],
        "model.diffusion_model.a.attn2.to_k.weight": [1],
    },
    "a flat tagger": {
        "visual_encoder.patch_embed.proj.weight": [1],
        "label_embed": [1],
        "tagging_head.x": [1],
        "visual_encoder.layers.0.blocks.0.attn.relative_position_bias_table": [],
    },
    "a scalar adapter": {"visual_encoder.x.lora_A.weight": []},
    "a flat control": {"controlnet.controlnet_cond_embedding.x": [1], "unet.x.image_attentions.attn2.to_k.weight": [1]},
}
"""Shapes by key, of files that begin like weights of ours."""


def with_shapes(shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of zeros."""
    entries: dict[str, object] = {"__metadata__": metadata or {}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return safetensors(entries, bytes(end))


class Calls:
    """Pickled, a call of `function` with `arguments`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments


def torch_zip(program: bytes, *, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    """A torch file around a pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        files = {"data.pkl": program, "byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"0"}
        for name, data in {**files, **(more or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


def nested_tuple_key(depth: int = 64) -> bytes:
    """The program of a dict whose key is a pair of pairs of …, hashed in 2^depth steps."""
    pairs = (b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02}K\x01q\x000" + b"".join(pairs) + b"h%cK\x01s." % depth


PICKLES: dict[str, bytes] = {
    "asks for 3 GB": pickle.dumps({"x": Calls(bytearray, 3 << 30)}, protocol=2),
    "asks for 3 GB in a zip": torch_zip(pickle.dumps({"x": Calls(bytearray, 3 << 30)}, protocol=2)),
    "is a bomb": torch_zip(pickle.dumps({}), compression=zipfile.ZIP_DEFLATED, more={"data/0": bytes(1 << 26)}),
    "has a key of pairs of pairs": nested_tuple_key(),
    "has a key of pairs of pairs in a zip": torch_zip(nested_tuple_key()),
    "is cut": b"\x80\x02}q\x00X\xff\xff\xff\x7f",
    "ends nowhere": b"\x80\x02" + b"]" * 1000,
    "pops from an empty stack": b"\x80\x020.",
    "gets what nobody put": b"\x80\x02h\x05.",
}
"""Torch files made to do harm, by how."""
