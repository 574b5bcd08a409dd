"""Read and write TFRecord files of ``tf.Example`` messages, without TensorFlow.

A record is its length (uint64), the length's checksum, the message and its checksum, all little-endian; a checksum is
CRC-32C, rotated and offset, as in TensorFlow's tfrecord format
(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). The messages are protobuf's and the
CRC is google-crc32c's. The package ``tfrecord`` does the same, but reads past wrong checksums.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_CRC_OFFSET = 0xA282EAD8


class CorruptRecord(ValueError):
    """A record is truncated, has a wrong checksum or is not a ``tf.Example``; the message names the file."""


def write_examples(path: Path, examples: Iterable[Mapping[str, Sequence[int]]]) -> None:
    """Write integer features, one ``tf.Example`` per record, each feature as an ``int64_list``."""
    with path.open("wb") as file:
        for features in examples:
            example = _Example()
            for name in sorted(features):
                example.features.feature[name].int64_list.value.extend(features[name])
            message = example.SerializeToString(deterministic=True)
            length = struct.pack("<Q", len(message))
            file.write(length + _checksum(length) + message + _checksum(message))


def read_examples(path: Path) -> Iterator[dict[str, list[int]]]:
    """Read the ``int64_list`` features of each record by name, from a file of `write_examples` or TensorFlow.

    Raises:
        CorruptRecord: a record is truncated, a checksum is wrong, or a message is not a ``tf.Example``.
    """
    with path.open("rb") as file:
        number = 0
        while header := file.read(12):
            if len(header) < 12 or header[8:] != _checksum(header[:8]):
                raise CorruptRecord(f"{path}: record {number} has a corrupt or truncated length")
            (length,) = struct.unpack("<Q", header[:8])
            body = file.read(length + 4)
            if len(body) < length + 4 or body[length:] != _checksum(body[:length]):
                raise CorruptRecord(f"{path}: record {number} is corrupt or truncated")
            example = _Example()
            try:
                example.ParseFromString(body[:length])
            except Exception as error:  # protobuf's DecodeError is in a different module for each backend
                raise CorruptRecord(f"{path}: record {number} is not a tf.Example ({error})") from error
            yield {name: list(feature.int64_list.value) for name, feature in example.features.feature.items()}
            number += 1


def _checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _CRC_OFFSET) & 0xFFFFFFFF)


def _example_class() -> Any:
    """Create the ``tf.Example`` message class of tensorflow/core/example/example.proto and feature.proto.

    message Example  { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }
    message Feature  { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    """
    proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="training/tf_example.proto", package="tensorflow", syntax="proto3")

    def add(
        message: Any, name: str, number: int, kind: int | str, *, repeated: bool = False, oneof: bool = False
    ) -> None:
        field = message.field.add(name=name, number=number)
        field.label = proto.LABEL_REPEATED if repeated else proto.LABEL_OPTIONAL
        if isinstance(kind, str):
            field.type, field.type_name = proto.TYPE_MESSAGE, f".tensorflow.{kind}"
        else:
            field.type = kind
        if oneof:
            field.oneof_index = 0

    lists = (("BytesList", proto.TYPE_BYTES), ("FloatList", proto.TYPE_FLOAT), ("Int64List", proto.TYPE_INT64))
    for name, kind in lists:
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, _) in enumerate(lists, 1):
        add(feature, name.removesuffix("List").lower() + "_list", number, name, oneof=True)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, proto.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = (
        descriptor_pool.DescriptorPool()
    )  # a separate pool, because TensorFlow registers the same names in the default one
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_Example = _example_class()
