"""The contract of an export: the keys on disk, and everything that can be wrong with them."""

import copy
import json
from contextlib import suppress

import pytest

from lpdeploy.engines import ONNX, ORT, TRT
from lpdeploy.engines.contract import Contract, TensorSpec, load_contract, save_contract
from lpdeploy.errors import ArtifactError

SHARED = {
    "schema_version": 1,
    "precision": "fp32",
    "opset": 23,
    "merged": True,
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
        {"name": "past_key_values.0.key", "dtype": "float32", "shape": ["batch", 2, "past", 8]},
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", 72]}],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": [4],
    "num_key_value_heads": [2],
    "head_dim": 8,
    "vocab_size": 72,
    "max_positions": 128,
    "bos_token_id": None,
    "eos_token_ids": [2],
    "max_batch": 8,
    "max_seq_len": 64,
    "source": {"model": "run/model", "sha256": "ab", "adapter": None, "adapter_sha256": None},
    "files": {"model.onnx": {"bytes": 3, "sha256": "cd"}},
    "versions": {"python": "3.11"},
}
PROFILE = {"batch": [1, 1, 8], "sequence": [2, 32, 64], "past": [0, 0, 62], "total": [2, 32, 64]}
# As exports wrote them from the first version on.
WRITTEN = {
    ONNX: {**SHARED, "engine": "onnx"},
    ORT: {**SHARED, "engine": "ort", "block_size": None, "genai": True},
    TRT: {
        **SHARED,
        "engine": "trt",
        "library": {"name": "tensorrt", "version": "10.15"},
        "compute_capability": "9.0",
        "cache": "in-place",
        "profiles": {"prefill": PROFILE, "decode": PROFILE},
        "build_seconds": 1.5,
    },
}
# What any field may hold somewhere; none of it may end in anything but a contract or a sentence.
VALUES = (None, True, -1, 1.5, float("nan"), "x", "fp32", [], {}, [[]], [1], ["x"], [{}],
          {"x": 1}, {"x": {}}, {"bytes": 1}, [{"name": "x"}], 10**400)  # fmt: skip


def write(folder, engine, data):
    (folder / engine.contract_file).write_text(json.dumps(data))
    return folder


def list_paths(data, path=()):
    """Paths of all keys and places, outer ones first."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from list_paths(value, (*path, key))


def find_parent(data, path):
    for key in path[:-1]:
        data = data[key]
    return data


def test_what_was_written_before_is_read_and_written_alike(tmp_path):
    for engine, data in WRITTEN.items():
        contract = load_contract(write(tmp_path, engine, data), engine)
        assert json.loads(json.dumps(contract.to_json())) == data
        save_contract(contract, tmp_path, engine)
        assert load_contract(tmp_path, engine) == contract
        assert [spec.name for spec in contract.caches] == ["past_key_values.0.key"]
    assert contract.build.profiles["prefill"]["sequence"] == (2, 32, 64)


def test_keys_of_a_later_version_are_left_alone(tmp_path):
    data = {**WRITTEN[ORT], "later": {"any": "thing"}}
    write(tmp_path, ORT, data)
    assert load_contract(tmp_path, ORT) == Contract.from_json(WRITTEN[ORT])


def test_every_key_is_missed(tmp_path):
    optional = {"versions", "files", "profiles"}  # names of the user's files: none must be there
    for engine, data in WRITTEN.items():
        for path in list_paths(data):
            if isinstance(path[-1], int) or (len(path) == 2 and path[0] in optional):
                continue
            broken = copy.deepcopy(data)
            del find_parent(broken, path)[path[-1]]
            with pytest.raises(ArtifactError, match="Export it again with 'lpdeploy export"):
                load_contract(write(tmp_path, engine, broken), engine)


def test_every_value_of_a_wrong_type_is_named(tmp_path):
    for engine, data in WRITTEN.items():
        for path in list_paths(data):
            broken = copy.deepcopy(data)
            parent = find_parent(broken, path)
            parent[path[-1]] = "x" if isinstance(parent[path[-1]], dict | list) else {"x": [[]]}
            with pytest.raises(ArtifactError, match="Export it again with") as caught:
                load_contract(write(tmp_path, engine, broken), engine)
            if path[0] not in ("engine", "schema_version"):
                named = [key for key in path if isinstance(key, str)][-1]
                assert named in str(caught.value)


def test_nothing_but_a_contract_or_a_sentence():
    for data in WRITTEN.values():
        for path in list_paths(data):
            for value in VALUES:
                broken = copy.deepcopy(data)
                find_parent(broken, path)[path[-1]] = value
                with suppress(ValueError):  # which the test above sees become an ArtifactError
                    assert isinstance(Contract.from_json(broken), Contract)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe{}", b"[" * 100_000, b"NaN"],
    ids=["empty", "cut", "list", "null", "number", "text", "object", "utf-16", "nested", "nan"],
)
def test_what_is_no_contract_at_all(tmp_path, text):
    for engine in WRITTEN:
        (tmp_path / engine.contract_file).write_bytes(text)
        with pytest.raises(ArtifactError, match="Export it again with"):
            load_contract(tmp_path, engine)


def test_other_versions_engines_and_precisions(tmp_path):
    for version in (0, 2, "1", None, [1]):
        write(tmp_path, ONNX, {**WRITTEN[ONNX], "schema_version": version})
        with pytest.raises(ArtifactError, match="schema version .* reads 1"):
            load_contract(tmp_path, ONNX)
    write(tmp_path, ORT, WRITTEN[ORT])
    with pytest.raises(ArtifactError, match="describes no export for onnx"):
        load_contract(tmp_path, ONNX)
    write(tmp_path, ONNX, {**WRITTEN[ONNX], "precision": "int4"})
    with pytest.raises(ArtifactError, match="int4 is not supported by engine onnx"):
        load_contract(tmp_path, ONNX)


def test_a_shape_is_resolved():
    spec = TensorSpec("input_ids", "int64", ("batch", 3, "sequence"))
    assert spec.resolve({"batch": 2, "sequence": 5}) == (2, 3, 5)


def test_what_is_not_allowed_says_what_is(tmp_path):
    data = copy.deepcopy(WRITTEN[TRT])
    data["inputs"][0]["dtype"] = "float8"
    with pytest.raises(ArtifactError, match=r"has dtype float8, not \w+, \w+.*[^.]\. Export it"):
        load_contract(write(tmp_path, TRT, data), TRT)
    data = copy.deepcopy(WRITTEN[TRT])
    data["profiles"]["prefill"].pop("sequence")
    with pytest.raises(ArtifactError, match=r"profiles.prefill does not limit batch, \w+"):
        load_contract(write(tmp_path, TRT, data), TRT)


def test_files_that_are_gone_or_cut_short(tmp_path):
    contract = Contract.from_json(WRITTEN[ONNX])
    with pytest.raises(ArtifactError, match=r"No model.onnx in .*Export it again"):
        contract.check_files(tmp_path, fix=ONNX.fix)
    (tmp_path / "model.onnx").write_bytes(b"12")
    with pytest.raises(ArtifactError, match=r"has 2 bytes, its export had 3. Copy it again, or: E"):
        contract.check_files(tmp_path, fix=ONNX.fix)
    (tmp_path / "model.onnx").write_bytes(b"123")
    contract.check_files(tmp_path, fix=ONNX.fix)
