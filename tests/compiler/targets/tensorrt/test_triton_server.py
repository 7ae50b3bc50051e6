"""The config is one that the server's format allows, and says what the plan has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from neutral import LAYERS, PLAN, section, write_neutral

from llmc.compiler.targets.tensorrt.triton_server import REPOSITORY, check_library, write_model_folder
from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.section import read_section

FIELD = descriptor_pb2.FieldDescriptorProto
# Part of the messages in the server's model_config.proto: by message, fields by name. An upper-case type is a number,
# a text or an enumeration; others are messages. A star repeats.
MESSAGES = {
    "Tensor": {"name": "STRING", "data_type": "DataType", "dims": "INT64*"},
    "InitialState": {"data_type": "DataType", "dims": "INT64*", "zero_data": "BOOL", "name": "STRING"},
    "State": {
        "input_name": "STRING", "output_name": "STRING", "data_type": "DataType", "dims": "INT64*",
        "initial_state": "InitialState*", "use_same_buffer_for_input_output": "BOOL",
    },
    "Oldest": {"max_candidate_sequences": "INT32"},
    "SequenceBatching": {"oldest": "Oldest", "state": "State*"},
    "InstanceGroup": {"kind": "Kind", "count": "INT32", "profile": "STRING*"},
    "ModelConfig": {
        "backend": "STRING", "max_batch_size": "INT32", "input": "Tensor*", "output": "Tensor*",
        "sequence_batching": "SequenceBatching", "instance_group": "InstanceGroup*",
    },
}  # fmt: skip
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_BF16"],
    "Kind": ["KIND_AUTO", "KIND_GPU"],
}


def read_config(text: str) -> Any:
    """Parse a config as the server does: unknown names and wrong types are errors."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        made = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            made.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            label = FIELD.LABEL_REPEATED if kind.endswith("*") else FIELD.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            added = message.field.add(name=field, number=number, label=label)
            if kind.isupper() or kind in ("INT32", "INT64"):
                added.type = getattr(FIELD, f"TYPE_{kind}")
            else:
                added.type, added.type_name = (FIELD.TYPE_ENUM if kind in ENUMS else FIELD.TYPE_MESSAGE), f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()
    return text_format.Parse(text, config)


def test_a_model_folder(tmp_path: Path) -> None:
    manifest = write_neutral(tmp_path / "out", plans=[PLAN])
    path = write_model_folder(tmp_path / "out", manifest, read_section(manifest), PLAN)
    assert path.name == "config.pbtxt" and path.parents[1] == tmp_path / "out" / REPOSITORY
    assert (path.parent / "1" / "model.plan").read_bytes() == (tmp_path / "out" / PLAN.file).read_bytes()
    config = read_config(path.read_text())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 0)
    assert {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input} == {
        "input_ids": (1, [-1, -1]), "starts": (1, [-1]), "rows": (1, [-1])
    }  # fmt: skip
    (logits,) = config.output
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 3, [-1, -1, 72])
    assert config.sequence_batching.oldest.max_candidate_sequences == 4
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.profile)) == (1, 1, ["0", "1"])


def test_every_cache_is_a_state_in_one_buffer_of_zeros(tmp_path: Path) -> None:
    manifest = write_neutral(tmp_path / "out")
    path = write_model_folder(tmp_path / "out", manifest, section(), PLAN)
    states = read_config(path.read_text()).sequence_batching.state
    assert [(state.input_name, state.output_name) for state in states] == [
        (f"past_key_values.{layer}.{role}", f"present.{layer}.{role}")
        for layer in range(LAYERS)
        for role in ("key", "value")
    ]
    for state in states:
        (initial,) = state.initial_state
        assert state.use_same_buffer_for_input_output and initial.zero_data and initial.name
        assert list(state.dims) == list(initial.dims) == [1, 2, 64, 16] and state.data_type == initial.data_type == 2


@pytest.mark.parametrize(
    ("name", "expected"), [("org/Some Model", "Some_Model"), ("model.gguf", "model.gguf"), ("/", "model")]
)
def test_a_folder_has_the_name_of_the_model(tmp_path: Path, name: str, expected: str) -> None:
    manifest = write_neutral(tmp_path / "out")
    manifest = replace(manifest, model=replace(manifest.model, name=name))
    assert write_model_folder(tmp_path / "out", manifest, section(), PLAN).parent.name == expected


def test_a_plan_that_the_server_can_not_load() -> None:
    check_library("tensorrt")
    with pytest.raises(LlmcError, match="tensorrt_rtx builds others") as caught:
        check_library("tensorrt_rtx")
    assert caught.value.code == "SERVER_PLAN_MISSING" and "llmc finalize DIR" in caught.value.hint
