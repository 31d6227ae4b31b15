"""wire_pb2.py belongs to wire.proto, and both to the protocol that the SDK speaks."""

import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from manylora.service.wire import wire_pb2 as pb

SOURCE = Path(pb.__file__).parents[3]
PROTO = Path(pb.__file__).with_name("wire.proto")


def committed() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    return file


def test_the_generated_file_belongs_to_the_schema(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    out = tmp_path / "schema"
    relative = PROTO.relative_to(SOURCE).as_posix()
    assert protoc.main(["protoc", f"-I{SOURCE}", f"--descriptor_set_out={out}", relative]) == 0
    (fresh,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    fresh.ClearField("source_code_info")
    # json_name is filled in by one and left out by the other.
    for file in (fresh, mine := committed()):
        for message in walk(file.message_type):
            for field in message.field:
                field.ClearField("json_name")
    assert fresh == mine


def test_another_schema_would_be_noticed():
    changed = committed()
    changed.message_type[0].field[0].number += 50
    assert changed != committed()


def walk(messages):
    for message in messages:
        yield message
        yield from walk(message.nested_type)


# Where we read less than the SDK may send: what is inside is refused by name, never looked at.
NOT_READ = {"RefusedChunk", "ProvenanceSpan"}


def test_numbers_and_types_are_the_sdks():
    theirs = pytest.importorskip("tinker.proto.tinker_public_pb2")
    checked = 0
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        if name in NOT_READ:
            continue
        other = theirs.DESCRIPTOR.message_types_by_name.get(name)
        if other is None:  # 0.25 calls one of them differently
            continue
        for field in message.fields:
            same = other.fields_by_number.get(field.number)
            if same is None:  # newer than this SDK
                continue
            assert (field.type, field.is_repeated, field.has_presence) == (
                same.type,
                same.is_repeated,
                same.has_presence,
            ), f"{name}.{field.name}"
            if field.message_type and field.message_type.GetOptions().map_entry:
                for ours, other_field in zip(
                    field.message_type.fields, same.message_type.fields, strict=True
                ):
                    assert ours.type == other_field.type
            checked += 1
    for name, enum in pb.DESCRIPTOR.enum_types_by_name.items():
        assert (
            enum.values_by_name.keys()
            == theirs.DESCRIPTOR.enum_types_by_name[name].values_by_name.keys()
        )
    assert checked > 30


def test_our_schema_and_the_sdks_live_in_one_process():
    theirs = pytest.importorskip("tinker.proto.tinker_public_pb2")
    assert "manylora.service.wire.wire_pb2" in sys.modules
    body = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=7).SerializeToString()
    assert theirs.ForwardBackwardRequest.FromString(body).seq_id == 7
