"""A LLaMA that becomes a Mistral must still read text as it did."""

import shutil

import pytest
from transformers import AutoTokenizer

from lpdeploy.models.compact import compact
from tests.helpers import need_shared
from tests.models.families import choose_kept, edit_json, make_run


@pytest.mark.real
def test_a_mistral_result_encodes_as_its_llama_base(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(need_shared() / "models" / "stories260K", base, copy_function=shutil.copyfile)
    # What LLaMA-1 and 2 say of their tokenizer; transformers heeds it beside a LLaMA config only.
    edit_json(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=3, channels=80))
    assert compact(run).record.architecture == "MistralForCausalLM"  # 6 heads do not divide 64
    before = AutoTokenizer.from_pretrained(base)
    after = AutoTokenizer.from_pretrained(run / "model")
    for text in ("Once upon a time</s> there was", "  two  spaces", "a\nb"):
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)
