"""Which of the two libraries is taken, and what is said where neither will do."""

import sys

import pytest

from lpdeploy.engines.trt.library import load_library, wrap_module
from lpdeploy.errors import LpdeployError, MissingDependencyError
from tests.fake_tensorrt import ILogger, make_module


@pytest.fixture
def installed(monkeypatch):
    def put(**versions):
        for name in ("tensorrt", "tensorrt_rtx"):
            module = make_module(versions[name]) if name in versions else None
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_tensorrt_comes_first(installed):
    installed(tensorrt="10.15.1", tensorrt_rtx="1.7.1")
    library = load_library()
    assert (library.name, library.version) == ("tensorrt", "10.15.1")
    assert not library.builds_for_any_gpu


def test_rtx_where_it_is_alone_or_asked_for(installed):
    installed(tensorrt_rtx="1.7.1.116")
    assert load_library().name == "tensorrt_rtx"
    assert load_library().builds_for_any_gpu
    installed(tensorrt="11.0.0", tensorrt_rtx="1.7.1.116")
    assert load_library("tensorrt_rtx").name == "tensorrt_rtx"


def test_neither_is_installed(installed):
    installed()
    with pytest.raises(
        MissingDependencyError,
        match=r"engine trt needs it. Install with: pip install 'lpdeploy\[trt\]', or .*trt-rtx",
    ):
        load_library()


def test_the_one_that_built_the_engine_is_not_installed(installed):
    installed(tensorrt="10.15.1")
    with pytest.raises(
        MissingDependencyError,
        match=r"tensorrt_rtx is not installed; .*pip install 'lpdeploy\[trt-rtx\]'",
    ):
        load_library("tensorrt_rtx")


@pytest.mark.parametrize(
    ("name", "version", "oldest", "extra"),
    [("tensorrt", "10.9.0.34", "10.15", "trt"), ("tensorrt_rtx", "1.6.0", "1.7", "trt-rtx")],
)
def test_too_old(name, version, oldest, extra):
    sentence = (
        rf"{name} {version} is installed; lpdeploy needs {oldest} .*--upgrade 'lpdeploy\[{extra}\]'"
    )
    with pytest.raises(LpdeployError, match=sentence):
        wrap_module(name, make_module(version))


def test_only_errors_are_kept():
    library = wrap_module("tensorrt_rtx", make_module())
    assert library.explain() == "it gives no reason"
    library.logger.log(ILogger.Severity.WARNING, "INT64 weights")
    library.logger.log(ILogger.Severity.ERROR, "no such layer.\n  at line 3")
    library.logger.log(ILogger.Severity.ERROR, "the build failed")
    assert library.messages == ["no such layer.\n  at line 3", "the build failed"]
    assert library.explain() == "no such layer"


def test_networks_are_strongly_typed_and_fp32_is_fp32():
    module = make_module()
    library = wrap_module("tensorrt_rtx", module)
    builder = module.Builder(library.logger)
    assert library.create_network(builder).flags == 1 << module.NetworkDefinitionCreationFlag(1)
    assert library.create_config(builder).flags == set()  # TF32, which is set by default, is not


def test_a_version_without_these_flags():
    # TensorRT 11: every network is strongly typed, and precision flags are gone.
    module = make_module("11.0.0")
    module.NetworkDefinitionCreationFlag, module.BuilderFlag = object(), object()
    library = wrap_module("tensorrt", module)
    builder = module.Builder(library.logger)
    assert library.create_network(builder).flags == 0
    assert library.create_config(builder) is builder.config
