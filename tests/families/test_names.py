"""A family is named in its own file; everything else asks its record."""

import ast
import re
from pathlib import Path

from lpdeploy.families import FAMILIES, is_per_layer, name_per_layer

ROOT = Path(__file__).parent.parent.parent / "lpdeploy"
# llama.cpp's own words for tokenizers and types; the demo times one shape of one family.
OTHER_MEANINGS = {
    ("demo/timing.py", "LlamaConfig"),
    ("servers/gguf_vocab.py", "llama"),
    ("servers/gguf_vocab.py", "qwen2"),
    ("servers/gguf_file.py", "LlamaFileType"),
}


def list_names(path):
    """List what the code of a module names: strings, names and imports, but no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # a docstring is an expression of its own
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text) if id(node) not in prose:
                yield text
            case ast.Name(id=text) | ast.Attribute(attr=text):
                yield text
            case ast.ImportFrom():
                yield from (node.module, *(alias.name for alias in node.names))


def test_no_other_module_names_a_family():
    classes = "|".join(family.load_classes()[1].__name__ for family in FAMILIES.values())
    stems = classes.replace("ForCausalLM", "")
    types = "|".join([*FAMILIES, *map(name_per_layer, FAMILIES)])
    # A model type alone, a class of it, or its module in transformers.
    family = re.compile(rf"^({types})$|\b({stems})[A-Z]\w+|transformers\.models\.\w+")
    named = {
        (str(path.relative_to(ROOT)), text)
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] != "families"
        for text in list_names(path)
        if family.search(text)
    }
    assert named == OTHER_MEANINGS


def test_the_prefix_of_per_layer_types_has_one_home():
    named = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for text in list_names(path)
        if is_per_layer(text) and text != "lpdeploy_version"
    ]
    assert set(named) <= {"families/__init__.py", "families/modeling_per_layer.py"}
