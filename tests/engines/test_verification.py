"""Results of several engines in one file, and the words for what is rounded."""

import json
from dataclasses import replace

import pytest

from lpdeploy.engines.export import export
from lpdeploy.engines.verification import Pair, VerifyResult
from lpdeploy.engines.verify import verify
from lpdeploy.engines.weight_checks import WeightsCheck
from lpdeploy.models.compact import compact
from lpdeploy.records import find_record
from tests.engines.test_verify import OPTIONS, prune
from tests.helpers import make_text, make_tiny_model


def make_pair(a, b, tolerance=1e-4, *, ok=True):
    return Pair(a, b, 1e-5, 3.0, 0.75, tolerance, ok)


def make_weights(b):
    return WeightsCheck("compact/torch", b, 3, ())


NEW = VerifyResult(
    (make_pair("cut/torch", "compact/torch"), make_pair("compact/torch", "onnx")),
    (make_weights("onnx"),), model_sha256="m", exports={"onnx": "1"},
)  # fmt: skip
OLD = VerifyResult(
    (
        make_pair("cut/torch", "compact/torch", ok=False),
        make_pair("compact/torch", "ort-unpacked/torch", None),
        make_pair("ort-unpacked/torch", "ort"),
        make_pair("compact/torch", "trt"),
    ),
    (make_weights("ort"), make_weights("trt")), model_sha256="m", exports={"ort": "2", "trt": "3"},
)  # fmt: skip


class TestMerging:
    def test_other_exports_of_the_same_model_stay(self):
        merged = NEW.merge(OLD, present={"onnx": "1", "ort": "2", "trt": "3"})
        assert [pair.b for pair in merged.pairs] == [
            "compact/torch", "onnx", "ort-unpacked/torch", "ort", "trt",
        ]  # fmt: skip
        assert [check.b for check in merged.weights] == ["onnx", "ort", "trt"]
        assert merged.exports == {"onnx": "1", "ort": "2", "trt": "3"}
        assert merged.ok  # the earlier comparison of the checkpoint was made again

    def test_an_export_that_is_gone_or_was_made_again_does_not(self):
        merged = NEW.merge(OLD, present={"onnx": "1", "ort": "another"})
        assert merged == NEW

    def test_nothing_of_another_model_stays(self):
        present = {"onnx": "1", "ort": "2", "trt": "3"}
        assert NEW.merge(replace(OLD, model_sha256="other"), present=present) == NEW

    def test_the_newest_of_one_export_counts(self):
        again = replace(OLD, exports={"onnx": "1"}, pairs=(make_pair("x", "onnx", ok=False),))
        assert NEW.merge(again, present={"onnx": "1"}) == NEW

    def test_json(self, tmp_path):
        (tmp_path / "verify.json").write_text(json.dumps(OLD.to_json()))
        assert find_record(VerifyResult, tmp_path / "verify.json", fix="") == OLD
        assert find_record(VerifyResult, tmp_path / "none.json", fix="") is None


class TestWords:
    @pytest.mark.parametrize(
        ("tolerance", "ok", "verdict"),
        [
            (1e-4, True, "equal"),
            (1e-4, False, "different"),
            (None, True, "rounded"),
            (None, False, "different"),
        ],
    )
    def test_what_is_rounded_is_not_called_equal(self, tolerance, ok, verdict):
        assert make_pair("a", "b", tolerance, ok=ok).verdict == verdict

    def test_what_is_quantized(self):
        assert OLD.quantized == {"ort": 0.75}
        assert NEW.quantized == {}


def test_a_run_keeps_the_results_of_all_its_exports(tmp_path):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
    base = make_tiny_model(tmp_path / "base", num_hidden_layers=1, **shape)
    options = replace(OPTIONS, round_to=16)
    prune(str(base), tmp_path / "run", data=str(make_text(tmp_path / "a.txt")), options=options)
    compact(tmp_path / "run")
    for engine, options in (("onnx", {}), ("ort", {"precision": "int8", "block_size": 16})):
        export(str(tmp_path / "run"), engine=engine, **options)
        assert verify(tmp_path / "run", engine=engine).exports == {}  # only the file has them
    kept = find_record(VerifyResult, tmp_path / "run" / "verify.json", fix="")
    assert {"onnx", "ort-unpacked/torch", "ort"} <= {pair.b for pair in kept.pairs}
    assert kept.exports.keys() == {"onnx", "ort"}
    export(str(tmp_path / "run"), engine="ort", overwrite=True)
    verify(tmp_path / "run", engine="onnx")
    kept = find_record(VerifyResult, tmp_path / "run" / "verify.json", fix="")
    assert kept.exports.keys() == {"onnx"}
