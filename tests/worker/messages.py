"""Anything that a client can put into a GenerateRequest."""

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from moe_api.inference.v1 import inference_pb2

VALUES = {
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 400),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32) | st.floats(0, 2, width=32),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
}


def values(field):
    """Anything that protobuf takes for a field of SamplingParameters."""
    if field.message_type is not None:
        key, value = field.message_type.fields
        return st.dictionaries(VALUES[key.type], VALUES[value.type], max_size=8)
    if field.is_repeated:
        return st.lists(VALUES[field.type], max_size=20)
    return VALUES[field.type]


SAMPLINGS = st.fixed_dictionaries(
    {}, optional={field.name: values(field) for field in inference_pb2.SamplingParameters.DESCRIPTOR.fields}
)
INPUTS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"prompt": VALUES[FieldDescriptor.TYPE_STRING]}),
    st.fixed_dictionaries(
        {"prompt_tokens": st.fixed_dictionaries({"ids": st.lists(st.integers(0, 2**32 - 1), max_size=80)})}
    ),
)
